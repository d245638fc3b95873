"""The runtimes that an exported file is known to work in, by name; each is called like the model that it came from."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from jpq.tracing.forward import tensors
from jpq.types import JpqError, unknown


class Session:
    """An exported file in onnxruntime, called like the model it came from.

    Unless `optimised`, the graph runs as it is written: onnxruntime's fusions round biases to integers.
    """

    def __init__(self, path: Path | onnx.ModelProto, threads: int = 0, optimised: bool = True):
        options = onnxruntime.SessionOptions()
        if not optimised:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        source = path.SerializeToString() if isinstance(path, onnx.ModelProto) else str(path)
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """The output for one batch, on the CPU: a tensor, or a tuple of all tensors that the model gives."""
        names = [i.name for i in self._session.get_inputs()]
        order = [*args, *(kwargs[name] for name in names if name in kwargs)] if set(names) >= set(kwargs) else kwargs
        values = [v.detach().cpu() for v in tensors(order)]
        feed = [np.ascontiguousarray((v.float() if v.is_floating_point() else v).numpy()) for v in values]
        out = tuple(
            torch.from_numpy(np.asarray(o)) for o in self._session.run(None, dict(zip(names, feed, strict=True)))
        )
        return out[0] if len(out) == 1 else out


@contextlib.contextmanager
def quiet_exporters() -> Iterator[None]:
    """torch's exporter and onnxoptimizer talk on every channel; what fails still raises."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class OpenVino:
    """An exported file in OpenVINO, in single precision where it is not in integers (some CPUs default to bfloat16)."""

    def __init__(self, path: Path, threads: int = 0):
        openvino = _openvino()
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        options |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
        try:
            self.compiled = openvino.Core().compile_model(str(path), "CPU", options)
        except Exception as error:  # openvino has one class for every kind of failure
            raise JpqError(f"openvino cannot load {path}: {' '.join(str(error).split())[-200:]}") from error

    def __call__(self, *args: Any) -> Tensor | tuple[Tensor, ...]:
        """The output for one batch: a tensor, or a tuple of all tensors that the model gives."""
        feed = [np.ascontiguousarray((v.float() if v.is_floating_point() else v).cpu().numpy()) for v in tensors(args)]
        found = self.compiled(feed)
        out = tuple(torch.from_numpy(np.array(found[port])) for port in self.compiled.outputs)
        return out[0] if len(out) == 1 else out


RUNTIMES: dict[str, Any] = {"onnxruntime": Session, "openvino": OpenVino}


def chosen(names: str) -> Sequence[str]:
    """The runtimes in a list such as "onnxruntime,openvino".

    Raises JpqError for unknown ones, and for openvino where it is not installed.
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in RUNTIMES:
            raise unknown("runtime", name, RUNTIMES)
    if not found:
        raise JpqError(f"No runtime: choose from {', '.join(RUNTIMES)}.")
    if "openvino" in found:
        _openvino()
    return found


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise JpqError(
            "openvino is not installed: python -m pip install openvino (the extra of that name), or choose onnxruntime."
        ) from error
    return openvino


def opened(name: str, path: Path, threads: int = 0) -> Any:
    """A file in one of the runtimes. Raises JpqError where it cannot be loaded."""
    if not path.is_file():
        raise JpqError(f"{path} is not there. Give an exported file, such as runs/0123456789ab/model.onnx.")
    try:
        return RUNTIMES[name](path, threads)
    except JpqError:
        raise
    except Exception as error:  # onnxruntime has a class of its own for every kind of failure
        raise JpqError(f"{name} cannot load {path}: {' '.join(str(error).split())[:200]}") from error
