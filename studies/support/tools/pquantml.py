"""CERN's PQuantML: its layers with fixed-point numbers, one pair of widths for the body and one for both ends, trained.

A fixed-point number has integer and fractional bits, so steps are powers of two. There is one step per tensor: per
channel, the tool measures integer bits anew while training and gives none below 0, which is too coarse for weights far
below 1. Bits are split so that the tool's own quantizer errs least on the weights and on a batch of images. Weights end
at plus or minus the largest number: with one more negative number, 0.9 points were lost on held-out images of a short
trial, and nothing was gained by scaling each channel to fill its range, which BatchNorm undoes.

Pruning is off: it zeroes weights, which takes no multiplication away from dense layers. BatchNorm and ReLU stay torch's
and the last layer's bias has 24 bits, as both are floats with the other tools.

Works with pquant-ml 0.1.0.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"  # read when pquant is imported

import pquant
import torch
from pquant.layers import PQConv2d, PQDense
from pquant.quantizer import Quantizer
from torch import Tensor, nn

from support.tools.job import Job, Small, Widths, inputs_of, layer_names
from support.tools.plain_brevitas import choose_widths

Bits = tuple[int, int, int]  # of a fixed-point number: sign, integer, fractional; integer bits may be negative
WEIGHTS, INPUTS = "SAT_SYM", "SAT"  # how ranges end: of weights at plus or minus the largest
ROUNDING = "RND"
INTEGER_BITS = range(-6, 6)
BIAS: Bits = (1, 7, 16)


@torch.no_grad()
def fit_bits(x: Tensor, sign: int, bits: int, overflow: str) -> Bits:
    """The split of `bits` into sign, integer and fractional bits with which the tool errs least on x of any shape."""

    def error(split: Bits) -> float:
        k, i, f = split
        quantizer = Quantizer(k, i, f, overflow, ROUNDING, is_heterogeneous=False, is_data=True, dynamic_data=False)
        return float((quantizer(x) - x).square().mean())

    return min(((sign, i, bits - sign - i) for i in INTEGER_BITS), key=error)


def configuration() -> Any:
    """The tool's configuration: fixed-point numbers, one split of bits per tensor, no pruning."""
    config = pquant.pdp_config()
    config.pruning_parameters.enable_pruning = False
    config.quantization_parameters.granularity = "per_tensor"
    config.quantization_parameters.overflow_mode_parameters = WEIGHTS
    config.quantization_parameters.overflow_mode_data = INPUTS
    config.quantization_parameters.round_mode = ROUNDING
    return config


def quantized(net: nn.Module, widths: Widths, inputs: dict[str, Tensor]) -> nn.Module:
    """The network with the tool's layers in place of its own, in place."""
    config = configuration()
    for name, (w_bits, a_bits) in widths.items():
        layer = net.get_submodule(name)
        signed = int(bool((inputs[name] < 0).any()))
        bits = {
            "in_quant_bits": fit_bits(inputs[name], signed, a_bits, INPUTS),
            "weight_quant_bits": fit_bits(layer.weight, 1, w_bits, WEIGHTS),
            "bias_quant_bits": BIAS,
            "bias": layer.bias is not None,
        }
        new: Any
        if isinstance(layer, nn.Conv2d):
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
            strides = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
            new = PQConv2d(config, *sizes, **strides, **bits)
        else:
            assert isinstance(layer, nn.Linear)
            new = PQDense(config, layer.in_features, layer.out_features, **bits)
        new.load_state_dict({f"_{key}": value for key, value in layer.state_dict().items()}, strict=False)
        net.set_submodule(name, new)
    return net


def run(job: Job) -> Small:
    """Train at fixed widths within the target."""
    widths = choose_widths(job)
    net = quantized(job.fresh(), widths, inputs_of(job.fresh(), next(job.calibration()), widths))
    net(job.sample())  # the tool makes its quantizers when layers first run
    net = pquant.apply_final_compression(job.fit(net))
    first, body = ("/".join(map(str, widths[name])) for name in layer_names(job.float_net)[:2])
    return Small(net, widths, f"body {body}, ends {first} bits, fixed point")
