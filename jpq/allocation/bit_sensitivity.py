"""What quantization noise costs: how much the loss rises when one tensor gets fewer bits.

Second order, with the diagonal of the Fisher information F for the Hessian and labels drawn from the model itself:

    rise(t, b) = 1/2 * sum_i F_i * (Q_b(x_i) - x_i)^2        nats per sample

over the elements of a layer's weight (t = (layer, "w"); F_i: the squared gradient of a batch's mean loss, times the
batch) or of its input (t = (layer, "a"); F_i: the squared gradient of each sample's loss, summed over the elements and
averaged over samples). Source of the criterion: B. Zandonati et al., "FIT: A Metric for Model Sensitivity",
arXiv:2210.08502; of Fisher for Hessian: Z. Dong et al., HAWQ, arXiv:1905.03696 (which uses the largest eigenvalue).

With rise ~ S_t * 4^-b and a cost that grows by c_t per bit, the least rise at a given cost has
b_t = 1/2 * log2(S_t / c_t) + a constant for all: what landing calls a shift.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jpq.compression.model import CompressedModel
from jpq.methods.quantizers import BitWidth, IntegerQuantizer, Learned, fit_threshold
from jpq.methods.quantizers.uniform_integer import quantized
from jpq.plan import Plan
from jpq.tracing.forward import call_model, eval_mode, hook_modules
from jpq.types import JpqError

Bounds = tuple[int, int]

Key = tuple[str, str]  # (layer, "w" | "a")

PROBE = 4  # bits at which the noise is measured; other widths follow as 4^-b

LEAST = 1e-12  # a tensor that does not matter at all


def sensitivities(net: CompressedModel, batches: Iterable[Any], seed: int = 0, bits: int = PROBE) -> dict[Key, float]:
    """S_t = rise(t, bits) * 4^bits for every tensor whose width is ours to choose, in nats; nothing is changed.

    Args:
        net: attached, at widths that hardly round (8 bits); its output is `[batch, classes]`.
        batches: inputs of the model.
        seed: draws the labels.

    Raises JpqError where the model does not give class scores.
    """
    draw = torch.Generator().manual_seed(seed)
    modules = _quantizers(net)
    ranges = {key: _range(net, key, module, bits) for key, module in modules.items()}
    found = dict.fromkeys(modules, 0.0)
    read: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, _: nn.Module, x: Any, out: Any) -> None:
        if out[0].requires_grad:
            out[0].retain_grad()
            read[name] = x.detach(), out[0]

    count = 0
    for batch in batches:
        read.clear()
        with eval_mode(net), hook_modules({"/".join(key): module for key, module in modules.items()}, keep):
            logits = call_model(net, batch)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise JpqError(
                "Bits by noise need a model that gives one row of class scores per sample. Choose --allocator uniform."
            )
        labels = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=draw)[:, 0].to(logits.device)
        net.zero_grad()
        F.cross_entropy(logits, labels).backward()
        for key, module in modules.items():
            if "/".join(key) in read:
                x, out = read["/".join(key)]
                assert out.grad is not None
                error = quantized(x, ranges[key], bits, module.signed) - x
                found[key] += 0.5 * len(logits) * float((out.grad * error).square().sum())
        count += 1
    net.zero_grad()
    return {key: max(total / max(1, count), LEAST) * 4.0**bits for key, total in found.items()}


def bits_by_noise(
    net: CompressedModel, noise: Mapping[Key, float], plan: Plan, w_bits: Bounds, a_bits: Bounds
) -> dict[Key, BitWidth]:
    """Soft widths with the least rise of the loss per bit-operation, for landing to shift; `plan`: what is kept.

    Bit-operations are a product of the two widths of a layer, so what one bit costs depends on the other's: a few
    rounds settle it.
    """
    macs = {use.name: float(use.macs * use.inputs * use.outputs * use.density) for use in net.exact_usage(plan)}
    level = {key: 4.0 for key in noise}
    for _ in range(4):
        best = {}
        for (layer, side), value in noise.items():
            other = level.get((layer, "a" if side == "w" else "w"), float(plan.layers[layer].a_bits))
            best[layer, side] = 0.5 * math.log2(value / (macs[layer] * other))
        middle = sum(best.values()) / max(1, len(best))
        low, high = min(w_bits[0], a_bits[0]), max(w_bits[1], a_bits[1])
        level = {key: min(max(4.0 + value - middle, low), high) for key, value in best.items()}
    bounds = {"w": w_bits, "a": a_bits}
    return {key: Learned(4.0 + value - middle, *bounds[key[1]]) for key, value in best.items()}


def rise(net: CompressedModel, noise: Mapping[Key, float], plan: Plan) -> float:
    """What the model of noise expects a plan's bits to add to the loss, in nats."""
    layers = plan.layers
    return sum(
        value * 4.0 ** -(layers[layer].w_bits if side == "w" else layers[layer].a_bits)
        for (layer, side), value in noise.items()
    )


def _quantizers(net: CompressedModel) -> dict[Key, IntegerQuantizer]:
    """Of every quantized layer; the image's width is given."""
    found: dict[Key, IntegerQuantizer] = {}
    for layer in net.network.layers:
        pair = net.quantizers(layer.name)
        if pair:
            found[layer.name, "w"] = pair[0]
            if not layer.reads_input:
                found[layer.name, "a"] = pair[1]
    return found


def _range(net: CompressedModel, key: Key, module: IntegerQuantizer, bits: int) -> Tensor:
    """The range that landing would fit at so many bits."""
    layer, side = key
    if side == "w":
        return fit_threshold(net.layer(layer).weight.detach(), bits, True, module.log_threshold.dim() > 0)
    seen = net.calibration_samples.get(layer)
    return module.threshold.detach() if seen is None else fit_threshold(seen, bits, module.signed, False)
