"""Where zeros may lie: the linear map between the units of a gate and the weights they stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Size

from jpq.types import Units, Weight


class Structure(ABC):
    """Linear (affine, where some weights always stay) map between a mask over units and a mask over weights.

    Units are laid out `[rows, n]`: the n units of a row compete with each other, rows do not.
    `pool` is the adjoint of `expand`: `<expand(z) - expand(0), x> == <z, pool(x)>` for every z and x.
    """

    @abstractmethod
    def shape(self, weight: Size) -> tuple[int, int]:
        """(rows, n) for a weight of this size."""

    @abstractmethod
    def expand(self, z: Units, weight: Size) -> Weight:
        """Mask of the weight's shape (or one that broadcasts to it) from `[rows, n]` units."""

    @abstractmethod
    def pool(self, x: Weight) -> Units:
        """Weight-shaped x, summed over the weights of each unit: `[rows, n]`."""
