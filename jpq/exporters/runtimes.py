"""The runtimes that an exported file is known to work in, by name; each is called like the model that it came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jpq.exporters.onnx import Session
from jpq.exporters.timing import require_room
from jpq.network.read import tensors
from jpq.types import JpqError, unknown


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


class OpenVinoRunner:
    """An ONNX model in OpenVINO with random samples; calling it computes the outputs and drops them."""

    def __init__(self, path: Path, threads: int = 1, batch: int = 1):
        self._request = OpenVino(path, threads).compiled.create_infer_request()
        rng = np.random.default_rng(0)
        feed = []
        for port in self._request.model_inputs:
            sides = [batch if side.is_dynamic else side.get_length() for side in port.partial_shape]
            require_room(sides, f"{path}: input '{port.any_name}'")
            feed.append(rng.standard_normal(sides, np.float32).astype(port.get_element_type().to_dtype(), copy=False))
        self._feed = feed

    def __call__(self) -> None:
        """Compute once."""
        self._request.infer(self._feed, share_inputs=True)


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
