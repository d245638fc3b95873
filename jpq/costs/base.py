"""What it spends: one record per layer, read by the loss (tensors) and by the report (exact fractions) alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Number = Any  # Tensor while training; int or Fraction in a report: the same arithmetic

DENSE = "dense"  # the scheme of a layer without a mask


class LatencyModel(Protocol):
    """How long one layer takes, read from a table of measurements."""

    def __call__(
        self, inputs: Number, outputs: Number, density: Number, w_bits: Number, a_bits: Number, scheme: str
    ) -> Number:
        """Nanoseconds of one sample; the arguments are those of `LayerUse`."""

    def measured(self, scheme: str) -> bool:
        """Whether the table says how fast masks of this scheme run."""


@dataclass(frozen=True)
class LayerUse:
    """What one layer uses now."""

    name: str
    macs: int  # dense multiply-accumulates of one sample
    weights: int  # dense number of weights
    outputs_all: int  # dense number of output channels
    inputs: Number  # share of input channels kept, in [0, 1] (1 for depthwise layers: their cost is linear)
    outputs: Number  # share of output channels kept, in [0, 1]
    density: Number  # share of the remaining weights that a mask keeps, in [0, 1]
    w_bits: Number
    a_bits: Number  # of the layer's input
    mask_bits: Number = 0  # what it takes to store which weights stay
    regular: bool = True  # whether devices are known that skip what the mask drops
    scheme: str = DENSE  # what the mask's units are, as `jpq.methods.structures.parse` reads it
    clock: LatencyModel | None = None  # where a table of latencies was given


Cost = Callable[[Sequence[LayerUse]], Number]
