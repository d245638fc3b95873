"""A bit-width that somebody else decided: uniform quantization, the input image, and every landed layer."""

from __future__ import annotations

import torch
from torch import Tensor

from jpq.quantizers.base import Width


class Fixed(Width):
    """`bits`, unchanged by training."""

    bits: Tensor

    def __init__(self, bits: int, choices: tuple[int, ...] = ()):
        super().__init__()
        self.choices = choices or (bits,)
        self.register_buffer("bits", torch.tensor(float(bits)))

    def forward(self) -> Tensor:
        """The bit-width."""
        return self.bits

    def soft(self) -> float:
        """The bit-width."""
        return float(self.bits)
