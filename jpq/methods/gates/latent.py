"""DHP gate: a latent vector per site from which weights are generated, made sparse by proximal steps.

Y. Li, S. Gu, K. Zhang, L. Van Gool, R. Timofte, "DHP: Differentiable Meta Pruning via HyperNetworks", ECCV 2020,
arXiv:2003.13683. The hypernetworks themselves are in `compression/hypernetwork.py`.

| paper | here | value or shape |
|---|---|---|
| z of a layer's outputs, shared through every add | `z`, one for each site | [1, n], starts at 1 |
| z <- sign(z) max(abs(z) - lr lambda, 0) | `after_step` | lr = RATE |
| lambda | `price`, what the budget charges for each unit | [1, n] |
| pruned iff abs(z) < T | `margin()` = ln(abs(z) / T) | T = 5e-3 |
| mc: at least so many survive a latent | LEAST | 4 |

Latents take plain gradient steps of their own (`self_updating`): Adam's normalised steps would drown lr * lambda, and
decay on top of the proximal step would shrink twice.

We differ: lambda is the budget's pressure on each unit instead of one constant, so costly channels shrink faster and
the search stops shrinking when the cost is met. Latents start at 1 instead of N(0, 1), because the hypernetwork starts
at the pretrained weights, and a channel whose latent happens to be small could not be told from a useless one. RATE is
1 without momentum, as far as the authors' 0.1 with momentum 0.9 moves in the end. A gradient step moves a latent by
LONGEST at most, in the mean square: where no BatchNorm follows, latents scale all that comes behind them, and losses of
other tasks are larger than cross entropies (the latents of a DnCNN grew to 6,000 within two epochs).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn

from jpq.methods.gates.base import Gate
from jpq.types import Units

THRESHOLD = 5e-3

LEAST = 4  # units that every site keeps

RATE = 1.0  # step size of the latents

LONGEST = 0.01  # root of the mean square of a gradient step's entries

TINY = 1e-12

FAR = 60.0  # nats added to the margins of a site's last units: more than discretization shifts


class Latent(Gate):
    """Gate that keeps unit i iff abs(z_i) >= T, and the LEAST largest in any case."""

    self_updating: ClassVar[bool] = True
    reads_gradients: ClassVar[bool] = True
    channels_only: ClassVar[bool] = True
    generates_weights: ClassVar[bool] = True
    price: Units

    def __init__(self, rows: int, n: int):
        super().__init__(rows, n)
        self.z = nn.Parameter(torch.ones(rows, n))
        self.register_buffer("price", torch.zeros(rows, n))

    def relaxed(self) -> Units:
        """Ones: latents act through the weights that they generate."""
        return torch.ones_like(self.z)

    def latent(self) -> Units:
        """Latent vector z with its gradient, `[1, n]`."""
        return self.z

    def margin(self) -> Units:
        """Log distance ln(abs(z) / T), raised far above 0 for the LEAST largest."""
        margin = (self.z.abs() + TINY).log() - math.log(THRESHOLD)
        last = self.z.abs().topk(min(LEAST, self.n), 1).indices
        return margin.scatter_add(1, last, torch.full_like(last, FAR, dtype=margin.dtype))

    def keep_probability(self) -> Units:
        """Decision, whose backward pass notes the cost of each unit for the proximal step."""
        keep = self.keep()
        if torch.is_grad_enabled():
            keep.requires_grad_(True).register_hook(self._charge)
        return keep

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Take a step along the task's gradient, then the proximal step."""
        if self.z.grad is not None:
            step = RATE * self.z.grad
            length = float(step.square().mean().sqrt())
            self.z.sub_(step if length <= LONGEST else step * (LONGEST / length))
            self.z.grad = None
        if int((self.z.abs() >= THRESHOLD).sum()) > LEAST:
            self.z.copy_(self.z.sign() * (self.z.abs() - RATE * self.price.abs()).clamp_min(0))
        self.price.zero_()

    def _charge(self, grad: Units) -> None:
        self.price += grad.detach()
