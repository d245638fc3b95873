"""Bit-widths that common hardware has: 2, 4, 8 or 16, learned by gradient.

    b' = 2^round(log2 b), gradients evaluated at b' and applied to the free b; it switches at 2.83, 5.66 and 11.3 bits.

Source: the restricted DJPQ (Wang et al., ECCV 2020, arXiv:2007.10463); the paper confirms an extra bit-adjusting step
per layer, its rounding rule is unknown, this one is ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from jpq.quantizers.base import Width
from jpq.types import JpqError


class PowerOfTwo(Width):
    """2, 4, 8 or 16 bits within [low, high]."""

    def __init__(self, start: float, low: int, high: int):
        super().__init__()
        self.choices = tuple(b for b in (2, 4, 8, 16) if low <= b <= high)
        if not self.choices:
            raise JpqError(f"No power of two lies in {low} to {high} bits: widen --w-bits or --a-bits.")
        self.bits = nn.Parameter(torch.tensor(float(min(max(start, self.choices[0]), self.choices[-1]))))

    def forward(self) -> Tensor:
        """The nearest power of two, with the gradient of `bits`."""
        whole = torch.exp2(self.bits.clamp(self.choices[0], self.choices[-1]).log2().round())
        return self.bits + (whole - self.bits).detach()

    def soft(self) -> float:
        """The real-valued bits."""
        return float(self.bits.detach())

    def nearest(self, value: float) -> int:
        """The power of two that is nearest in logarithms, as in training."""
        at = math.log2(max(value, 1e-3))
        return min(self.choices, key=lambda c: (abs(math.log2(c) - at), -c))

    def switch(self, small: int, large: int) -> float:
        """The geometric mean: 2.83, 5.66, 11.3."""
        return math.sqrt(small * large)

    @torch.no_grad()
    def after_step(self) -> None:
        """Clamp to the smallest and largest choice."""
        self.bits.clamp_(self.choices[0], self.choices[-1])
