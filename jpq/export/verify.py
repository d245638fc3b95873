"""The law, checked: masked model == rebuilt model == exported model, on the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from jpq.compression.model import CompressedModel
from jpq.costs import LayerUse, bops, macs
from jpq.export.runtimes import Session
from jpq.methods.quantizers import act_quantizer, weight_quantizer
from jpq.tracing.forward import batch_of, call_model, eval_mode, hook_modules, tensors
from jpq.types import JpqError

OPENED = "masked_vs_rebuilt_at_landing_with_open_norms"  # measured, where the law cannot hold

EXACT = 1e-9  # largest relative difference in float64 of two models that compute the same

RARE = 0.005  # share of decisions (of an image's class) that may change at a rounding boundary

GAP = 0.1  # share of the output range within which outputs without classes agree

CLOSE = 1e-3  # relative difference in float32 below which no rounding boundary was crossed

Pair = tuple[Any, Any]  # (a batch: a tensor, a tuple or a dict; its labels, which nobody reads here)


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, x: Any) -> float:
    """Largest relative difference of two models' outputs in float64, evaluation mode; they are not changed."""
    pairs = zip(*(tensors(call_model(copy.deepcopy(m).double().eval(), _wide(x))) for m in (one, other)), strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs)


def _wide(x: Any) -> Any:
    return tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, x)


@torch.no_grad()
def compare(one: Callable[..., Any], other: Callable[..., Any], batches: Iterable[Pair]) -> dict[str, Any]:
    """How far apart two models are on every sample, in float32.

    A sample differs "at a boundary" where its outputs are further apart than rounding of sums explains: somewhere a
    value sat so near to the middle of two quantization levels that the order of a sum decided which. Classes are
    compared along dim 1: one decision per sample of [B, classes], one per place of [B, classes, H, W]. An output
    without classes decides nothing, and agrees where it is within a tenth of its range.
    """
    images = decisions = agree = boundary = 0
    largest = worst_gap = 0.0
    for x, _ in batches:
        pairs = [[t.detach().cpu().float() for t in tensors(call_model(m, x))] for m in (one, other)]
        apart = torch.stack([_apart(a, b) for a, b in zip(*pairs, strict=True)]).amax(0)
        images, boundary = images + len(apart), boundary + int((apart > CLOSE).sum())
        largest = max(largest, float(apart.max()))
        for a, b in zip(*pairs, strict=True):
            same, gap = _decided(a, b)
            decisions, agree = decisions + same.numel(), agree + int(same.sum())
            if not bool(same.all()):
                worst_gap = max(worst_gap, float(gap[~same].max()))
    return {
        "images": images,
        "decisions": decisions,
        "argmax_agreement": agree / max(1, decisions),
        "argmax_differs": decisions - agree,
        "at_a_rounding_boundary": boundary,
        "largest_relative_difference": largest,
        "largest_gap_where_argmax_differs": worst_gap,
    }


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """[B]: largest difference of each sample, relative to the batch's largest output."""
    return (a - b).abs().reshape(len(a), -1).amax(1) / a.abs().amax().clamp_min(1e-30)


def _decided(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(whether each decision is the same, how clear it was as a share of the output range)."""
    if a.dim() < 2 or a.shape[1] < 2:
        apart = _apart(a, b)
        return apart <= GAP, apart
    top = a.topk(2, 1).values
    gap = (top.select(1, 0) - top.select(1, 1)) / a.abs().amax().clamp_min(1e-30)
    return a.argmax(1) == b.argmax(1), gap


def verify(masked: nn.Module, small: nn.Module, path: Path, batches: Iterable[Pair], example: Any) -> dict[str, Any]:
    """Differences between masked, rebuilt and exported model. Raises JpqError where the law is broken.

    Where channels went from inside averages that were opened, masked and rebuilt model cannot be the same: how far they
    are apart then stands under the key `OPENED`, however far that is.

    Models may take several tensors and give several: batches and example are what `jpq.trace` takes.

    Args:
        masked: the settled network; small: the rebuilt one; path: its ONNX file.
        batches: samples for the comparison in float32 and onnxruntime; example: a batch for float64.
    """
    small.eval()
    exact = difference(masked, small, example)
    opened = isinstance(masked, CompressedModel) and masked.opened > 0
    if not opened and not exact <= EXACT:
        raise JpqError(
            f"The rebuilt model is not the masked one: they differ by {exact:.2e} in float64. This is a bug in jpq."
        )
    return {OPENED if opened else "masked_vs_rebuilt_float64": exact} | exported(small, path, batches)


def exported(small: nn.Module, path: Path, batches: Iterable[Pair]) -> dict[str, Any]:
    """How far the file in onnxruntime is from the rebuilt model. Raises JpqError where rounding does not explain it.

    The promise is about the file as ONNX defines it, so onnxruntime runs it as written. How often a value then sits at
    a rounding boundary depends on the network (at 2 bits one crossing can change a class): the yardstick is the rebuilt
    model itself, in float32 against float64. onnxruntime's default optimisations replace layers by integer kernels and
    round biases to 32-bit integers for them, which crosses more boundaries; what that changes is measured beside it.
    `batches` are read three times.
    """
    written = Session(path, optimised=False)
    outside = compare(small, written, batches)
    precise = copy.deepcopy(small).double()
    first = [next(iter(batches))]
    own = compare(small, lambda *args, **kwargs: precise(*_wide(args), **_wide(kwargs)), first)
    here = compare(small, written, first)
    flips = RARE + 4 * own["argmax_differs"] / own["decisions"]
    if outside["argmax_differs"] > max(2, flips * outside["decisions"]):
        raise JpqError(
            f"onnxruntime and the rebuilt model differ: {outside['argmax_differs']} of {outside['decisions']} "
            "decisions come out differently. This is a bug in jpq or in onnxruntime."
        )
    crossed = 2.5 * own["at_a_rounding_boundary"] + 0.05 * own["images"] + 1
    if here["at_a_rounding_boundary"] > crossed:
        raise JpqError(
            f"onnxruntime and the rebuilt model differ on {here['at_a_rounding_boundary']} of {here['images']} images, "
            f"float32 and float64 of the rebuilt model on {own['at_a_rounding_boundary']}: this is more than rounding."
        )
    return {
        "rebuilt_vs_onnxruntime": outside,
        "rebuilt_vs_onnxruntime_optimised": compare(small, Session(path), batches),
    }


@torch.no_grad()
def measure(small: nn.Module, example: Any) -> dict[str, int]:
    """Cost of a rebuilt model's quantized layers, counted by running it: their own shapes, their quantizers' bits.

    The example is a tensor, a tuple of positional arguments, or a dict of keywords; costs are those of one sample.
    """
    uses: list[LayerUse] = []
    samples = batch_of(example)

    def count(name: str, layer: Any, x: Any, out: Tensor) -> None:
        weight = layer.weight
        at = x if getattr(layer, "transposed", False) else out  # where the kernel is applied
        dim = at.dim() - weight.dim() + 1 if weight.dim() > 2 else at.dim() - 1
        batch = 1 if dim == 0 else samples  # one sample without a batch dim
        work = weight.numel() * (at.numel() // at.shape[dim]) // batch
        w, a = (round(float(q.width())) for q in (weight_quantizer(layer), act_quantizer(layer)))
        mask = getattr(layer, "mask", None)
        density = 1 if mask is None else Fraction(int(mask.sum()), mask.numel())
        uses.append(LayerUse(name, work, weight.numel(), out.shape[dim], 1, 1, density, w, a))

    layers = {n: m for n, m in small.named_modules() if hasattr(m, "weight_quant")}
    with eval_mode(small), hook_modules(layers, count):
        call_model(small, example)
    return {"bops": int(bops(uses)), "macs": int(macs(uses)), "layers": len(uses)}
