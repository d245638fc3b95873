"""The contracts of a bit-width, as a number that training can move, and of a search's own rounding grid.

The final grid, its range and its gradients are the same for every method (`IntegerQuantizer`); methods differ in which
widths are allowed and whether they learn. So the family is of widths, not of whole quantizers. A search that rounds in
another way brings a `Grid`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn


class Grid(ABC):
    """Rounding during a search, where it is not yet the uniform grid of evaluation."""

    @abstractmethod
    def quantize(self, x: Tensor, threshold: Tensor, bits: Tensor, signed: bool) -> Tensor:
        """Tensor x on the search's grid, differentiable; `threshold` is the learned range (scalar or per channel)."""

    @abstractmethod
    def range(self, threshold: Tensor, signed: bool) -> Tensor:
        """Range of the uniform grid that evaluation and discretization use, shaped like `threshold`."""


class BitWidth(nn.Module, ABC):
    """Bit-width of one tensor: whole in the forward pass, with a gradient where it learns."""

    learns: ClassVar[bool] = True  # whether training moves it
    own_grid: ClassVar[bool] = False  # whether `grid` gives a rounding grid
    choices: tuple[int, ...]  # allowed widths in bits, ascending

    @abstractmethod
    def forward(self) -> Tensor:
        """Current bit-width, a scalar out of `choices`, differentiable where it learns."""

    @abstractmethod
    def soft(self) -> float:
        """Real number behind the bit-width, which discretization rounds."""

    def nearest(self, value: float) -> int:
        """Choice that a soft width rounds to; ties go to the larger."""
        return min(self.choices, key=lambda c: (abs(c - value), -c))

    def switch(self, small: int, large: int) -> float:
        """Soft width at which rounding passes from one choice to the next."""
        return (small + large) / 2

    def grid(self) -> Grid | None:
        """Rounding grid while this width learns; None for the uniform grid."""
        return None

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring the parameter back into its bounds after an optimizer step."""
