"""One view of every kind of weight, [groups, outputs, inputs, taps], and tiles on it.

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
    """What a weight's size does not tell: whether its layer is a transposed convolution, and its groups."""

    transposed: bool = False
    groups: int = 1

    def sides(self, weight: Size) -> tuple[int, int, int, int]:
        """(groups, outputs of one, inputs of one, taps). Raises JpqError for a weight that cannot be split so."""
        if not 2 <= len(weight) <= 5 or 0 in weight:
            raise JpqError(
                f"Masks need a linear or convolution layer's weight, 2 to 5 dims, none empty; this is {tuple(weight)}."
            )
        if self.groups < 1 or weight[0] % self.groups:
            raise JpqError(f"A weight of size {tuple(weight)} cannot be split into {self.groups} groups.")
        first, second = weight[0] // self.groups, weight[1]
        outputs, inputs = (second, first) if self.transposed else (first, second)
        return self.groups, outputs, inputs, prod(weight[2:])

    def open(self, x: Weight) -> Tensor:
        """A weight as `[groups, outputs, inputs, taps]`."""
        groups, outputs, inputs, taps = self.sides(x.shape)
        if self.transposed:
            return x.reshape(groups, inputs, outputs, taps).transpose(1, 2)
        return x.reshape(groups, outputs, inputs, taps)

    def close(self, x: Tensor, weight: Size) -> Weight:
        """The inverse of `open`; dims of size 1 in `x` may stand for all, and the result broadcasts then."""
        groups, *_ = self.sides(weight)
        if self.transposed:
            x = x.transpose(1, 2)
        if x.shape[0] * x.shape[1] > 1:
            x = x.expand(groups, weight[0] // groups, -1, -1)
        kernel = weight[2:] if x.shape[3] > 1 else [1] * len(weight[2:])
        return x.reshape(x.shape[0] * x.shape[1], x.shape[2], *kernel)


PLAIN = WeightLayout()


def refuse_flat(weight: Size, what: str, instead: str) -> None:
    """Raise JpqError for a weight without a kernel: `what` is said to need one, `instead` what to use."""
    if len(weight) < 3:
        raise JpqError(
            f"{what} need a convolution's kernels, and a linear weight {tuple(weight)} has none: use {instead}."
        )


def grid(size: Sequence[int], tile: Sequence[int]) -> list[int]:
    """How many tiles lie along each dim: the last one may be smaller."""
    return [-(-s // t) for s, t in zip(size, tile, strict=True)]


def spread(z: Tensor, size: Sequence[int], tile: Sequence[int]) -> Tensor:
    """One number per tile, `grid(size, tile)`, repeated over its tile; where a tile spans the dim, size 1 stays."""
    for d, (s, t) in enumerate(zip(size, tile, strict=True)):
        if 1 < t < s:
            z = z.unsqueeze(d + 1).expand(*z.shape[: d + 1], t, *z.shape[d + 1 :]).flatten(d, d + 1).narrow(d, 0, s)
    return z


def collect(x: Tensor, tile: Sequence[int]) -> Tensor:
    """The sum over each tile, `grid(x.shape, tile)`: the adjoint of `spread`."""
    whole = [d for d, t in enumerate(tile) if t >= x.shape[d] > 1]
    x = x.sum(whole, keepdim=True) if whole else x
    for d, t in enumerate(tile):
        if t > 1 and x.shape[d] > 1:
            x = pad(x, d, t).unflatten(d, (-1, t)).sum(d + 1)
    return x


def pad(x: Tensor, dim: int, multiple: int) -> Tensor:
    """Zeros at the end of `dim`, up to the next multiple."""
    missing = -x.shape[dim] % multiple
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing)) if missing else x
