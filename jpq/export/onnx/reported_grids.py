"""What brevitas' exporters are told of a weight's grid that uses all levels, so that both kinds of file are exact.

They know two signed ranges of b bits, -n..n and -(n + 1)..n with n = 2^(b-1) - 1, and no -n..n + 1.

- QCDQ: the grid is reported one bit wider, with a narrow range. The integers and their scale are the same, and the Clip
  of the wider width changes none of them.
- QONNX: a channel with one more level above zero is reported with a negative scale: x / -s, rounded (half to even, so
  alike on both sides of zero), clipped to -(n + 1)..n and multiplied by -s again is exact. The Quant node keeps the
  width and holds no narrow range.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jpq.methods.quantizers import IntegerQuantizer, weight_quantizer


def report_weight_grid(layer: Any, quant_nodes: bool) -> None:
    """Let the weight proxy of a brevitas layer, in a copy made for export, report its grid as an exporter can write it.

    Args:
        layer: with a quantized weight; grids with narrow ranges stay as they are.
        quant_nodes: whether the file is QONNX; else QCDQ.
    """
    grid = weight_quantizer(layer)
    low, high = grid.integers()
    if not bool((low != -high).any()):
        return
    proxy = layer.weight_quant
    proxy.tensor_quant = _SignedScale(grid) if quant_nodes else _OneBitWider(grid)
    proxy.quant_injector = proxy.quant_injector.let(narrow_range=not quant_nodes)


class _OneBitWider(nn.Module):
    """A weight's quantizer that reports a width of one bit more."""

    def __init__(self, grid: IntegerQuantizer):
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantized x, and the scale, zero point and reported bits of its grid."""
        q, scale, zero_point, bits = self.grid(x)
        return q, scale, zero_point, bits + 1


class _SignedScale(nn.Module):
    """A weight's quantizer that reports negative scales for channels with one more level above zero."""

    def __init__(self, grid: IntegerQuantizer):
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantized x, and the reported scale, zero point and bits of its grid."""
        q, scale, zero_point, bits = self.grid(x)
        low, high = self.grid.integers()
        return q, torch.where(high > -low, -scale, scale), zero_point, bits
