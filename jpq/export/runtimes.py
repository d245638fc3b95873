"""Runtimes for exported ONNX files, by name: onnxruntime and OpenVINO sessions that are called like PyTorch models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from jpq.tracing.forward import collect_tensors
from jpq.types import JpqError, unknown


class Session:
    """An ONNX file in onnxruntime, called like the model that it was exported from.

    Args:
        path: the file, or an ONNX model in memory.
        threads: of one operator; 0 leaves the choice to onnxruntime.
        optimised: apply onnxruntime's fusions, which round biases to integers; else run the graph as it is written.
    """

    def __init__(self, path: str | Path | onnx.ModelProto, threads: int = 0, optimised: bool = True):
        options = onnxruntime.SessionOptions()
        if not optimised:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        source = path.SerializeToString() if isinstance(path, onnx.ModelProto) else str(path)
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """The output for one batch, on the CPU: a tensor, or a tuple of all output tensors."""
        names = [i.name for i in self._session.get_inputs()]
        by_name = set(names) >= set(kwargs)
        inputs = [*args, *(kwargs[name] for name in names if name in kwargs)] if by_name else kwargs
        feed = dict(zip(names, [_to_array(value) for value in collect_tensors(inputs)], strict=True))
        return _as_output([np.asarray(value) for value in self._session.run(None, feed)])


class OpenVinoSession:
    """An ONNX file in OpenVINO, called like the model that it was exported from.

    What is not computed in integers is computed in single precision (some CPUs default to bfloat16).
    """

    def __init__(self, path: str | Path, threads: int = 0):
        openvino = _import_openvino()
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        options |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
        try:
            self.compiled = openvino.Core().compile_model(str(path), "CPU", options)
        except Exception as error:  # openvino has one class for every kind of failure
            raise JpqError(f"openvino cannot load {path}: {' '.join(str(error).split())[-200:]}") from error

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """The output for one batch: a tensor, or a tuple of all output tensors."""
        names = [port.get_any_name() for port in self.compiled.inputs]
        by_name = set(names) >= set(kwargs)
        inputs = [*args, *(kwargs[name] for name in names if name in kwargs)] if by_name else [*args, kwargs]
        results = self.compiled([_to_array(value) for value in collect_tensors(inputs)])
        return _as_output([np.array(results[port]) for port in self.compiled.outputs])


RUNTIMES: dict[str, Any] = {"onnxruntime": Session, "openvino": OpenVinoSession}


def parse_runtimes(names: str) -> Sequence[str]:
    """Split a list such as "onnxruntime,openvino" into the names of runtimes.

    Raises JpqError for unknown ones, and for openvino where it is not installed.
    """
    runtimes = [name.strip() for name in names.split(",") if name.strip()]
    for name in runtimes:
        if name not in RUNTIMES:
            raise unknown("runtime", name, RUNTIMES)
    if not runtimes:
        raise JpqError(f"No runtime: choose from {', '.join(RUNTIMES)}.")
    if "openvino" in runtimes:
        _import_openvino()
    return runtimes


def open_session(runtime: str, path: str | Path, threads: int = 0) -> Any:
    """Open an ONNX file in the named runtime. Raises JpqError where it cannot be loaded."""
    path = Path(path)
    if not path.is_file():
        raise JpqError(f"{path} is not there. Give an exported file, such as runs/0123456789ab/model.onnx.")
    try:
        return RUNTIMES[runtime](path, threads)
    except JpqError:
        raise
    except Exception as error:  # onnxruntime has a class of its own for every kind of failure
        raise JpqError(f"{runtime} cannot load {path}: {' '.join(str(error).split())[:200]}") from error


def _import_openvino() -> Any:
    """The openvino package. Raises JpqError where it is not installed."""
    try:
        import openvino
    except ImportError as error:
        raise JpqError(
            "openvino is not installed: python -m pip install openvino (the extra of that name), or choose onnxruntime."
        ) from error
    return openvino


def _to_array(value: Tensor) -> np.ndarray:
    """A tensor as a contiguous array on the CPU, floating-point numbers in single precision."""
    value = value.detach().cpu()
    return np.asarray((value.float() if value.is_floating_point() else value).numpy(), order="C")  # scalars stay so


def _as_output(arrays: Sequence[np.ndarray]) -> Tensor | tuple[Tensor, ...]:
    """A runtime's outputs as one tensor, or as a tuple of several."""
    output = tuple(torch.from_numpy(array) for array in arrays)
    return output[0] if len(output) == 1 else output
