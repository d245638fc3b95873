"""Whole slices along one axis of the weight: the channels that a layer reads (or writes)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Size, Tensor

from jpq.methods.structures.base import Structure
from jpq.methods.structures.layout import PLAIN, WeightLayout, refuse_flat
from jpq.types import NONE, JpqError, Labels, Units, Weight


@dataclass(frozen=True, eq=False)
class Axis(Structure):
    """Position p along `dim` belongs to unit `index[p]`; where that is NONE the weights always stay.

    One unit may own several positions (a channel flattened to 49 features, a concat read twice), and a layer
    that reads several sites carries one Axis for each.
    """

    dim: int
    index: Labels  # [weight.size(dim)]
    n: int

    @cached_property
    def _positions(self) -> Tensor:
        return torch.as_tensor(self.index)

    def shape(self, weight: Size) -> tuple[int, int]:
        """(1, n). Raises JpqError where the weight has another number of positions."""
        if weight[self.dim] != len(self.index):
            raise JpqError(
                f"Axis expects {len(self.index)} positions on dim {self.dim}; the weight is {tuple(weight)}."
            )
        return 1, self.n

    def expand(self, z: Units, weight: Size) -> Weight:
        """A mask that broadcasts: size 1 on every dim but `dim`."""
        always = z.new_ones(1, 1)
        index = self._positions.to(z.device)
        mask = torch.cat([z, always], 1)[0, torch.where(index == NONE, self.n, index)]
        return mask.reshape([-1 if d == self.dim else 1 for d in range(len(weight))])

    def pool(self, x: Weight) -> Units:
        """Sums over the positions of each unit: `[1, n]`."""
        sums = x.movedim(self.dim, 0).flatten(1).sum(1)
        index = self._positions.to(x.device)
        held = index != NONE
        return x.new_zeros(self.n).index_add(0, index[held], sums[held])[None]


@dataclass(frozen=True)
class Kernels(Structure):
    """A row for each output map, a unit for each kernel that it is the sum of: k of n kernels per map."""

    layout: WeightLayout = PLAIN

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

    layout: WeightLayout = PLAIN

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

    layout: WeightLayout = PLAIN

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
