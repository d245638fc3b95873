"""Where zeros may lie: the linear map between the units of a gate and the weights they stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Size, Tensor

from jpq.methods.structures.layout import PLAIN, WeightLayout
from jpq.types import JpqError, Units, Weight


class Structure(ABC):
    """Linear (affine, where some weights always stay) map between a mask over units and a mask over weights.

    Units are laid out `[rows, n]`: the n units of a row compete with each other, rows do not.
    `pool` is the adjoint of `expand`: `<expand(z) - expand(0), x> == <z, pool(x)>` for every z and x.

    Rows all have n units. Where a row stands for fewer (the last window of 3 inputs cut into fours), the rest are
    padding: they stand for no weight, `expand` ignores them, `pool` gives 0 there, and `valid` is False. Whoever
    ranks or counts units must leave them out.
    """

    partition: ClassVar[bool] = True  # each weight belongs to at most one unit, and expand(1) is 1 everywhere
    # False: units of a row overlap, and at most one of them may be kept

    regular: ClassVar[bool] = True  # whether devices are known that skip what it drops
    single_weights: ClassVar[bool] = False  # a unit is one weight

    layout: WeightLayout = PLAIN  # what the weight's size does not tell of its layer

    @abstractmethod
    def shape(self, weight: Size) -> tuple[int, int]:
        """(rows, n) for a weight of this size. Raises JpqError where the structure makes no sense, with the reason."""

    @abstractmethod
    def expand(self, z: Units, weight: Size) -> Weight:
        """Mask of the weight's shape (or one that broadcasts to it) from `[rows, n]` units."""

    @abstractmethod
    def pool(self, x: Weight) -> Units:
        """Weight-shaped x, summed over the weights of each unit: `[rows, n]`."""

    def valid(self, weight: Size) -> Tensor | None:
        """Bool `[rows, n]`, False for padding; None where no unit is padding. The same as `sizes(weight) > 0`."""
        return None

    def sizes(self, weight: Size) -> Units:
        """How many weights each unit stands for, `[rows, n]`: `pool(1)`. Ragged edges have smaller units."""
        return self.pool(torch.ones(weight))

    def quota(self) -> int | None:
        """How many units of each row stay, where the structure itself says so (2 of 2:4); None where it is free."""
        return None

    def spec(self) -> str:
        """The text that `jpq.methods.structures.parse` turns into this structure again, layout aside."""
        raise JpqError(f"{type(self).__name__} is made from a traced network and cannot be written as text.")
