"""N:M masks: N of M consecutive weights stay, such as 2:4 and 1:4.

Consecutive means input channels at one kernel position of one output: weight[o, c .. c + M - 1, y, x]. That is the
reduction dimension of an implicit matrix product in channels-last order, [out, kernel..., in], the order in which
sparse tensor cores read their operands (A. Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021,
arXiv:2104.08378), and not weight.flatten(1), where the kernel position runs fastest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Size, Tensor

from jpq.methods.structures.base import Structure
from jpq.methods.structures.layout import PLAIN, WeightLayout, pad
from jpq.types import JpqError, Units, Weight


@dataclass(frozen=True)
class Window(Structure):
    """N:M structure: a row per window of `of` input channels and a unit per weight, of which `keep` stay.

    Rows run over outputs, kernel positions, windows, the last fastest. Where `of` does not divide the inputs, the
    last window of every kernel position is shorter, as if the missing channels were zeros that the hardware pads: it
    keeps `keep` of those that exist (all, if there are no more), the rest of the row is padding. Windows neither span
    kernel positions nor groups.
    """

    unit_is_weight: ClassVar[bool] = True

    keep: int
    of: int
    layout: WeightLayout = PLAIN

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.of:
            raise JpqError(f"{self.keep}:{self.of} is not a window: keep at least 1, and fewer than all (2:4).")

    def shape(self, weight: Size) -> tuple[int, int]:
        """Rows for outputs, taps and windows, units for weights. Raises JpqError where nothing could be dropped."""
        groups, outputs, inputs, taps = self.layout.sides(weight)
        if inputs <= self.keep:
            raise JpqError(
                f"{self.spec()} drops nothing from a weight {tuple(weight)}: each output reads only {inputs} input "
                "channels at a kernel position (depthwise layers read 1). Leave this layer dense."
            )
        width = self._width(inputs)
        return groups * outputs * taps * -(-inputs // width), width

    def expand(self, z: Units, weight: Size) -> Weight:
        """Mask of the weight's shape."""
        groups, outputs, inputs, taps = self.layout.sides(weight)
        windows = z.reshape(groups, outputs, taps, -1).narrow(3, 0, inputs)
        return self.layout.close(windows.transpose(2, 3), weight)

    def pool(self, x: Weight) -> Units:
        """Weights, cut into windows; 0 in the padding."""
        last = self.layout.open(x).transpose(2, 3)
        width = self._width(last.shape[3])
        return pad(last, 3, width).reshape(-1, width)

    def valid(self, weight: Size) -> Tensor | None:
        """False behind the last input channel."""
        rows, width = self.shape(weight)
        inputs = self.layout.sides(weight)[2]
        if inputs % width == 0:
            return None
        windows = -(-inputs // width)
        row = torch.arange(windows * width).reshape(windows, width) < inputs
        return row.repeat(rows // windows, 1)

    def quota(self) -> int | None:
        """Number of units that stay in a window: `keep`."""
        return self.keep

    def spec(self) -> str:
        """The text `N:M`."""
        return f"{self.keep}:{self.of}"

    def _width(self, inputs: int) -> int:
        return min(self.of, inputs)
