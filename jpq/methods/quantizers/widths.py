"""Bit-widths by one real number: fixed, or learned and rounded in the forward pass (straight-through gradient).

Source: Y. Wang, Y. Lu, T. Blankevoort, "Differentiable Joint Pruning and Quantization for Hardware Efficiency",
ECCV 2020, arXiv:2007.10463. We differ: DJPQ trains with real-valued b and rounds at the end; here the forward pass
always sees whole bits, so that the cost in the loss is the cost in the report.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from jpq.methods.quantizers.base import BitWidth
from jpq.types import JpqError

FLOOR, CEILING = 0.02, 3.0  # bounds of |theta|: in bits, and in multiples of high - low


class Learned(BitWidth):
    """Learned width: any whole number of bits in [low, high]."""

    def __init__(self, start: float, low: int, high: int):
        super().__init__()
        self.low, self.high = low, high
        self.choices = tuple(range(low, high + 1))
        self.bits = nn.Parameter(torch.tensor(float(start)))

    def forward(self) -> Tensor:
        """Rounded bits, with the gradient of the real ones."""
        return self.bits + (self.bits.round() - self.bits).detach()

    def soft(self) -> float:
        """Real-valued bits."""
        return float(self.bits.detach())

    @torch.no_grad()
    def after_step(self) -> None:
        """Clamp to [low, high]."""
        self.bits.clamp_(self.low, self.high)


class Fixed(BitWidth):
    """Width that training does not change."""

    learns: ClassVar[bool] = False
    bits: Tensor

    def __init__(self, bits: int, choices: tuple[int, ...] = ()):
        super().__init__()
        self.choices = choices or (bits,)
        self.register_buffer("bits", torch.tensor(float(bits)))

    def forward(self) -> Tensor:
        """Number of bits, a scalar."""
        return self.bits

    def soft(self) -> float:
        """Number of bits."""
        return float(self.bits)


class PowerOfTwo(BitWidth):
    """Learned width of 2, 4, 8 or 16 bits within [low, high]."""

    def __init__(self, start: float, low: int, high: int):
        super().__init__()
        self.choices = tuple(b for b in (2, 4, 8, 16) if low <= b <= high)
        if not self.choices:
            raise JpqError(f"No power of two lies in {low} to {high} bits: widen --w-bits or --a-bits.")
        self.bits = nn.Parameter(torch.tensor(float(min(max(start, self.choices[0]), self.choices[-1]))))

    def forward(self) -> Tensor:
        """Nearest power of two, with the gradient of the real bits."""
        rounded = torch.exp2(self.bits.clamp(self.choices[0], self.choices[-1]).log2().round())
        return self.bits + (rounded - self.bits).detach()

    def soft(self) -> float:
        """Real-valued bits."""
        return float(self.bits.detach())

    def nearest(self, value: float) -> int:
        """Power of two that is nearest in logarithms, as in training."""
        log2_bits = math.log2(max(value, 1e-3))
        return min(self.choices, key=lambda c: (abs(math.log2(c) - log2_bits), -c))

    def switch(self, small: int, large: int) -> float:
        """Geometric mean: 2.83, 5.66, 11.3."""
        return math.sqrt(small * large)

    @torch.no_grad()
    def after_step(self) -> None:
        """Clamp to the smallest and largest choice."""
        self.bits.clamp_(self.choices[0], self.choices[-1])


class SigmoidWidth(BitWidth):
    """Learned width, any whole number of bits in [low, high], from a squashed real parameter."""

    def __init__(self, start: float, low: int, high: int):
        super().__init__()
        self.low, self.high = low, high
        self.choices = tuple(range(low, high + 1))
        share = min(max(start - low, 0.0) / max(high - low, 1), math.tanh(CEILING))
        self.theta = nn.Parameter(torch.tensor((high - low) * math.atanh(share)))
        self.after_step()

    def forward(self) -> Tensor:
        """Rounded bits, with the gradient of the real ones."""
        real = self._real()
        return real + (real.round() - real).detach()

    def soft(self) -> float:
        """Real-valued bits."""
        return float(self._real().detach())

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep |theta| where tanh has a slope."""
        span = self.high - self.low
        self.theta.copy_(self.theta.abs().clamp(min(FLOOR, span), max(CEILING * span, FLOOR)))

    def _real(self) -> Tensor:
        span = self.high - self.low
        return self.low + span * (self.theta.abs() / max(span, 1)).tanh()
