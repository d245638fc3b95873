"""Whole slices of one layer's weight: kernels, filters, input channels.

These are masks: the layer keeps its shape. Channels that leave the network for good are `Axis`, over all consumers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Size

from jpq.structures.base import Structure
from jpq.structures.layout import PLAIN, Layout, refuse_flat
from jpq.types import Units, Weight


@dataclass(frozen=True)
class Kernels(Structure):
    """A row for each output map, a unit for each kernel that it is the sum of: k of n kernels per map."""

    layout: Layout = PLAIN

    def shape(self, weight: Size) -> tuple[int, int]:
        """(outputs, inputs of a group). Raises JpqError for a linear weight."""
        groups, outputs, inputs, _ = self.layout.sides(weight)
        refuse_flat(weight, "Kernel masks", "per-output or elementwise")
        return groups * outputs, inputs

    def expand(self, z: Units, weight: Size) -> Weight:
        """Broadcasts over kernel positions."""
        groups, outputs, inputs, _ = self.layout.sides(weight)
        return self.layout.close(z.reshape(groups, outputs, inputs, 1), weight)

    def pool(self, x: Weight) -> Units:
        """Sums of kernels."""
        return self.layout.open(x).sum(3).reshape(self.shape(x.shape))

    def spec(self) -> str:
        """`kernels`."""
        return "kernels"


@dataclass(frozen=True)
class Filters(Structure):
    """One row with a unit for each output: everything that one neuron or output map reads."""

    layout: Layout = PLAIN

    def shape(self, weight: Size) -> tuple[int, int]:
        """(1, outputs)."""
        groups, outputs, *_ = self.layout.sides(weight)
        return 1, groups * outputs

    def expand(self, z: Units, weight: Size) -> Weight:
        """Broadcasts over inputs and kernel positions where it can."""
        groups, outputs, *_ = self.layout.sides(weight)
        return self.layout.close(z.reshape(groups, outputs, 1, 1), weight)

    def pool(self, x: Weight) -> Units:
        """Sums of filters."""
        return self.layout.open(x).sum((2, 3)).reshape(1, -1)

    def spec(self) -> str:
        """`filters`."""
        return "filters"


@dataclass(frozen=True)
class Inputs(Structure):
    """One row with a unit for each input channel, over all groups: every weight that reads it."""

    layout: Layout = PLAIN

    def shape(self, weight: Size) -> tuple[int, int]:
        """(1, inputs of all groups)."""
        groups, _, inputs, _ = self.layout.sides(weight)
        return 1, groups * inputs

    def expand(self, z: Units, weight: Size) -> Weight:
        """Broadcasts over outputs and kernel positions where it can."""
        groups, _, inputs, _ = self.layout.sides(weight)
        return self.layout.close(z.reshape(groups, 1, inputs, 1), weight)

    def pool(self, x: Weight) -> Units:
        """Sums over all that read a channel."""
        return self.layout.open(x).sum((1, 3)).reshape(1, -1)

    def spec(self) -> str:
        """`inputs`."""
        return "inputs"
