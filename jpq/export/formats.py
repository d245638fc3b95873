"""`FORMATS`: the file formats of a small model, each with its file name and the function that writes and checks it.

| format | file             | reader                                                                     |
|--------|------------------|----------------------------------------------------------------------------|
| onnx   | model.onnx       | any ONNX runtime; integers in 8 bits or fewer (narrow_weights.py)            |
| qonnx  | model.qonnx.onnx | netron, qonnx, FINN and hls4ml: Quant nodes of any width, one sample       |
| pt2    | model.pt2        | torch.export.load, without jpq or brevitas: ATen operators, int8 weights   |

A new format is a writer in a file of this package, a row of `FORMATS`, and its name in `jpq.config.FORMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnx import load
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from jpq.export import verify
from jpq.export.onnx.export import export_onnx, export_qonnx
from jpq.export.onnx.quant_nodes import expand_quant_nodes
from jpq.export.runtimes import Session
from jpq.export.torch_export import export_pt2
from jpq.export.verify import Pair
from jpq.tracing.forward import batch_size, collect_tensors
from jpq.types import JpqError

QONNX_SAMPLES = 64  # that a QONNX file is compared on, one by one

Writer = Callable[[nn.Module, Any, Path, Iterable[Pair], str], dict[str, Any]]


@dataclass(frozen=True)
class Format:
    """A file format: the name of its file in a run's folder, and its writer.

    A writer is called as `writer(small, example, path, batches, weights)` with the rebuilt model, an example of its
    inputs, the file to write, batches to compare on (read several times), and the type of stored weights
    (`--onnx-weights`). It returns the comparison of file and model, as `jpq.export.verify.compare` gives it.
    """

    file_name: str
    writer: Writer


def write(
    small: nn.Module,
    example: Any,
    folder: Path,
    names: Sequence[str],
    batches: Iterable[Pair],
    weights: str = "int8",
) -> dict[str, Any]:
    """Write a rebuilt model into `folder` in the named formats, and compare each file with it on `batches`.

    Returns, for each format, its "file", its "bytes", and the comparison ("verified"; see `verify.compare`).
    `batches` are read several times. Raises JpqError where a file cannot be written or computes something else.
    """
    small.eval()
    records = {}
    for name in names:
        path = folder / FORMATS[name].file_name
        comparison = FORMATS[name].writer(small, example, path, batches, weights)
        records[name] = {"file": path.name, "bytes": path.stat().st_size, "verified": comparison}
    return records


def write_onnx(
    small: nn.Module, example: Any, path: Path, batches: Iterable[Pair], weights: str = "int8"
) -> dict[str, Any]:
    """Write a QCDQ file and compare it in onnxruntime."""
    export_onnx(small, example, path, weights)
    return verify.exported(small, path, batches)


def write_qonnx(small: nn.Module, example: Any, path: Path, batches: Iterable[Pair], _: str = "") -> dict[str, Any]:
    """Write a QONNX file and compare it on the first samples, its Quant nodes written out for onnxruntime."""
    export_qonnx(small, example, path)
    session = Session(expand_quant_nodes(load(str(path))), optimised=False)

    def run_one_by_one(*args: Any, **kwargs: Any) -> Any:
        count = batch_size((args, kwargs))
        outputs = [collect_tensors(session(*_samples(args, i), **_samples(kwargs, i))) for i in range(count)]
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))

    x, y = next(iter(batches))
    comparison = verify.compare(small, run_one_by_one, [(_samples(x, 0, QONNX_SAMPLES), y)])
    _check_agreement(comparison, "the QONNX file")
    return comparison


def write_pt2(small: nn.Module, example: Any, path: Path, batches: Iterable[Pair], _: str = "") -> dict[str, Any]:
    """Write a torch.export archive and compare it after loading."""
    export_pt2(small, example, path)
    comparison = verify.compare(small, torch.export.load(path).module(), batches)
    _check_agreement(comparison, "the .pt2 file")
    return comparison


FORMATS: dict[str, Format] = {
    "onnx": Format("model.onnx", write_onnx),
    "qonnx": Format("model.qonnx.onnx", write_qonnx),
    "pt2": Format("model.pt2", write_pt2),
}


def _samples(batch: Any, start: int, count: int = 1) -> Any:
    """`count` samples of a batch, in any nest of tensors."""
    return tree_map(lambda v: v[start : start + count] if isinstance(v, Tensor) and v.dim() else v, batch)


def _check_agreement(comparison: dict[str, Any], what: str) -> None:
    """Raise JpqError where more decisions differ than rounding boundaries explain."""
    if comparison["argmax_differs"] > max(2, verify.RARE * comparison["decisions"]):
        raise JpqError(
            f"{what} and the rebuilt model differ on {comparison['argmax_differs']} of {comparison['decisions']} "
            "decisions. This is a bug in jpq."
        )
