"""Runtimes for exported ONNX files, by name: onnxruntime and OpenVINO sessions that are called like PyTorch models."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from jpq.export.onnx.external_data import check_external_data
from jpq.tracing.forward import collect_tensors
from jpq.types import JpqError, unknown

_NEWER_FORMAT = re.compile(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)")  # onnxruntime's
_NO_KERNEL = re.compile(r"Could not find an implementation for (\w+)\(\d+\) node with name '(.*?)'")  # onnxruntime's


def start_session(
    model: str | Path | onnx.ModelProto, threads: int = 0, optimised: bool = True
) -> onnxruntime.InferenceSession:
    """onnxruntime's own session on the CPU; arguments and errors as for `Session`, and what onnxruntime raises."""
    options = onnxruntime.SessionOptions()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if isinstance(model, onnx.ModelProto):
        source: str | bytes = model.SerializeToString()
    else:
        check_external_data(model)
        source = str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for every kind of failure
        versions, missing = _NEWER_FORMAT.search(str(error)), _NO_KERNEL.search(str(error))
        if missing is not None:
            raise JpqError(
                f"onnxruntime {onnxruntime.__version__} cannot compute the operator {missing[1]} of '{missing[2]}' in "
                "the type of its numbers. Where the model's code computes in half precision (torch.autocast, .half()), "
                "export it without."
            ) from error
        if versions is None:
            raise
        raise JpqError(
            f"onnxruntime {onnxruntime.__version__} reads ONNX files up to format {versions[2]}, and this one has "
            f"format {versions[1]}. Install a newer onnxruntime, or export with --onnx-weights int8 or int4."
        ) from error


class Session:
    """An ONNX file in onnxruntime, called like the model that it was exported from.

    A file that takes one sample at a time is run once for each.

    Args:
        path: the file, or an ONNX model in memory.
        threads: of one operator; 0 leaves the choice to onnxruntime.
        optimised: apply onnxruntime's fusions, which round biases to integers; else run the graph as it is written.

    Raises JpqError where the file's format is newer than this onnxruntime, as that of int2 weights may be, where it has
    no kernel for an operator and type, and where the file asks for weights outside of its folder.
    """

    def __init__(self, path: str | Path | onnx.ModelProto, threads: int = 0, optimised: bool = True):
        self._session = start_session(path, threads, optimised)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """The output for one batch, on the CPU: a tensor, or a tuple of all output tensors."""
        names = [i.name for i in self._session.get_inputs()]
        arrays = _to_arrays(names, args, kwargs)
        single = [bool(i.shape) and i.shape[0] == 1 for i in self._session.get_inputs()]

        def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
            return [np.asarray(v) for v in self._session.run(None, dict(zip(names, arrays, strict=True)))]

        return _as_output(_run_singly(run, arrays, single))


class OpenVinoSession:
    """An ONNX file in OpenVINO, called like the model that it was exported from.

    What is not computed in integers is computed in single precision (some CPUs default to bfloat16).
    """

    def __init__(self, path: str | Path, threads: int = 0):
        openvino = _import_openvino()
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        options |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
        check_external_data(path)
        try:
            self.compiled = openvino.Core().compile_model(str(path), "CPU", options)
        except Exception as error:  # openvino has one class for every kind of failure
            raise JpqError(f"openvino cannot load {path}: {' '.join(str(error).split())[-200:]}") from error

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """The output for one batch: a tensor, or a tuple of all output tensors."""
        names = [port.get_any_name() for port in self.compiled.inputs]
        arrays = _to_arrays(names, args, kwargs)
        shapes = [port.get_partial_shape() for port in self.compiled.inputs]
        single = [bool(len(shape)) and str(shape[0]) == "1" for shape in shapes]

        def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
            results = self.compiled(list(arrays))
            return [np.array(results[port]) for port in self.compiled.outputs]

        return _as_output(_run_singly(run, arrays, single))


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


def _to_arrays(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[np.ndarray]:
    """The tensors of a call as arrays, in the order of the file's inputs.

    Keywords that are not all names of inputs, as those of nests of several tensors, keep the order of the call.
    """
    by_name = set(names) >= set(kwargs)
    inputs = [*args, *(kwargs[name] for name in names if name in kwargs)] if by_name else [*args, kwargs]
    return [_to_array(value) for value in collect_tensors(inputs)]


def _to_array(value: Tensor) -> np.ndarray:
    """A tensor as a contiguous array on the CPU, floating-point numbers in single precision."""
    value = value.detach().cpu()
    return np.asarray((value.float() if value.is_floating_point() else value).numpy(), order="C")  # scalars stay so


def _run_singly(
    run: Callable[[Sequence[np.ndarray]], list[np.ndarray]], arrays: Sequence[np.ndarray], single: Sequence[bool]
) -> list[np.ndarray]:
    """The outputs for a batch: of one run, or of one for each sample where the file takes a single one.

    Args:
        run: the file's outputs for its inputs.
        arrays: the inputs; single: which of them the file holds to one row.
    """
    samples = max((len(a) for a, one in zip(arrays, single, strict=True) if one and a.ndim), default=1)
    if samples == 1:
        return run(arrays)
    runs = [
        run([a[i : i + 1] if one and len(a) == samples else a for a, one in zip(arrays, single, strict=True)])
        for i in range(samples)
    ]
    return [
        np.concatenate(parts) if parts[0].ndim and len(parts[0]) == 1 else parts[-1]
        for parts in zip(*runs, strict=True)
    ]


def _as_output(arrays: Sequence[np.ndarray]) -> Tensor | tuple[Tensor, ...]:
    """A runtime's outputs as one tensor, or as a tuple of several."""
    output = tuple(torch.from_numpy(array) for array in arrays)
    return output[0] if len(output) == 1 else output
