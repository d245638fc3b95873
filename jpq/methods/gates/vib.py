"""VIB gate (variational information bottleneck): Gaussian noise on each channel, kept while signal exceeds noise.

Every unit carries z ~ N(mu, sigma^2); a KL term to a zero-mean prior with its best variance raises sigma and shrinks mu
where the loss allows it, so that their ratio measures how much the unit matters.

B. Dai, C. Zhu, B. Guo, D. Wipf, "Compressing Neural Networks using the Variational Information Bottleneck", ICML 2018,
arXiv:1802.10399; the gate of DJPQ (Wang et al., ECCV 2020, arXiv:2007.10463).

| paper | here | shape |
|---|---|---|
| mu_i | `mu` | [1, n] |
| ln sigma_i^2 | `log_var` | [1, n] |
| alpha_i = mu^2 / sigma^2 (DJPQ; VIBNet's is the reciprocal) | `exp(margin())` at threshold 1 | [1, n] |
| KL_i = 0.5 ln(1 + mu^2 / sigma^2) | `penalty()` | [1, n] |
| gamma * S_l c_l, the weight of layer l's KL | the unit's price in the budget (`priced_penalty`) | [1, n] |

We differ: mu multiplies the consumer's weights, before they are quantized, and the noise z / mu multiplies what the
consumer reads, after it is quantized, fresh per sample: without quantizers that is z * x exactly; with them
discretization can fold mu into the weights and change nothing. ln sigma^2 starts at -4, not -9: a search of a few
hundred steps must be able to reach the threshold (measured on digits at 0.25 % BOPs, see studies). P(kept) is
sigmoid((ln alpha - ln alpha_th) / tau): with the plain alpha, as remembered from DJPQ, the gradient is 0 at the start.

VIBNet weighs the KL of a unit by gamma times the size of its map; here its weight is the unit's price, the derivative
of the budget's term by the unit's decision, which follows the size of the map, the widths of its readers and makers,
and how hard the budget is to meet. A unit whose noise of variance v (relative to mu) costs h v / 2 nats settles where
alpha is h over the weight of its KL. Through sigmoid(ln alpha) alone the price enters with a factor of 0.018 at the
start (ln alpha = 4) and less above, while noise is felt in full: on digits at 1 % alpha of every unit grew from there,
to 5 to 8 nats (convnet, seed 0, 20 epochs). --gate-weight 1 weighs the KL exactly at the price; many channels close
then, but their noise is strong, and in short searches the weights suffer more from it than closed channels save: digits
at 0.25 %, three seeds, 20 + 20 epochs, KL at 1, 0.3, 0.1, 0.03 times the price: 97.9, 98.0, 98.2, 98.4 %; with the
small constant of before 98.7 %. So the default is 0.03.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from jpq.methods.gates.base import Gate
from jpq.types import Units

EPS = 1e-8  # added to variances, as in VIBNet's code

FLOOR = 1e-3  # smallest mu: below it a unit is long since dropped, and z / mu stays finite


class VIB(Gate):
    """Gate that keeps unit i iff mu_i^2 > threshold * sigma_i^2."""

    priced_penalty: ClassVar[bool] = True

    def __init__(self, rows: int, n: int, start: float = -4.0, threshold: float = 1.0, tau: float = 1.0):
        super().__init__(rows, n)
        self.mu = nn.Parameter(torch.ones(rows, n))
        self.log_var = nn.Parameter(torch.full((rows, n), start))
        self.log_threshold, self.tau = math.log(threshold), tau

    def relaxed(self) -> Units:
        """Mean mu of the multiplier; the noise is per sample and enters by `input_noise`."""
        return self.mu

    def margin(self) -> Units:
        """Log signal-to-noise ratio above the threshold, over tau: (ln alpha - ln alpha_th) / tau."""
        return ((self.mu.square() + EPS).log() - self.log_var - self.log_threshold) / self.tau

    def keep_probability(self) -> Units:
        """Smoothed decision sigmoid(margin)."""
        return torch.sigmoid(self.margin())

    def scale(self) -> Units:
        """Mean mu, without gradient."""
        return self.mu.detach()

    def input_noise(self, batch: int) -> Tensor | None:
        """Noise z / mu = 1 + sigma / mu * eps with eps ~ N(0, 1), `[batch, n]`."""
        ratio = (0.5 * self.log_var).exp() / self.mu
        return 1.0 + ratio * torch.randn(batch, self.n, device=ratio.device, dtype=ratio.dtype)

    def penalty(self) -> Tensor | None:
        """KL divergence to the zero-mean prior with its best variance, mu^2 + sigma^2."""
        return 0.5 * torch.log1p(self.mu.square() / (self.log_var.exp() + EPS))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Keep mu positive, so that it can be folded, and bound ln sigma^2."""
        self.mu.clamp_(min=FLOOR)
        self.log_var.clamp_(-12.0, 4.0)
