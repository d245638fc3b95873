"""Whole slices along one axis of the weight: the channels that a layer reads (or writes)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Size, Tensor

from jpq.structures.base import Structure
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
