"""DAIS gate: a relaxed 0/1 indicator per channel, annealed to binary and trained on other batches than the weights.

Y. Guan, N. Liu, P. Zhao, Z. Che, K. Bian, Y. Wang, J. Tang, "DAIS: Automatic Channel Pruning via Differentiable
Annealing Indicator Search", IEEE TNNLS 34(12), arXiv:2011.02166.

| paper | here | value or shape |
|---|---|---|
| alpha | `alpha`, in units of COLD | [1, n], starts in U(0, 5), the paper's U(0, 0.1) |
| T = 1 / (1 + 49 progress) | `temperature` = T / COLD | 50 -> 1 over the search |
| I = sigmoid(alpha / T) (eq. 7) | `relaxed()`, `keep_probability()`, `scale()` | [1, n] |
| R_1 = sum of I (eq. 8) | `penalty()` at the unit's price (`priced_penalty`), STRENGTH times | [1, n] |
| E, bilinear in neighbouring I (eq. 9); R_f = ln E (eq. 10) | the budget's pressure | |
| keep iff I > 0.5 | `margin()` = alpha / T > 0 | [1, n] |
| I_a = I_b where an add joins two layers (eq. 11) | one site, one gate | |
| batches of D_w and D_alpha | `bilevel` (see `fit` and `CompressedModel.set_trainable`) | halves of the training set |

In units of COLD = 1/50, the last temperature, Adam's usual 0.05 is the paper's 1e-3 and the last margins are alpha.

We differ: ln E weighs only while E is above what the budget's ramp allows; below it there is no -ln E, discretization
spends what is left. Kept indicators are folded into the weights as they are (studies/claims.py measures how near to 1
they come) instead of being set to 1, so that discretization changes nothing that trained. For the same reason weights
are quantized after their product with I; the learned ranges follow T. No look-ahead weights (first order).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from jpq.methods.gates.base import Gate
from jpq.types import Units

COLD = 1 / 50  # T when the search ends

STRENGTH = 1 / 0.03  # factor of R_1: at the default --gate-weight it counts exactly at the unit's price

SPREAD = 0.1 / COLD  # largest alpha at the start


class Annealed(Gate):
    """Gate that keeps unit i iff alpha_i > 0."""

    bilevel: ClassVar[bool] = True
    priced_penalty: ClassVar[bool] = True
    temperature: Tensor

    def __init__(self, rows: int, n: int):
        super().__init__(rows, n)
        self.alpha = nn.Parameter(SPREAD * (1 - torch.rand(rows, n)))  # in (0, SPREAD]: all kept
        self.register_buffer("temperature", torch.tensor(1 / COLD))

    def relaxed(self) -> Units:
        """Indicator I = sigmoid(alpha / T), `[rows, n]`."""
        return torch.sigmoid(self.margin())

    def margin(self) -> Units:
        """Logit of the indicator, alpha / T."""
        return self.alpha / self.temperature

    def keep_probability(self) -> Units:
        """Indicator I itself."""
        return self.relaxed()

    def scale(self) -> Units:
        """Indicator I, without gradient."""
        return self.relaxed().detach()

    def penalty(self) -> Tensor | None:
        """Indicator I: the lasso R_1, STRENGTH times."""
        return STRENGTH * self.relaxed()

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Lower the temperature."""
        self.temperature.fill_(1 / COLD / (1 + (1 / COLD - 1) * min(1.0, progress)))
