"""The contract of a structure: the linear map between the units of a gate and the weights of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Size, Tensor

from jpq.methods.structures.layout import PLAIN, WeightLayout
from jpq.types import JpqError, Units, Weight


class Structure(ABC):
    """Linear map from a mask over units to a mask over weights (affine, where some weights always stay).

    Units are laid out `[rows, n]`: the n units of a row compete with each other, rows do not.
    `pool` is the adjoint of `expand`: `<expand(z) - expand(0), x> == <z, pool(x)>` for every z and x.

    Rows all have n units. Where a row stands for fewer (the last window of 3 inputs cut into fours), the rest are
    padding: they stand for no weight, `expand` ignores them, `pool` gives 0 there, and `valid` is False. Code that
    ranks or counts units must leave them out.
    """

    partition: ClassVar[bool] = True  # each weight belongs to at most one unit, and expand(1) is 1 everywhere
    # False: units of a row overlap, and at most one of them may be kept

    regular: ClassVar[bool] = True  # whether some devices skip the weights that it drops
    unit_is_weight: ClassVar[bool] = False  # a unit is one weight

    layout: WeightLayout = PLAIN  # whether the layer is transposed, and its groups

    @abstractmethod
    def shape(self, weight: Size) -> tuple[int, int]:
        """Rows and units per row for a weight of this size. Raises JpqError, with the reason, where it does not fit."""

    @abstractmethod
    def expand(self, z: Units, weight: Size) -> Weight:
        """Mask of the weight's shape (or one that broadcasts to it) from `[rows, n]` units."""

    @abstractmethod
    def pool(self, x: Weight) -> Units:
        """Sum of a weight-shaped x over the weights of each unit, `[rows, n]`."""

    def valid(self, weight: Size) -> Tensor | None:
        """Bool `[rows, n]`, False for padding, which is where `sizes(weight)` is 0; None where no unit is padding."""
        return None

    def sizes(self, weight: Size) -> Units:
        """Number of weights in each unit, `[rows, n]`: `pool(1)`. Ragged edges have smaller units."""
        return self.pool(torch.ones(weight))

    def quota(self) -> int | None:
        """Number of units of each row that stay, where the structure prescribes it (2 of 2:4); else None."""
        return None

    def spec(self) -> str:
        """Text that `parse` turns into this structure again, its layout aside."""
        raise JpqError(f"{type(self).__name__} is made from a traced network and cannot be written as text.")
