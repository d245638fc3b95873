"""WIDTHS: kinds of bit-width; and the quantizer, its grids and the brevitas layers that hold it."""

from __future__ import annotations

from jpq.methods.quantizers.base import BitWidth, Grid
from jpq.methods.quantizers.brevitas_layers import (
    act_quantizer,
    can_quantize,
    is_quantized,
    plain_layer,
    quantize_layer,
    quantize_results,
    replace_and_keep_rounding,
    replace_everywhere,
    result_quantizer,
    weight_quantizer,
)
from jpq.methods.quantizers.dead_zone import DeadZoneGrid
from jpq.methods.quantizers.gated import Gated
from jpq.methods.quantizers.uniform_integer import IntegerQuantizer, fit_threshold, fit_weight_grid
from jpq.methods.quantizers.widths import Fixed, Learned, PowerOfTwo, SigmoidWidth

__all__ = [
    "WIDTHS",
    "BitWidth",
    "DeadZoneGrid",
    "Fixed",
    "Gated",
    "Grid",
    "IntegerQuantizer",
    "Learned",
    "PowerOfTwo",
    "SigmoidWidth",
    "act_quantizer",
    "can_quantize",
    "fit_threshold",
    "fit_weight_grid",
    "is_quantized",
    "plain_layer",
    "quantize_layer",
    "quantize_results",
    "replace_and_keep_rounding",
    "replace_everywhere",
    "result_quantizer",
    "weight_quantizer",
]

WIDTHS: dict[str, type[BitWidth]] = {
    "fixed": Fixed,
    "learned": Learned,
    "power-of-two": PowerOfTwo,
    "gated": Gated,
    "squashed": SigmoidWidth,
}
