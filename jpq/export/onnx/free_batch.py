"""Whether an ONNX file takes batches of other sizes than the one that it was exported with.

torch.onnx writes what ran: of code that loops over samples, or makes a number of their count, it writes the example's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jpq.export.runtimes import Session
from jpq.tracing.forward import batch_size, call_on_copies, collect_tensors, first_samples

SAME = 0.01  # mean difference over mean magnitude: rounding boundaries move few values, a frozen count moves all

LEAST = 1e-4  # mean magnitude; equal samples that are normalised by the batch give nothing but rounding

TIMES = 3  # how often the difference at the example's own batch, as of low bits or random numbers


@torch.no_grad()
def batch_is_free(path: Path, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a file computes as the model does for another number of samples than the example has.

    By the shapes of the outputs and, but for what rounding moves, by their values. True, too, where the model itself
    takes no other number, and where onnxruntime cannot run the file at all.
    """
    example = (args, dict(kwargs))
    other = first_samples(example, 2 if batch_size(example) != 2 else 3)  # not one, which code may squeeze away
    try:
        expected = collect_tensors(call_on_copies(model, *other))
    except Exception:  # whatever the model's code raises
        return True
    found = file_outputs(path, other)
    if found is None:
        return file_outputs(path, example) is None  # the file does not run at all, which is no matter of the batch
    if [t.shape for t in found] != [t.shape for t in expected]:
        return False
    difference = mean_difference(expected, found, LEAST)
    if not difference > SAME:
        return True
    own = mean_difference(collect_tensors(call_on_copies(model, *example)), file_outputs(path, example) or [], LEAST)
    return not difference > TIMES * own


def mean_difference(expected: Sequence[Tensor], found: Sequence[Tensor], least: float = 1e-30) -> float:
    """The largest, over output tensors, of the mean difference over the mean magnitude; NaN where there is one.

    Args:
        expected, found: tensors of the same shapes; the magnitude is that of `expected`.
        least: mean magnitude that smaller ones count as.
    """
    pairs = [(a.detach().cpu().float(), b.float()) for a, b in zip(expected, found, strict=False) if a.numel()]
    shares = [(a - b).abs().mean() / a.abs().mean().clamp_min(least) for a, b in pairs]
    return float(torch.stack(shares).amax()) if shares else 0.0


def file_outputs(path: Path, example: Any) -> list[Tensor] | None:
    """A file's outputs as it is written; None where onnxruntime cannot run it."""
    try:
        return collect_tensors(Session(path, optimised=False)(*collect_tensors(example)))
    except Exception:  # onnxruntime has a class of its own for every kind of failure
        return None
