"""Timed calls of ONNX models in onnxruntime and OpenVINO, interleaved in one process so that noise affects all."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from jpq.export.runtimes import OpenVinoSession, start_session
from jpq.types import JpqError

MAX_INPUT_NUMBERS = 2**28  # largest number of elements of one input

# onnxruntime's name of a type -> the type of random samples
SAMPLE_TYPES = {
    "tensor(float)": np.float32,
    "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


class Runner:
    """An ONNX model in onnxruntime with random samples bound to its inputs; a call computes the outputs and drops them.

    Args:
        model: a file, or an ONNX model in memory.
        threads: of one operator.
        batch: samples, where the model leaves their number free.

    Raises JpqError where onnxruntime cannot load it, and for inputs that cannot be made up.
    """

    def __init__(self, model: Path | onnx.ModelProto, threads: int = 1, batch: int = 1):
        name = _model_name(model)
        self._session = _open_session(model, threads, name)
        self._binding = self._session.io_binding()
        self.samples: dict[str, np.ndarray] = {}  # random ones, by the name of their input
        rng = np.random.default_rng(0)
        inputs = self._session.get_inputs()
        for entry in inputs:
            if entry.type not in SAMPLE_TYPES:
                kinds = ", ".join(SAMPLE_TYPES)
                raise JpqError(f"{name}: input '{entry.name}' is a {entry.type}; {kinds} can be made up.")
            shape = [n if isinstance(n, int) and n > 0 else batch for n in entry.shape]  # where the batch is free
            if shape and len(inputs) == 1 and shape[0] != batch > 1:
                raise JpqError(f"{name} takes {shape[0]} samples at a time, not --batch {batch}.")
            check_input_size(shape, f"{name}: input '{entry.name}'")
            self.samples[entry.name] = _random_samples(rng, shape, SAMPLE_TYPES[entry.type])
            self._binding.bind_cpu_input(entry.name, self.samples[entry.name])
        for entry in self._session.get_outputs():
            self._binding.bind_output(entry.name, "cpu")

    def two_samples(self) -> Any:
        """Inputs of two equal samples for the model that the file was made from: a tensor, or several by name."""
        values = {name: value if not value.ndim else value[:1].repeat(2, 0) for name, value in self.samples.items()}
        tensors = {name: torch.from_numpy(value) for name, value in values.items()}
        return next(iter(tensors.values())) if len(tensors) == 1 else tensors

    def __call__(self) -> None:
        """Compute once."""
        self._session.run_with_iobinding(self._binding)


class OpenVinoRunner:
    """An ONNX model in OpenVINO with random samples; a call computes the outputs and drops them."""

    def __init__(self, path: Path, threads: int = 1, batch: int = 1):
        self._request = OpenVinoSession(path, threads).compiled.create_infer_request()
        rng = np.random.default_rng(0)
        self._feed = []
        for port in self._request.model_inputs:
            shape = [batch if side.is_dynamic else side.get_length() for side in port.partial_shape]
            check_input_size(shape, f"{path}: input '{port.any_name}'")
            self._feed.append(_random_samples(rng, shape, np.dtype(port.get_element_type().to_dtype()).type))

    def __call__(self) -> None:
        """Compute once."""
        self._request.infer(self._feed, share_inputs=True)


def take_turns(
    runners: Sequence[Callable[[], None]],
    rounds: int,
    report: Callable[[int], None] = lambda calls: None,
    clock: Callable[[], float] = time.perf_counter,
) -> np.ndarray:
    """Seconds of calls, [runners, rounds]. In each round every runner warms up with one call and is timed in the next.

    Args:
        runners: called in turns.
        rounds: timed calls of each runner.
        report: told the number of timed calls after every round.
        clock: `time.process_time` counts the processor's time, which others on the machine hardly disturb; it is the
            time that a call takes only with one thread.
    """
    seconds = np.zeros((len(runners), rounds))
    for _ in range(2):
        for run in runners:
            run()
    for i in range(rounds):
        for j, run in enumerate(runners):
            run()
            start = clock()
            run()
            seconds[j, i] = clock() - start
        report(len(runners))
    return seconds


def check_input_size(shape: Sequence[int], what: str) -> None:
    """Raise JpqError where an input has more numbers than can be made up."""
    if math.prod(shape) > MAX_INPUT_NUMBERS:
        raise JpqError(
            f"{what} is of {math.prod(shape):,} numbers ({'x'.join(map(str, shape))}), and at most "
            f"{MAX_INPUT_NUMBERS:,} are made up. Give a smaller --batch, or a model of smaller inputs."
        )


INTEGER_INSTRUCTIONS = {  # flag of Linux -> name; the first that a processor has decides what integer kernels compute
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "avx512bw": "AVX-512 without VNNI",
    "avx2": "AVX2 without VNNI",
    "i8mm": "I8MM",
    "asimddp": "dot products",
}


def describe_hardware(processors: Path = Path("/proc/cpuinfo")) -> str:
    """This machine's processor, its instructions for integer products where Linux names them, and number of cores."""
    name, instructions = platform.processor() or platform.machine(), ""
    if processors.is_file():
        lines = [line.partition(":") for line in processors.read_text(encoding="utf-8").splitlines()]
        facts = {key.strip().lower(): value.strip() for key, _, value in lines}
        name = facts.get("model name", name)
        known = set(facts.get("flags", facts.get("features", "")).split())
        instructions = next((f", {shown}" for flag, shown in INTEGER_INSTRUCTIONS.items() if flag in known), "")
    return f"{name} ({platform.machine()}{instructions}), {os.cpu_count()} cores"


def _open_session(model: Path | onnx.ModelProto, threads: int, name: str) -> onnxruntime.InferenceSession:
    """An optimized session on the CPU. Raises JpqError where the model cannot be loaded."""
    try:
        return start_session(model, threads)
    except JpqError:
        raise
    except Exception as error:  # onnxruntime has a class of its own for every kind of failure
        raise JpqError(f"onnxruntime cannot load {name}: {str(error).splitlines()[0]}") from error


def _random_samples(rng: np.random.Generator, shape: Sequence[int], kind: type) -> np.ndarray:
    """Normal numbers in floating point, zeros and ones in other types."""
    is_float = kind is np.float32
    samples = rng.standard_normal(shape, np.float32) if is_float else rng.integers(0, 2, shape, np.uint8)
    return np.ascontiguousarray(samples.astype(kind, copy=False))


def _model_name(model: Path | onnx.ModelProto) -> str:
    """The name of a model in an error message."""
    return "this layer" if isinstance(model, onnx.ModelProto) else str(model)
