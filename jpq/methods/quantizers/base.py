"""How many bits: the width of one quantizer, as a number that training can move.

The grid that is landed on, its range and its gradients are the same for every method (`Integer`); methods differ in
where a width may lie and whether it learns. So the family is of widths, not of whole quantizers. A search that rounds
in another way brings a `Grid`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn


class Grid(ABC):
    """How training rounds during a search, where that is not yet the plain uniform grid that it lands on."""

    @abstractmethod
    def quantize(self, x: Tensor, threshold: Tensor, bits: Tensor, signed: bool) -> Tensor:
        """x on the search's grid, differentiable; `threshold` is the learned range, a scalar or one per channel."""

    @abstractmethod
    def range(self, threshold: Tensor, signed: bool) -> Tensor:
        """The range of the plain grid that evaluation uses and landing keeps, shaped like `threshold`."""


class BitWidth(nn.Module, ABC):
    """The bit-width of one tensor: whole in the forward pass, with a gradient where it learns."""

    own_grid: ClassVar[bool] = False  # whether `grid` gives one
    choices: tuple[int, ...]  # what it may land on, ascending

    @abstractmethod
    def forward(self) -> Tensor:
        """The bit-width now, a scalar out of `choices`, differentiable where it learns."""

    @abstractmethod
    def soft(self) -> float:
        """The real number behind it: what landing rounds."""

    def nearest(self, value: float) -> int:
        """The choice that a soft width rounds to; ties go to the larger."""
        return min(self.choices, key=lambda c: (abs(c - value), -c))

    def switch(self, small: int, large: int) -> float:
        """The soft width at which rounding passes from one choice to the next."""
        return (small + large) / 2

    def grid(self) -> Grid | None:
        """How training rounds while this width learns; None for the plain grid."""
        return None

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring the parameter back into its bounds after an optimiser step."""
