"""Structures of whole slices along one axis of the weight: channels, kernels, filters, inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Size, Tensor

from jpq.methods.structures.base import Structure
from jpq.methods.structures.layout import PLAIN, WeightLayout, check_has_kernel
from jpq.types import NONE, JpqError, Labels, Units, Weight


@dataclass(frozen=True, eq=False)
class Axis(Structure):
    """Channels that a layer reads or writes, as slices: position p along `dim` belongs to unit `index[p]`.

    Where `index` is NONE the weights always stay.

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
        """One row of n units. Raises JpqError where the weight has another number of positions."""
        if weight[self.dim] != len(self.index):
            raise JpqError(
                f"Axis expects {len(self.index)} positions on dim {self.dim}; the weight is {tuple(weight)}."
            )
        return 1, self.n

    def expand(self, z: Units, weight: Size) -> Weight:
        """Mask that broadcasts: size 1 on every dim but `dim`."""
        always = z.new_ones(1, 1)
        index = self._positions.to(z.device)
        mask = torch.cat([z, always], 1)[0, torch.where(index == NONE, self.n, index)]
        return mask.reshape([-1 if d == self.dim else 1 for d in range(len(weight))])

    def pool(self, x: Weight) -> Units:
        """Sums over the positions of each unit, `[1, n]`."""
        sums = x.movedim(self.dim, 0).flatten(1).sum(1)
        index = self._positions.to(x.device)
        labelled = index != NONE
        return x.new_zeros(self.n).index_add(0, index[labelled], sums[labelled])[None]


@dataclass(frozen=True)
class Kernels(Structure):
    """Structure of kernels: a row per output map and a unit per kernel, k of n kernels per map."""

    layout: WeightLayout = PLAIN

    def shape(self, weight: Size) -> tuple[int, int]:
        """Rows for outputs, units for the inputs of a group. Raises JpqError for a linear weight."""
        groups, outputs, inputs, _ = self.layout.sides(weight)
        check_has_kernel(weight, "Kernel masks", "per-output or elementwise")
        return groups * outputs, inputs

    def expand(self, z: Units, weight: Size) -> Weight:
        """Mask that broadcasts over kernel positions."""
        groups, outputs, inputs, _ = self.layout.sides(weight)
        return self.layout.close(z.reshape(groups, outputs, inputs, 1), weight)

    def pool(self, x: Weight) -> Units:
        """Sums over each kernel, `[outputs, inputs]`."""
        return self.layout.open(x).sum(3).reshape(self.shape(x.shape))

    def spec(self) -> str:
        """The text `kernels`."""
        return "kernels"


@dataclass(frozen=True)
class Filters(Structure):
    """Structure of filters: one row with a unit per output, all weights of one neuron or output map."""

    layout: WeightLayout = PLAIN

    def shape(self, weight: Size) -> tuple[int, int]:
        """One row with a unit for each output."""
        groups, outputs, *_ = self.layout.sides(weight)
        return 1, groups * outputs

    def expand(self, z: Units, weight: Size) -> Weight:
        """Mask that broadcasts over inputs and kernel positions where it can."""
        groups, outputs, *_ = self.layout.sides(weight)
        return self.layout.close(z.reshape(groups, outputs, 1, 1), weight)

    def pool(self, x: Weight) -> Units:
        """Sums over each filter, `[1, outputs]`."""
        return self.layout.open(x).sum((2, 3)).reshape(1, -1)

    def spec(self) -> str:
        """The text `filters`."""
        return "filters"


@dataclass(frozen=True)
class Inputs(Structure):
    """Structure of inputs: one row with a unit per input channel of all groups, all weights that read it."""

    layout: WeightLayout = PLAIN

    def shape(self, weight: Size) -> tuple[int, int]:
        """One row with a unit for each input channel."""
        groups, _, inputs, _ = self.layout.sides(weight)
        return 1, groups * inputs

    def expand(self, z: Units, weight: Size) -> Weight:
        """Mask that broadcasts over outputs and kernel positions where it can."""
        groups, _, inputs, _ = self.layout.sides(weight)
        return self.layout.close(z.reshape(groups, 1, inputs, 1), weight)

    def pool(self, x: Weight) -> Units:
        """Sums over all weights that read a channel, `[1, inputs]`."""
        return self.layout.open(x).sum((1, 3)).reshape(1, -1)

    def spec(self) -> str:
        """The text `inputs`."""
        return "inputs"
