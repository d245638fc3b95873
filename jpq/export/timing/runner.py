"""How long models take in onnxruntime on this machine: all in one process, in turns, so that noise hits all alike."""

from __future__ import annotations

import math
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from jpq.export.runtimes import OpenVino
from jpq.types import JpqError

MOST = 2**28  # numbers of one input
TYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}


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


class Runner:
    """An ONNX model with random samples bound to its inputs; calling it computes the outputs and drops them."""

    def __init__(self, model: Path | onnx.ModelProto, threads: int = 1, batch: int = 1):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class of its own for every kind of failure
            raise JpqError(f"onnxruntime cannot load {_name(model)}: {str(error).splitlines()[0]}") from error
        self._binding = self._session.io_binding()
        rng = np.random.default_rng(0)
        self.shapes: list[tuple[int, ...]] = []  # of each input
        for x in self._session.get_inputs():
            if x.type not in TYPES:
                raise JpqError(f"{_name(model)}: input '{x.name}' is a {x.type}; {', '.join(TYPES)} can be made up.")
            sides = [n if isinstance(n, int) and n > 0 else batch for n in x.shape]  # where the batch is free
            self.shapes.append(tuple(sides))
            if sides and len(self._session.get_inputs()) == 1 and sides[0] != batch > 1:
                raise JpqError(f"{_name(model)} takes {sides[0]} samples at a time, not --batch {batch}.")
            require_room(sides, f"{_name(model)}: input '{x.name}'")
            kind = TYPES[x.type]
            plain = kind is np.float32
            drawn = rng.standard_normal(sides, np.float32) if plain else rng.integers(0, 2, sides, np.uint8)
            self._binding.bind_cpu_input(x.name, np.ascontiguousarray(drawn.astype(kind, copy=False)))
        for y in self._session.get_outputs():
            self._binding.bind_output(y.name, "cpu")

    def __call__(self) -> None:
        """Compute once."""
        self._session.run_with_iobinding(self._binding)


def require_room(sides: Sequence[int], what: str) -> None:
    """Raise JpqError where an input has more numbers than can be made up."""
    if math.prod(sides) > MOST:
        raise JpqError(
            f"{what} is of {math.prod(sides):,} numbers ({'x'.join(map(str, sides))}), and at most {MOST:,} "
            "are made up. Give a smaller --batch, or a model of smaller inputs."
        )


def take_turns(
    runners: Sequence[Callable[[], None]],
    rounds: int,
    tell: Callable[[int], None] = lambda calls: None,
    clock: Callable[[], float] = time.perf_counter,
) -> np.ndarray:
    """[runners, rounds]: seconds of calls. Each round every runner warms up with one call and is timed in the next.

    `clock`: `time.process_time` counts the processor's time, which others on the machine hardly disturb; it is the time
    that a call takes only with one thread.
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
        tell(len(runners))
    return seconds


def kernels(model: Path | onnx.ModelProto) -> Counter[str]:
    """How often each kind of node is in the graph that onnxruntime runs, after its own optimisation."""
    return Counter(node.op_type for node in _optimised(model).node)


def float_layers(model: Path | onnx.ModelProto) -> tuple[int, dict[str, str]]:
    """(layers that onnxruntime computes in integers, name of each that it computes in floating point -> why)."""
    graph = _optimised(model)
    makers = {out: node for node in graph.node for out in node.output}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    integer, left = 0, {}
    for node in graph.node:
        kind = _layer_kind(node.op_type)
        integer += kind == "integer"
        if kind == "float":
            made = makers.get(node.input[0])
            to = readers.get(node.output[0], [])
            where = ", ".join(dict.fromkeys(to)) or "the caller"
            reads = made is not None and made.op_type == "DequantizeLinear"
            why = f"its result goes to {where} in floating point" if reads else "it reads floating point"
            left[node.output[0]] = why
    return integer, left


def _layer_kind(op: str) -> str:
    """ "integer", "float", or "" for what is no layer with weights."""
    if op.startswith("QLinearConv") or op in (
        "QLinearMatMul",
        "QGemm",
        "MatMulIntegerToFloat",
        "MatMulInteger",
        "ConvInteger",
        "DynamicQuantizeMatMul",
    ):
        return "integer"
    return (
        "float"
        if op
        in (
            "Conv",
            "FusedConv",
            "ConvTranspose",
            "Gemm",
            "FusedGemm",
            "MatMul",
            "FusedMatMul",
            "TransposeMatMul",
            "NhwcFusedConv",
        )
        else ""
    )


def _optimised(model: Path | onnx.ModelProto) -> onnx.GraphProto:
    """The graph that onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath, load_external_data=False).graph


def hardware() -> str:
    """This machine's processor and number of cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line.partition(":") for line in info.read_text().splitlines()]
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return f"{name} ({platform.machine()}), {os.cpu_count()} cores"


def _name(model: Path | onnx.ModelProto) -> str:
    return "this layer" if isinstance(model, onnx.ModelProto) else str(model)
