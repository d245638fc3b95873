"""Hard concrete gate (L0 regularisation): a binary concrete variable, stretched and clipped to reach 0 and 1.

C. Louizos, M. Welling, D. Kingma, "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018,
arXiv:1712.01312.

| paper | here | value or shape |
|---|---|---|
| log alpha | `log_alpha` | [1, n] |
| beta, gamma, zeta | `BETA`, `LOW`, `HIGH` | 2/3, -0.1, 1.1 |
| u ~ U(0, 1) | drawn in `relaxed` from the open interval | [1, n] |
| P(z > 0) = sigmoid(log alpha - beta ln(-gamma/zeta)) | `keep_probability()` | [1, n] |
| test-time z | `scale()` where `keep()` | [1, n] |
| lambda * |g| * P(z > 0), the L0 norm | `penalty()` at the unit's price (`priced_penalty`), STRENGTH times | [1, n] |

We differ: the price of a unit is what its cost weighs in the budget's term, not its number of weights; from a
pretrained network log alpha starts at 2 (P(z > 0) = 0.97) instead of drop rate 0.5. Weights decay alike whether their
unit is open or not (the paper's L2 term counts open ones), and no averaged weights are evaluated.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn

from jpq.methods.gates.base import Gate
from jpq.types import Units

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1

EDGE = math.log(-HIGH / LOW)  # ln 11: evaluation gives exactly 0 at log alpha <= -EDGE, exactly 1 from +EDGE

STRENGTH = 1 / 0.03  # factor of the L0 norm: at the default --gate-weight it counts exactly at the unit's price

BOUND = math.log(100.0)  # bound of |log alpha|, beyond which the gradient vanishes


class HardConcrete(Gate):
    """Gate that keeps unit i iff its test-time value is above 0, that is log alpha_i > -ln 11."""

    priced_penalty: ClassVar[bool] = True

    def __init__(self, rows: int, n: int, start: float = 2.0):
        super().__init__(rows, n)
        self.log_alpha = nn.Parameter(torch.full((rows, n), start))

    def relaxed(self) -> Units:
        """Random z in [0, 1], drawn once per forward pass."""
        u = torch.rand_like(self.log_alpha).clamp(1e-6, 1 - 1e-6)
        return self._stretch(torch.sigmoid((u.logit() + self.log_alpha) / BETA))

    def margin(self) -> Units:
        """Distance from the test-time threshold: log alpha + ln 11."""
        return self.log_alpha + EDGE

    def keep_probability(self) -> Units:
        """Probability P(z > 0) in closed form."""
        return torch.sigmoid(self.log_alpha + BETA * EDGE)

    def penalty(self) -> Units:
        """L0 norm P(z > 0), STRENGTH times: closed units still move away from the threshold where a budget is met."""
        return STRENGTH * self.keep_probability()

    def scale(self) -> Units:
        """Test-time value of the gate in [0, 1], without gradient."""
        return self._stretch(torch.sigmoid(self.log_alpha)).detach()

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Bound log alpha, so that closed gates still get a gradient."""
        self.log_alpha.clamp_(-BOUND, BOUND)

    @staticmethod
    def _stretch(s: Units) -> Units:
        return (s * (HIGH - LOW) + LOW).clamp(0.0, 1.0)
