"""NVIDIA's ModelOpt: mtq.quantize with bits of integers for each layer, then training.

Scales minimize the squared error: those of weights by the tool's algorithm, those of inputs by trying ranges here, as
version 0.47.0 mixes up its arguments where its histograms do (HistogramCalibrator.compute_amax("mse")). The tool learns
scales for none of its integer formats, so they stay as calibration left them. Its search over formats (auto_quantize)
counts bits of weights, not bit-operations, so widths are those of the brevitas baseline: one pair for the body, one for
both ends.

Works with nvidia-modelopt 0.47.0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from torch import Tensor, nn

from support.tools.job import Job, Small, Widths, inputs_of, layer_names
from support.tools.plain_brevitas import choose_widths


def quantizer_config(widths: Widths, signed: str) -> dict[str, Any]:
    """The tool's configuration; inputs of layers other than `signed` are positive."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, (w_bits, a_bits) in widths.items():
        weights = {"num_bits": w_bits, "axis": 0}
        inputs = {"num_bits": a_bits, "axis": None, "unsigned": name != signed}
        entries.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": weights})
        entries.append({"quantizer_name": f"{name}.input_quantizer", "cfg": inputs})
    return {"quant_cfg": entries, "algorithm": {"method": "mse"}}


@torch.no_grad()
def fit_inputs(net: nn.Module, float_net: nn.Module, x: Tensor, names: Iterable[str]) -> None:
    """Set the ranges of the layers' inputs so that the tool's quantizers err least on images [N, 3, 32, 32]."""
    for name, value in inputs_of(float_net, x, names).items():
        quantizer: Any = net.get_submodule(f"{name}.input_quantizer")
        errors = {}
        for amax in torch.linspace(0.025, 1, 40) * quantizer.amax:
            quantizer.amax = amax
            errors[float(amax)] = float((quantizer(value) - value).square().mean())
        quantizer.amax = torch.tensor(min(errors, key=errors.__getitem__))


def quantized(job: Job, widths: Widths) -> nn.Module:
    """The network with the tool's quantizers, calibrated."""

    def calibrate(net: nn.Module) -> None:
        for x in job.calibration():
            net(x)

    first = layer_names(job.float_net)[0]  # images are signed once they are normalized; all else is behind a ReLU
    net: nn.Module = mtq.quantize(job.fresh(), quantizer_config(widths, first), calibrate)
    fit_inputs(net, job.fresh(), next(job.calibration()), widths)
    return net


def run(job: Job) -> Small:
    """Train at fixed widths within the target."""
    widths = choose_widths(job)
    net = job.fit(quantized(job, widths))
    first, body = ("/".join(map(str, widths[name])) for name in layer_names(job.float_net)[:2])
    return Small(net, widths, f"body {body}, ends {first} bits, scales by least squared error")
