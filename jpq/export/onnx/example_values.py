"""Whether an ONNX file computes what the model does for the example that it was exported with.

torch.onnx loses some changes in place of tensors that share their memory, and says nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from jpq.export.onnx.free_batch import LEAST, SAME, TIMES, file_outputs, mean_difference
from jpq.tracing.forward import call_on_copies, collect_tensors

NUDGE = 1e-5  # relative change of what layers read: more values cross a rounding boundary by it than in a runtime


@torch.no_grad()
def computes_example(path: Path, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a file's outputs for the example are those of the model, but for what rounding moves.

    True, too, where the model's own outputs differ as much when what its layers read hardly differs (values at rounding
    boundaries of deep quantized networks, random numbers), and where onnxruntime cannot run the file at all.
    """
    example = (args, dict(kwargs))
    found = file_outputs(path, example)
    if found is None:
        return True
    expected = _model_outputs(model, example)
    difference = _difference(expected, found)
    if difference <= SAME:
        return True
    with _nudged_layers(model):
        nudged = _model_outputs(model, tree_map(_nudge, example))
    return difference <= TIMES * _difference(expected, nudged)


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """The mean difference over the mean magnitude of finite numbers; infinite where shapes or the others differ."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return math.inf
    finite = [t.isfinite() for t in expected]
    if any(not torch.equal(mask, t.isfinite()) for mask, t in zip(finite, found, strict=True)):
        return math.inf
    a, b = (
        [torch.where(m, t, torch.zeros_like(t)) for m, t in zip(finite, ts, strict=True)] for ts in (expected, found)
    )
    return mean_difference(a, b, LEAST)


def _model_outputs(model: Callable[..., Any], example: Any) -> list[Tensor]:
    """The model's output tensors on the CPU."""
    return [t.detach().cpu() for t in collect_tensors(call_on_copies(model, *example))]


@contextmanager
def _nudged_layers(model: Callable[..., Any]) -> Iterator[None]:
    """A context in which all layers with a weight read inputs that hardly differ from theirs.

    A nudge of the model's own input alone is lost where the first layer rounds it.
    """
    layers = [m for m in model.modules() if hasattr(m, "weight")] if isinstance(model, nn.Module) else []
    hooks = [layer.register_forward_pre_hook(lambda _, args: tree_map(_nudge, args)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _nudge(value: Any) -> Any:
    """A tensor of fractions with each value a little larger or smaller, always the same ones; all else as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(0)).to(value) * 2 - 1
    return value * (1 + NUDGE * noise)
