"""Whether an ONNX file computes what the model does for the example that it was exported with.

torch.onnx loses some changes in place of tensors that share their memory, and says nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from jpq.export.onnx.free_batch import LEAST, SAME, TIMES, file_outputs, mean_difference
from jpq.tracing.forward import collect_tensors

NUDGE = 1e-5  # relative change of inputs, by which as many values cross a rounding boundary as by rounding, or more


@torch.no_grad()
def computes_example(path: Path, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a file's outputs for the example are those of the model, but for what rounding moves.

    True, too, where the model's own outputs differ as much between runs on inputs that hardly differ (low bits in deep
    networks, random numbers), and where onnxruntime cannot run the file at all.
    """
    example = (args, dict(kwargs))
    found = file_outputs(path, example)
    if found is None:
        return True
    expected = _model_outputs(model, example)
    difference = _difference(expected, found)
    if difference <= SAME:
        return True
    nudged = _model_outputs(model, tree_map(lambda v: v * (1 + NUDGE) if _is_fraction(v) else v, example))
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
    """The model's output tensors on the CPU; the example is copied, as some code writes into its input."""
    args, kwargs = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, example)
    return [t.detach().cpu() for t in collect_tensors(model(*args, **kwargs))]


def _is_fraction(value: Any) -> bool:
    """Whether a value is a tensor of fractions."""
    return isinstance(value, Tensor) and value.is_floating_point()
