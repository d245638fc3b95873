"""Structures whose unit is a single weight: of the whole layer, or k of n for each output neuron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Size

from jpq.methods.structures.base import Structure
from jpq.methods.structures.layout import PLAIN, WeightLayout
from jpq.types import JpqError, Units, Weight


@dataclass(frozen=True)
class Elementwise(Structure):
    """Structure of single weights: one row of all weights of a layer, in the order of `weight.flatten()`."""

    unit_is_weight: ClassVar[bool] = True
    regular: ClassVar[bool] = False

    layout: WeightLayout = PLAIN  # not used: single weights lie the same in every layout

    def shape(self, weight: Size) -> tuple[int, int]:
        """One row of all weights."""
        self.layout.sides(weight)
        return 1, weight.numel()

    def expand(self, z: Units, weight: Size) -> Weight:
        """Units in the weight's shape."""
        return z.reshape(weight)

    def pool(self, x: Weight) -> Units:
        """Weights as one row."""
        return x.reshape(1, -1)

    def spec(self) -> str:
        """The text `elementwise`."""
        return "elementwise"


@dataclass(frozen=True)
class PerOutput(Structure):
    """Structure of single weights per output: a row per output neuron, k of n weights of every neuron.

    A row may be cut into equal `tiles` of consecutive weights (input channel, then kernel position), each a row of
    its own, as hardware with several memories wants. Source: dynamic probabilistic pruning, arXiv:2105.12686. Engines
    of fixed fan-in (LUT networks on FPGAs, one index memory per neuron) skip what it drops; GPUs and CPUs do not.
    """

    unit_is_weight: ClassVar[bool] = True

    tiles: int = 1
    layout: WeightLayout = PLAIN

    def shape(self, weight: Size) -> tuple[int, int]:
        """Rows for outputs times tiles, units for the weights of a tile. Raises JpqError where tiles do not divide."""
        groups, outputs, inputs, taps = self.layout.sides(weight)
        if self.tiles < 1 or inputs * taps % self.tiles:
            raise JpqError(
                f"Each output neuron of a weight {tuple(weight)} reads {inputs * taps} weights, which cannot be cut "
                f"into {self.tiles} equal tiles: choose a divisor."
            )
        return groups * outputs * self.tiles, inputs * taps // self.tiles

    def expand(self, z: Units, weight: Size) -> Weight:
        """Units in the weight's shape."""
        return self.layout.close(z.reshape(self.layout.sides(weight)), weight)

    def pool(self, x: Weight) -> Units:
        """Weights, a row for each output neuron and tile."""
        return self.layout.open(x).reshape(self.shape(x.shape))

    def spec(self) -> str:
        """The text `per-output` or `per-output:TILES`."""
        return "per-output" if self.tiles == 1 else f"per-output:{self.tiles}"
