"""How many bits."""

from jpq.quantizers.base import Grid, Width
from jpq.quantizers.dead_zone import DeadZone
from jpq.quantizers.fixed import Fixed
from jpq.quantizers.gated import Gated
from jpq.quantizers.integer import Integer, fit_threshold
from jpq.quantizers.layers import (
    act_quantizer,
    can_quantize,
    plain_layer,
    quantize_layer,
    quantize_results,
    replace_everywhere,
    result_quantizer,
    weight_quantizer,
)
from jpq.quantizers.learned import Learned
from jpq.quantizers.power_of_two import PowerOfTwo
from jpq.quantizers.squashed import Squashed

WIDTHS: dict[str, type[Width]] = {
    "fixed": Fixed, "learned": Learned, "power-of-two": PowerOfTwo, "gated": Gated, "squashed": Squashed,
}  # fmt: skip

__all__ = [
    "WIDTHS", "DeadZone", "Fixed", "Gated", "Grid", "Integer", "Learned", "PowerOfTwo", "Squashed", "Width",
    "act_quantizer", "can_quantize", "fit_threshold", "plain_layer", "quantize_layer", "quantize_results",
    "replace_everywhere", "result_quantizer", "weight_quantizer",
]  # fmt: skip
