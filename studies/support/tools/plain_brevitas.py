"""Quantization-aware training with brevitas's own layers: one pair of widths for the body, one for both ends.

What a user of brevitas writes without a search: layers replaced by their quantized forms, calibration on 500 images,
training. Scales are those of its quantizers of least squared error (`...FloatMSE`): of weights per output channel,
searched anew in every step, of inputs per tensor, learned from there. With scales learned from the largest weight,
2.3 points were lost on held-out images of a short trial. Of all bodies with 2 to 8 bits and ends with 4 to 8 bits
(inputs as wide as weights or one bit wider), the costliest that keeps to the target.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from brevitas import nn as qnn
from brevitas.graph.calibrate import calibration_mode
from brevitas.quant import Int8ActPerTensorFloatMSE, Int8WeightPerChannelFloatMSE, Uint8ActPerTensorFloatMSE
from torch import nn

from jpq.types import JpqError
from support.tools.job import FLOAT_BITS, Job, Small, Widths, count_macs, layer_names


def choose_widths(job: Job) -> Widths:
    """Bits of each layer: the costliest pair of a body and of ends that keeps to the target."""
    macs = count_macs(job.float_net, job.sample())
    first, *body, last = layer_names(job.float_net)

    def candidates() -> Iterator[Widths]:
        for ends in range(4, 9):
            for w in range(2, 9):
                for a in (w, w + 1):
                    yield {**dict.fromkeys(body, (w, a)), first: (ends, 8), last: (ends, 8)}

    def share(widths: Widths) -> float:
        return sum(macs[n] * w * a for n, (w, a) in widths.items()) / (sum(macs.values()) * FLOAT_BITS**2)

    fitting = [c for c in candidates() if share(c) <= job.target]
    if not fitting:
        raise JpqError(f"A body of 2 bits and ends of 4 cost more than {job.target:.3%}: give a larger target.")
    return max(fitting, key=share)


def quantized(net: nn.Module, widths: Widths, signed: frozenset[str]) -> nn.Module:
    """The network with brevitas's layers in place of its own, in place; inputs of layers not `signed` are positive."""
    for name, (w_bits, a_bits) in widths.items():
        layer = net.get_submodule(name)
        quantizers = {
            "weight_quant": Int8WeightPerChannelFloatMSE,
            "weight_bit_width": w_bits,
            "input_quant": Int8ActPerTensorFloatMSE if name in signed else Uint8ActPerTensorFloatMSE,
            "input_bit_width": a_bits,
            "bias": layer.bias is not None,
        }
        new: nn.Module
        if isinstance(layer, nn.Conv2d):
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
            strides = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
            new = qnn.QuantConv2d(*sizes, **strides, **quantizers)
        else:
            assert isinstance(layer, nn.Linear)
            new = qnn.QuantLinear(layer.in_features, layer.out_features, **quantizers)
        new.load_state_dict(layer.state_dict(), strict=False)
        net.set_submodule(name, new)
    return net


def run(job: Job) -> Small:
    """Train at fixed widths within the target."""
    widths = choose_widths(job)
    first = layer_names(job.float_net)[0]  # images are signed once they are normalized; all else is behind a ReLU
    net = quantized(job.fresh(), widths, frozenset([first]))
    net.eval()
    with torch.no_grad(), calibration_mode(net):
        for x in job.calibration():
            net(x)
    job.fit(net)
    body = next(pair for name, pair in widths.items() if name != first)
    return Small(net, widths, f"body {body[0]}/{body[1]}, ends {widths[first][0]}/{widths[first][1]} bits")
