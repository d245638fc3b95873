"""How many bits."""

from jpq.quantizers.base import Grid, Width
from jpq.quantizers.fixed import Fixed
from jpq.quantizers.gated import Gated
from jpq.quantizers.integer import Integer, fit_threshold
from jpq.quantizers.layers import act_quantizer, can_quantize, quantize_layer, replace_everywhere, weight_quantizer
from jpq.quantizers.learned import Learned
from jpq.quantizers.power_of_two import PowerOfTwo

WIDTHS: dict[str, type[Width]] = {"fixed": Fixed, "learned": Learned, "power_of_two": PowerOfTwo, "gated": Gated}

__all__ = [
    "WIDTHS", "Fixed", "Gated", "Grid", "Integer", "Learned", "PowerOfTwo", "Width", "act_quantizer", "can_quantize",
    "fit_threshold", "quantize_layer", "replace_everywhere", "weight_quantizer",
]  # fmt: skip
