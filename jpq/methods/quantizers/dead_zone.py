"""Dead-zone grid (CoDeQ): a rounding grid whose zero bin has a width of its own.

    Q = 2^(b-1) - 1      s = (R - d/2) / (Q - 1/2) + 1e-8      delta = d/2 - s/2
    wbar = clip(round(sign(w) relu(|w| - delta) / s), -Q, Q)      what = s wbar + delta sign(wbar)

All |w| <= d/2 give 0, the top level is R, and however wide the zero bin is, all 2Q + 1 levels are used. d = s is plain
rounding. Straight-through on round, relu and clip: dwhat/dw = 1 everywhere, in the zero bin too, so dropped weights
go on learning; dwhat/ds = wbar - u with u not yet rounded; the zero bin moves delta by -sign(w).

Source: CoDeQ (arXiv:2512.12981; gates/dead_zone.py holds R and d).

At discretization the plain grid takes its place. The levels +-(delta + k s) lie on a uniform grid only where delta / s
is a fraction p / q of small integers, and then as the integers +-(p + k q): with q = 1 up to p + Q, which takes more
bits in arithmetic than the b of its codes (at d = R, where p = Q - 1, one more). A learned d gives no such fraction;
exact would be two terms, s wbar and delta sign(wbar): a second, ternary layer, whose operations the paper's cost leaves
out. So evaluation and discretization use what hardware and QCDQ have: the plain b-bit grid of range R under the mask
|w| > d/2. Masked, rebuilt and exported model agree exactly, and the cost is what is computed; the step from one grid to
the other is left to fine-tuning. A kept weight that rounds to 0 on the plain grid still counts as kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jpq.methods.quantizers.base import Grid

LevelRange = Callable[[], tuple[Tensor, Tensor]]  # gives (R, d): the largest level and the width of the zero bin


class DeadZoneGrid(Grid):
    """Grid with a dead zone while training, the uniform grid of range R otherwise.

    Args:
        ends: gives (R, d), the largest level and the width of the zero bin, 0 < d < 2 R.
    """

    def __init__(self, ends: LevelRange):
        self.ends = ends

    def range(self, threshold: Tensor, signed: bool) -> Tensor:
        """Range R, the same for all channels: nothing is learned per channel before discretization."""
        return self.ends()[0].to(threshold.dtype).expand_as(threshold)

    def quantize(self, x: Tensor, threshold: Tensor, bits: Tensor, signed: bool) -> Tensor:
        """Weights on the grid (w-hat of the formulas); `threshold` is not used."""
        top, d = self.ends()
        n = torch.exp2(bits - 1) - 1
        s = (top - d / 2) / (n - 0.5) + 1e-8
        delta = d / 2 - s / 2
        sign = x.detach().sign()
        over = x * sign - delta
        u = sign * (over + (over.relu() - over).detach()) / s
        rounded = u.detach().round().clamp(-n.detach(), n.detach())
        return s * (u + (rounded - u).detach()) + rounded.sign() * delta
