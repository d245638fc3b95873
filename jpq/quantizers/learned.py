"""A bit-width learned by gradient: a real number, rounded in the forward pass, straight-through backward.

Source: Y. Wang, Y. Lu, T. Blankevoort, "Differentiable Joint Pruning and Quantization for Hardware Efficiency",
ECCV 2020, arXiv:2007.10463. We differ: DJPQ trains with real-valued b and rounds at the end; here the forward pass
always sees whole bits, so the cost that the optimiser pays is the cost that the report prints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jpq.quantizers.base import Width


class Learned(Width):
    """Any whole width in [low, high]."""

    def __init__(self, start: float, low: int, high: int):
        super().__init__()
        self.low, self.high = low, high
        self.choices = tuple(range(low, high + 1))
        self.bits = nn.Parameter(torch.tensor(float(start)))

    def forward(self) -> Tensor:
        """`round(bits)`, with the gradient of `bits`."""
        return self.bits + (self.bits.round() - self.bits).detach()

    def soft(self) -> float:
        """The real-valued bits."""
        return float(self.bits.detach())

    @torch.no_grad()
    def after_step(self) -> None:
        """Clamp to [low, high]."""
        self.bits.clamp_(self.low, self.high)
