"""A bit-width as a squashed parameter: its slope fades towards the largest width.

    b = round(low + w tanh(|theta| / w))      w = high - low      straight-through on round

Source: CoDeQ (arXiv:2512.12981), where b = round(low + w tanh |theta|) starts at theta = 3. We differ: theta is in bits
(slope 1 at 0), so that --bit-lr means the same as for other widths, and it starts where the search starts; |theta|
stays above 0, where the absolute value has no slope and a width would never rise again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from jpq.quantizers.base import Width

FLOOR, CEILING = 0.02, 3.0  # bits, and multiples of w


class Squashed(Width):
    """Any whole width in [low, high]."""

    def __init__(self, start: float, low: int, high: int):
        super().__init__()
        self.low, self.high = low, high
        self.choices = tuple(range(low, high + 1))
        share = min(max(start - low, 0.0) / max(high - low, 1), math.tanh(CEILING))
        self.theta = nn.Parameter(torch.tensor((high - low) * math.atanh(share)))
        self.after_step()

    def forward(self) -> Tensor:
        """The whole bits, with the gradient of the real ones."""
        real = self._real()
        return real + (real.round() - real).detach()

    def soft(self) -> float:
        """The real-valued bits."""
        return float(self._real().detach())

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep |theta| where it has a slope."""
        wide = self.high - self.low
        self.theta.copy_(self.theta.abs().clamp(min(FLOOR, wide), max(CEILING * wide, FLOOR)))

    def _real(self) -> Tensor:
        wide = self.high - self.low
        return self.low + wide * (self.theta.abs() / max(wide, 1)).tanh()
