"""The law, checked: masked model == rebuilt model == exported model, on the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jpq.costs import LayerUse, bops, macs
from jpq.exporters.onnx import Session
from jpq.quantizers import act_quantizer, weight_quantizer
from jpq.types import JpqError

EXACT = 1e-9  # largest relative difference in float64 of two models that compute the same
RARE = 0.005  # share of images whose class may change at a rounding boundary
CLOSE = 1e-3  # relative difference in float32 below which no rounding boundary was crossed

Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    """Largest relative difference of two models' outputs in float64, evaluation mode; they are not changed."""
    a, b = (copy.deepcopy(m).double().eval()(x.double()) for m in (one, other))
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))


@torch.no_grad()
def compare(
    one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], batches: Iterable[Pair]
) -> dict[str, Any]:
    """How far apart two models are on every sample, in float32.

    A sample differs "at a boundary" where its outputs are further apart than rounding of sums explains: somewhere a
    value sat so near to the middle of two quantization levels that the order of a sum decided which.
    """
    images = agree = boundary = 0
    largest = worst_gap = 0.0
    for x, _ in batches:
        a, b = one(x).detach().cpu(), other(x).detach().cpu()
        apart = (a - b).abs().amax(1) / a.abs().amax().clamp_min(1e-30)
        same = a.argmax(1) == b.argmax(1)
        top = a.topk(2, 1).values
        gap = (top[:, 0] - top[:, 1]) / a.abs().amax().clamp_min(1e-30)
        images, agree, boundary = images + len(a), agree + int(same.sum()), boundary + int((apart > CLOSE).sum())
        largest = max(largest, float(apart.max()))
        if not bool(same.all()):
            worst_gap = max(worst_gap, float(gap[~same].max()))
    return {
        "images": images,
        "argmax_agreement": agree / max(1, images),
        "argmax_differs": images - agree,
        "at_a_rounding_boundary": boundary,
        "largest_relative_difference": largest,
        "largest_gap_where_argmax_differs": worst_gap,
    }


def verify(masked: nn.Module, small: nn.Module, path: Path, batches: Iterable[Pair], example: Tensor) -> dict[str, Any]:
    """Differences between masked, rebuilt and exported model. Raises JpqError where the law is broken.

    How often a value sits at a rounding boundary depends on the network (at 2 bits one crossing can change a class), so
    the yardstick is the rebuilt model itself, in float32 against float64: onnxruntime may not differ far more often.

    Args:
        masked: the settled network; small: the rebuilt one; path: its ONNX file.
        batches: samples for the comparison in float32 and onnxruntime, read twice; example: a batch for float64.
    """
    small.eval()
    exact = difference(masked, small, example)
    if not exact <= EXACT:
        raise JpqError(
            f"The rebuilt model is not the masked one: they differ by {exact:.2e} in float64. This is a bug in jpq."
        )
    session = Session(path)
    outside = compare(small, session, batches)
    precise = copy.deepcopy(small).double()
    first = [next(iter(batches))]
    own = compare(small, lambda x: precise(x.double()).float(), first)
    here = compare(small, session, first)
    if outside["argmax_differs"] > max(2, RARE * outside["images"]):
        raise JpqError(
            f"onnxruntime and the rebuilt model differ: {outside['argmax_differs']} of {outside['images']} images get "
            "another class. This is a bug in jpq or in onnxruntime."
        )
    if here["at_a_rounding_boundary"] > 4 * own["at_a_rounding_boundary"] + 0.05 * own["images"] + 1:
        raise JpqError(
            f"onnxruntime and the rebuilt model differ on {here['at_a_rounding_boundary']} of {here['images']} images, "
            f"float32 and float64 of the rebuilt model on {own['at_a_rounding_boundary']}: this is more than rounding."
        )
    return {"masked_vs_rebuilt_float64": exact, "rebuilt_vs_onnxruntime": outside, "rebuilt_vs_its_float64": own}


@torch.no_grad()
def measure(small: nn.Module, example: Tensor) -> dict[str, int]:
    """Cost of a rebuilt model's quantized layers, counted by running it: their own shapes, their quantizers' bits."""
    uses: list[LayerUse] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], out: Tensor) -> None:
            weight = layer.weight
            at = args[0] if getattr(layer, "transposed", False) else out  # where the kernel is applied
            positions = at.numel() // at.shape[0] // (at.shape[-1] if weight.dim() == 2 else at.shape[1])
            w, a = (round(float(q.width())) for q in (weight_quantizer(layer), act_quantizer(layer)))
            mask = getattr(layer, "mask", None)
            density = 1 if mask is None else Fraction(int(mask.sum()), mask.numel())
            uses.append(LayerUse(name, weight.numel() * positions, weight.numel(), out.shape[1], 1, 1, density, w, a))

        return hook

    layers: Sequence[tuple[str, Any]] = [(n, m) for n, m in small.named_modules() if hasattr(m, "weight_quant")]
    handles = [m.register_forward_hook(watch(n)) for n, m in layers]
    training = small.training
    try:
        small.eval()(example)
    finally:
        small.train(training)
        for handle in handles:
            handle.remove()
    return {"bops": int(bops(uses)), "macs": int(macs(uses)), "layers": len(uses)}
