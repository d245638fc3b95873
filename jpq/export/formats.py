"""The forms that a small model is handed over in: ONNX for runtimes, QONNX for FPGA flows, .pt2 for PyTorch itself.

| form  | file             | what reads it                                                            |
|-------|------------------|--------------------------------------------------------------------------|
| onnx  | model.onnx       | any ONNX runtime; integers at 8 bits or in narrower types (narrow.py)      |
| qonnx | model.qonnx.onnx | netron, qonnx, FINN and hls4ml: Quant nodes of any width, one sample       |
| pt2   | model.pt2        | torch.export.load, without jpq or brevitas: ATen operators, int8 weights   |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from onnx import load
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from jpq.export import runtimes, verify
from jpq.export.onnx import export
from jpq.export.onnx.export import standard
from jpq.export.torch_export import export_pt2
from jpq.export.verify import Pair
from jpq.tracing.forward import batch_of, tensors
from jpq.types import JpqError

NAMES = {"onnx": "model.onnx", "qonnx": "model.qonnx.onnx", "pt2": "model.pt2"}

SAMPLES = 64  # that a QONNX file is compared on, one by one


def write(
    small: nn.Module,
    example: Any,
    folder: Path,
    forms: Sequence[str],
    batches: Iterable[Pair],
    weights: str = "int8",
) -> dict[str, Any]:
    """Write the asked forms of a rebuilt model into `folder`, and compare each with it on `batches`.

    Returns, for each form, its "file", its "bytes", and what the comparison found ("verified"; see `verify.compare`).
    `batches` are read several times. Raises JpqError where a form cannot be written or computes something else.
    """
    small.eval()
    made = {}
    for form in forms:
        path = folder / NAMES[form]
        found = _WRITERS[form](small, example, path, batches, weights)
        made[form] = {"file": path.name, "bytes": path.stat().st_size, "verified": found}
    return made


def _onnx(small: nn.Module, example: Any, path: Path, batches: Iterable[Pair], weights: str) -> dict[str, Any]:
    export.export(small, example, path, weights)
    return verify.exported(small, path, batches)


def _pt2(small: nn.Module, example: Any, path: Path, batches: Iterable[Pair], _: str) -> dict[str, Any]:
    export_pt2(small, example, path)
    loaded = torch.export.load(path).module()
    found = verify.compare(small, loaded, batches)
    _require(found, "the .pt2 file")
    return found


def _qonnx(small: nn.Module, example: Any, path: Path, batches: Iterable[Pair], _: str) -> dict[str, Any]:
    export.export_qonnx(small, example, path)
    session = runtimes.Session(standard(load(str(path))), optimised=False)

    def run(*args: Any, **kwargs: Any) -> Any:
        rows = [tensors(session(*_sample(args, i), **_sample(kwargs, i))) for i in range(batch_of((args, kwargs)))]
        return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))

    few = [(_sample(x, 0, SAMPLES), y) for x, y in [next(iter(batches))]]
    found = verify.compare(small, run, few)
    _require(found, "the QONNX file")
    return found


def _sample(value: Any, at: int, count: int = 1) -> Any:
    """These samples of a batch."""
    return tree_map(lambda v: v[at : at + count] if isinstance(v, Tensor) and v.dim() else v, value)


_WRITERS: dict[str, Callable[..., dict[str, Any]]] = {"onnx": _onnx, "qonnx": _qonnx, "pt2": _pt2}


def _require(found: dict[str, Any], what: str) -> None:
    """Raise JpqError where more decisions differ than rounding boundaries explain."""
    if found["argmax_differs"] > max(2, verify.RARE * found["decisions"]):
        raise JpqError(
            f"{what} and the rebuilt model differ on {found['argmax_differs']} of {found['decisions']} "
            "decisions. This is a bug in jpq."
        )
