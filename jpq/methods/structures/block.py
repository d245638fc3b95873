"""Structures of rectangles: blocks of the weight matrix, and positions punched out of blocks of kernels.

Y. Gong et al., "Automatic Mapping of the Best-Suited DNN Pruning Schemes for Real-Time Mobile Acceleration", ACM TODAES
2022, arXiv:2111.11581 (both); G. Ding et al., SMART pruner, arXiv:2403.19969 (blocks). Sizes need not divide: blocks at
the edges are smaller, and `sizes` tells by how much.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Size

from jpq.methods.structures.base import Structure
from jpq.methods.structures.layout import PLAIN, WeightLayout, check_has_kernel, collect, grid, spread
from jpq.types import JpqError, Units, Weight


def _check_sides(kind: str, a: int | None, b: int | None) -> None:
    if any(side is not None and side < 1 for side in (a, b)):
        raise JpqError(f"{kind} {a} x {b} has no area: both sides are at least 1.")


def _sides_text(a: int | None, b: int | None) -> str:
    return "x".join("*" if side is None else str(side) for side in (a, b))


@dataclass(frozen=True)
class Block(Structure):
    """Structure of blocks: one row with a unit per `a` x `b` block of the matrix `weight.flatten(1)`.

    The column is `input channel * taps + tap`, as in torch's im2col. None spans the matrix: `Block(None, 1)` is one
    column of it over all filters (structured probabilistic pruning's unit, arXiv:1709.06994), `Block(1, b)` a row of a
    block, `Block(a, 1)` a column of a block, `Block(1, 1)` a single weight. A grouped layer has a matrix per group.
    """

    a: int | None
    b: int | None
    layout: WeightLayout = PLAIN

    def __post_init__(self) -> None:
        _check_sides("A block", self.a, self.b)

    def shape(self, weight: Size) -> tuple[int, int]:
        """One row of blocks, counted row by row of the matrix."""
        size, tile = self._tiles(weight)
        groups, down, across = grid(size, tile)
        return 1, groups * down * across

    def expand(self, z: Units, weight: Size) -> Weight:
        """Mask of the weight's shape."""
        size, tile = self._tiles(weight)
        mask = spread(z.reshape(grid(size, tile)), size, tile).expand(size)
        return self.layout.close(mask.reshape(self.layout.sides(weight)), weight)

    def pool(self, x: Weight) -> Units:
        """Sums over each block, `[1, blocks]`."""
        size, tile = self._tiles(x.shape)
        return collect(self.layout.open(x).reshape(size), tile).reshape(1, -1)

    def spec(self) -> str:
        """The text `block:AxB`, with `*` for a side that spans the matrix."""
        return f"block:{_sides_text(self.a, self.b)}"

    def _tiles(self, weight: Size) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        groups, outputs, inputs, taps = self.layout.sides(weight)
        width = inputs * taps
        return (groups, outputs, width), (1, min(self.a or outputs, outputs), min(self.b or width, width))


@dataclass(frozen=True)
class BlockPunched(Structure):
    """Block-punched structure: one row with a unit per kernel position of each `filters` x `channels` block.

    Units run over blocks of filters, blocks of channels, kernel positions, the last fastest. None spans all. A block
    never holds filters of two groups.
    """

    filters: int | None
    channels: int | None
    layout: WeightLayout = PLAIN

    def __post_init__(self) -> None:
        _check_sides("A punched block", self.filters, self.channels)

    def shape(self, weight: Size) -> tuple[int, int]:
        """One row of blocks times taps. Raises JpqError for a linear weight."""
        check_has_kernel(weight, "Punched blocks", "block:AxB")
        size, tile = self._tiles(weight)
        groups, down, across, taps = grid(size, tile)
        return 1, groups * down * across * taps

    def expand(self, z: Units, weight: Size) -> Weight:
        """Mask of the weight's shape, or one that broadcasts over a side that is spanned."""
        size, tile = self._tiles(weight)
        return self.layout.close(spread(z.reshape(grid(size, tile)), size, tile), weight)

    def pool(self, x: Weight) -> Units:
        """Sums over each position of each block, `[1, n]`."""
        return collect(self.layout.open(x), self._tiles(x.shape)[1]).reshape(1, -1)

    def spec(self) -> str:
        """The text `punched:FILTERSxCHANNELS`."""
        return f"punched:{_sides_text(self.filters, self.channels)}"

    def _tiles(self, weight: Size) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
        groups, outputs, inputs, taps = self.layout.sides(weight)
        tile = 1, min(self.filters or outputs, outputs), min(self.channels or inputs, inputs), 1
        return (groups, outputs, inputs, taps), tile
