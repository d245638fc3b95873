"""A common view of every layer's weight, [groups, outputs, inputs, taps], and sums over its tiles.

| layer | weight | outputs, inputs (of one group) | taps |
|---|---|---|---|
| linear | [out, in] | out, in | 1 |
| conv 1d, 2d, 3d | [out, in / groups, *kernel] | out / groups, in / groups | prod(kernel), last dim fastest |
| transposed conv | [in, out / groups, *kernel] | out / groups, in / groups | the same |

An output neuron is (group, output); it reads `inputs * taps` weights. Nothing ever crosses a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch.nn.functional as F
from torch import Size, Tensor

from jpq.types import JpqError, Weight


@dataclass(frozen=True)
class WeightLayout:
    """Layout of a layer's weight beside its size: transposed or not, and the number of groups."""

    transposed: bool = False
    groups: int = 1

    def sides(self, weight: Size) -> tuple[int, int, int, int]:
        """Groups, outputs and inputs of one group, and taps. Raises JpqError for a weight that cannot be split so."""
        if not 2 <= len(weight) <= 5 or 0 in weight:
            raise JpqError(
                f"Masks need a linear or convolution layer's weight, 2 to 5 dims, none empty; this is {tuple(weight)}."
            )
        if self.groups < 1 or weight[0] % self.groups:
            raise JpqError(f"A weight of size {tuple(weight)} cannot be split into {self.groups} groups.")
        dim0, dim1 = weight[0] // self.groups, weight[1]
        outputs, inputs = (dim1, dim0) if self.transposed else (dim0, dim1)
        return self.groups, outputs, inputs, prod(weight[2:])

    def open(self, x: Weight) -> Tensor:
        """Weight as `[groups, outputs, inputs, taps]`."""
        groups, outputs, inputs, taps = self.sides(x.shape)
        if self.transposed:
            return x.reshape(groups, inputs, outputs, taps).transpose(1, 2)
        return x.reshape(groups, outputs, inputs, taps)

    def close(self, x: Tensor, weight: Size) -> Weight:
        """Inverse of `open`; dims of size 1 in `x` may stand for all, and then the result broadcasts."""
        groups, *_ = self.sides(weight)
        if self.transposed:
            x = x.transpose(1, 2)
        if x.shape[0] * x.shape[1] > 1:
            x = x.expand(groups, weight[0] // groups, -1, -1)
        kernel = weight[2:] if x.shape[3] > 1 else [1] * len(weight[2:])
        return x.reshape(x.shape[0] * x.shape[1], x.shape[2], *kernel)


PLAIN = WeightLayout()


def check_has_kernel(weight: Size, masks: str, instead: str) -> None:
    """Raise JpqError for a weight without a kernel; `masks` names those that need one, `instead` an alternative."""
    if len(weight) < 3:
        raise JpqError(
            f"{masks} need a convolution's kernels, and a linear weight {tuple(weight)} has none: use {instead}."
        )


def grid(size: Sequence[int], tile: Sequence[int]) -> list[int]:
    """Number of tiles along each dim; the last tile may be smaller."""
    return [-(-s // t) for s, t in zip(size, tile, strict=True)]


def spread(z: Tensor, size: Sequence[int], tile: Sequence[int]) -> Tensor:
    """Spread one number per tile, `grid(size, tile)`, repeated over its tile; size 1 stays where it spans the dim."""
    for d, (s, t) in enumerate(zip(size, tile, strict=True)):
        if 1 < t < s:
            z = z.unsqueeze(d + 1).expand(*z.shape[: d + 1], t, *z.shape[d + 1 :]).flatten(d, d + 1).narrow(d, 0, s)
    return z


def collect(x: Tensor, tile: Sequence[int]) -> Tensor:
    """Sum over each tile, `grid(x.shape, tile)`: the adjoint of `spread`."""
    spanned = [d for d, t in enumerate(tile) if t >= x.shape[d] > 1]
    x = x.sum(spanned, keepdim=True) if spanned else x
    for d, t in enumerate(tile):
        if t > 1 and x.shape[d] > 1:
            x = pad(x, d, t).unflatten(d, (-1, t)).sum(d + 1)
    return x


def pad(x: Tensor, dim: int, multiple: int) -> Tensor:
    """Append zeros to `dim`, up to the next multiple."""
    missing = -x.shape[dim] % multiple
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing)) if missing else x
