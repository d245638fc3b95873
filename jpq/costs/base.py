"""`LayerUse`, the record from which every cost is computed: shares and bits of one layer, soft or exact.

The loss fills it with tensors and the report with exact fractions; the cost functions are the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from jpq.types import DENSE

Number = Any  # Tensor while training; int or Fraction in a report


Part = Literal["layer", "product", "table"]  # products of computed tensors have no weights, tables make no products


class LatencyModel(Protocol):
    """The latency of one layer as a function of its use, read from a table of measurements."""

    def __call__(
        self, inputs: Number, outputs: Number, density: Number, w_bits: Number, a_bits: Number, scheme: str
    ) -> Number:
        """Nanoseconds of one sample; the arguments are the fields of `LayerUse`."""

    def measured(self, scheme: str) -> bool:
        """Whether the table has measured times of masks of this scheme."""


@dataclass(frozen=True)
class LayerUse:
    """The resources that one layer, product or table uses under the present decisions."""

    name: str
    macs: int  # multiply-accumulates of one sample, nothing pruned
    weights: int  # number of weights, nothing pruned
    outputs_all: int  # number of output channels, nothing pruned
    inputs: Number  # share of input channels kept, in [0, 1]; 1 for depthwise layers, whose cost is linear
    outputs: Number  # share of output channels kept, in [0, 1]
    density: Number  # share of the remaining weights that a mask keeps, in [0, 1]
    w_bits: Number
    a_bits: Number  # of the layer's input
    mask_bits: Number = 0  # bits that store the mask
    regular: bool = True  # whether known devices skip the weights that the mask drops
    scheme: str = DENSE  # structure of the mask, as `jpq.methods.structures.parse_structure` reads it
    clock: LatencyModel | None = None  # the layer's latency model, where a latency table was given
    positions: Number = 1  # share of positions kept, in [0, 1]: they cost work and no weights (heads, if dims)
    part: Part = "layer"


Cost = Callable[[Sequence[LayerUse]], Number]
