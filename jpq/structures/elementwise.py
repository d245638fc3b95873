"""Single weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Size

from jpq.structures.base import Structure
from jpq.structures.layout import PLAIN, Layout
from jpq.types import Units, Weight


@dataclass(frozen=True)
class Elementwise(Structure):
    """One row of all the weights of a layer, in the order of `weight.flatten()`: they compete with each other."""

    single_weights: ClassVar[bool] = True
    regular: ClassVar[bool] = False

    layout: Layout = PLAIN  # makes no difference

    def shape(self, weight: Size) -> tuple[int, int]:
        """(1, number of weights)."""
        self.layout.sides(weight)
        return 1, weight.numel()

    def expand(self, z: Units, weight: Size) -> Weight:
        """The units themselves."""
        return z.reshape(weight)

    def pool(self, x: Weight) -> Units:
        """The weights themselves."""
        return x.reshape(1, -1)

    def spec(self) -> str:
        """`elementwise`."""
        return "elementwise"
