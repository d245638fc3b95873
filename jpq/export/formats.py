"""Writers of a small model's files in the formats of `FORMATS`, and the check that a file computes the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from onnx import load
from torch import nn

from jpq.export import verify
from jpq.export.onnx.export import export_onnx, export_qonnx
from jpq.export.onnx.quant_nodes import expand_quant_nodes
from jpq.export.runtimes import Session
from jpq.export.torch_export import export_pt2
from jpq.export.verify import Pair
from jpq.files.formats import FORMATS, Format
from jpq.tasks.base import Task
from jpq.tracing.forward import batch_dim, batch_size, call_model, collect_tensors, pick_samples
from jpq.types import JpqError

__all__ = ["FORMATS", "Format", "check_agreement", "write", "write_onnx", "write_pt2", "write_qonnx"]

QONNX_SAMPLES = 64  # number of samples that a QONNX file is compared on


def write(
    small: nn.Module,
    example: Any,
    folder: str | Path,
    names: Sequence[str],
    batches: Iterable[Pair],
    weights: str = "int8",
    task: Task | None = None,
) -> dict[str, Any]:
    """Write a rebuilt model into `folder` in the named formats, and compare each file with it on `batches`.

    Returns, for each format, its "file", its "bytes", and the comparison ("verified"; see `verify.compare`).
    `batches` are read several times; `task` says when two outputs are the same decision (None: unknown, see
    `verify.compare`). Raises JpqError where a file cannot be written or computes something else.
    """
    folder = Path(folder)
    small.eval()
    records = {}
    for name in names:
        path = folder / FORMATS[name].file_name
        comparison = FORMATS[name].import_writer()(small, example, path, batches, weights, task)
        records[name] = {"file": path.name, "bytes": path.stat().st_size, "verified": comparison}
    return records


def write_onnx(
    small: nn.Module, example: Any, path: Path, batches: Iterable[Pair], weights: str, task: Task | None
) -> dict[str, Any]:
    """Write a QCDQ file and compare it in onnxruntime."""
    export_onnx(small, example, path, weights)
    return verify.exported(small, path, batches, task)


def write_qonnx(
    small: nn.Module, example: Any, path: Path, batches: Iterable[Pair], _: str, task: Task | None
) -> dict[str, Any]:
    """Write a QONNX file and compare it on the first samples, its Quant nodes written out for onnxruntime."""
    export_qonnx(small, example, path)
    session = Session(expand_quant_nodes(load(str(path))), optimised=False)
    x, y = next(iter(batches))
    count = min(batch_size(x), QONNX_SAMPLES)
    samples = pick_samples(x, range(count))
    with torch.no_grad():
        dims = [batch_dim(t, count) or 0 for t in collect_tensors(call_model(small, samples))]

    def run_one_by_one(*args: Any, **kwargs: Any) -> Any:
        singles = [pick_samples((args, kwargs), [i]) for i in range(count)]
        outputs = [collect_tensors(session(*single[0], **single[1])) for single in singles]
        return tuple(torch.cat(parts, dim) for dim, *parts in zip(dims, *outputs, strict=True))

    comparison = verify.compare(small, run_one_by_one, [(samples, y)], task)
    check_agreement(comparison, "the QONNX file")
    return comparison


def write_pt2(
    small: nn.Module, example: Any, path: Path, batches: Iterable[Pair], _: str, task: Task | None
) -> dict[str, Any]:
    """Write a torch.export archive and compare it after loading."""
    export_pt2(small, example, path)
    comparison = verify.compare(small, torch.export.load(path).module(), batches, task)
    check_agreement(comparison, "the .pt2 file")
    return comparison


def check_agreement(comparison: dict[str, Any], what: str) -> None:
    """Raise JpqError where more decisions differ than rounding boundaries explain.

    Args:
        comparison: of the file with the model, as `verify.compare` gives it.
        what: the file, in words, such as "the .pt2 file".
    """
    if comparison["argmax_differs"] > max(verify.FEW, verify.RARE * comparison["decisions"]):
        raise JpqError(
            f"{what} and the rebuilt model differ on {comparison['argmax_differs']} of {comparison['decisions']} "
            "decisions. This is a bug in jpq."
        )
