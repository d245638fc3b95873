"""Sensitivity of the loss to the bit-width of each tensor, and the widths that follow from it.

Second order, with the diagonal of the Fisher information F for the Hessian and labels drawn from the model itself:

    rise(t, b) = 1/2 * sum_i F_i * (Q_b(x_i) - x_i)^2        nats per sample

over the elements of a layer's weight (t = (layer, "w"); F_i: the squared gradient of a batch's mean loss, times the
batch) or of its input (t = (layer, "a"); F_i: the squared gradient of each sample's loss, summed over the elements and
averaged over samples). Source of the criterion: B. Zandonati et al., "FIT: A Metric for Model Sensitivity",
arXiv:2210.08502; of Fisher for Hessian: Z. Dong et al., HAWQ, arXiv:1905.03696 (which uses the largest eigenvalue).

With rise ~ S_t * 4^-b and a cost that grows by c_t per bit, the least rise at a given cost has
b_t = 1/2 * log2(S_t / c_t) + a constant for all tensors: the shift that discretization chooses.

The law 4^-b is rough: measured ratios are 3 to 4 per bit from 2 to 4 bits, near 1 above 6, and more than 10 where a
layer breaks. One probe is enough for a baseline; `--method measured` measures every width instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jpq.compression.model import CompressedModel
from jpq.methods.quantizers import BitWidth, IntegerQuantizer, Learned, fit_threshold, fit_weight_grid
from jpq.methods.quantizers.uniform_integer import quantize_tensor
from jpq.plan import Plan
from jpq.tracing.forward import call_model, eval_mode, hook_modules
from jpq.tracing.missing_gradients import name_missing_gradient
from jpq.types import JpqError

Bounds = tuple[int, int]  # smallest and largest width, in bits

Key = tuple[str, str]  # (layer, "w" | "a")

PROBE_BITS = 4  # width at which the noise is measured; other widths follow as 4^-b

SMALLEST_RISE = 1e-12  # nats: a tensor whose noise does not change the loss


def sensitivities(
    net: CompressedModel, batches: Iterable[Any], seed: int = 0, bits: int = PROBE_BITS
) -> dict[Key, float]:
    """S_t = rise(t, bits) * 4^bits, in nats, for every tensor whose width can be chosen; the model is not changed.

    Args:
        net: attached, at widths with little noise of their own (8 bits); its output is `[batch, classes]`.
        batches: inputs of the model.
        seed: seeds the draw of labels.

    Raises JpqError where the model does not give class scores.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = _quantizers(net)
    ranges = {key: _fitted_range(net, key, module, bits) for key, module in modules.items()}
    rises = dict.fromkeys(modules, 0.0)
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}  # quantizer -> (input, output) of each of its calls

    def record(name: str, _: nn.Module, x: Any, out: Any) -> None:
        if out[0].requires_grad:
            out[0].retain_grad()
            calls.setdefault(name, []).append((x.detach(), out[0]))

    count = 0
    for batch in batches:
        calls.clear()
        with eval_mode(net), hook_modules({"/".join(key): module for key, module in modules.items()}, record):
            logits = call_model(net, batch)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise JpqError(
                "Bits by noise need a model that gives one row of class scores per sample. Choose --allocator uniform."
            )
        labels = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[:, 0].to(logits.device)
        net.zero_grad()
        with name_missing_gradient():
            F.cross_entropy(logits, labels).backward()
        for key, module in modules.items():
            threshold, side = ranges[key]
            for x, gradient in _gradients(key, calls.get("/".join(key), ())):
                error = quantize_tensor(x, threshold, bits, module.signed, side) - x
                rises[key] += 0.5 * len(logits) * float((gradient * error).square().sum())
        count += 1
    net.zero_grad()
    return {key: max(total / max(1, count), SMALLEST_RISE) * 4.0**bits for key, total in rises.items()}


def _gradients(key: Key, calls: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """(value, gradient) pairs of a tensor: one for each call that the loss depends on, of a weight one for all."""
    pairs = [(x, out.grad) for x, out in calls if out.grad is not None]
    if key[1] == "w" and pairs:
        return [(pairs[0][0], torch.stack([gradient for _, gradient in pairs]).sum(0))]
    return pairs


def bits_by_noise(
    net: CompressedModel, noise: Mapping[Key, float], plan: Plan, w_bits: Bounds, a_bits: Bounds
) -> dict[Key, BitWidth]:
    """Soft widths with the least rise of the loss per bit-operation, for discretization to shift.

    Bit-operations are a product of the two widths of a layer, so the cost of a bit of one tensor depends on the width
    of the other: a few rounds converge.

    Args:
        noise: tensor -> S_t (`sensitivities`).
        plan: the units that are kept.
    """
    macs = {use.name: float(use.macs * use.inputs * use.outputs * use.density) for use in net.exact_usage(plan)}
    level = {key: 4.0 for key in noise}
    for _ in range(4):
        ideal = {}
        for (layer, side), value in noise.items():
            other_width = level.get((layer, "a" if side == "w" else "w"), float(plan.layers[layer].a_bits))
            ideal[layer, side] = 0.5 * math.log2(value / (macs[layer] * other_width))
        middle = sum(ideal.values()) / max(1, len(ideal))
        low, high = min(w_bits[0], a_bits[0]), max(w_bits[1], a_bits[1])
        level = {key: min(max(4.0 + value - middle, low), high) for key, value in ideal.items()}
    bounds = {"w": w_bits, "a": a_bits}
    return {key: Learned(4.0 + value - middle, *bounds[key[1]]) for key, value in ideal.items()}


def _quantizers(net: CompressedModel) -> dict[Key, IntegerQuantizer]:
    """The quantizers of every quantized layer, but that of the image, whose width is fixed."""
    quantizers: dict[Key, IntegerQuantizer] = {}
    for layer in net.network.layers:
        pair = net.quantizers(layer.name)
        if pair:
            quantizers[layer.name, "w"] = pair[0]
            if not layer.reads_input:
                quantizers[layer.name, "a"] = pair[1]
    return quantizers


def _fitted_range(net: CompressedModel, key: Key, module: IntegerQuantizer, bits: int) -> tuple[Tensor, Tensor | None]:
    """(range, side) that discretization would fit at this width."""
    layer, side = key
    if side == "w":
        weight = net.layer(layer).weight.detach()
        return fit_weight_grid(weight, bits, module.log_threshold.dim() > 0, module.all_levels)
    samples = net.calibration_samples.get(layer)
    if samples is None:
        return module.threshold.detach(), None
    return fit_threshold(samples, bits, module.signed, False), None
