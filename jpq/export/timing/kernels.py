"""Kernels that onnxruntime chooses for an exported model: how many of each kind, and which layers stay in float."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime

from jpq.export.onnx.external_data import check_external_data

_INTEGER_OPS = {
    "QLinearMatMul",
    "QGemm",
    "MatMulIntegerToFloat",
    "MatMulInteger",
    "ConvInteger",
    "DynamicQuantizeMatMul",
}

_FLOAT_OPS = {
    "Conv",
    "FusedConv",
    "ConvTranspose",
    "Gemm",
    "FusedGemm",
    "MatMul",
    "FusedMatMul",
    "TransposeMatMul",
    "NhwcFusedConv",
}


def count_kernels(model: str | Path | onnx.ModelProto) -> Counter[str]:
    """Number of nodes of each kind in the graph that onnxruntime runs, after its own optimization."""
    return Counter(node.op_type for node in _optimized_graph(model).node)


def find_float_layers(model: str | Path | onnx.ModelProto) -> tuple[int, dict[str, str]]:
    """(number of layers that onnxruntime computes in integers, output of each layer in floating point -> reason)."""
    graph = _optimized_graph(model)
    producers = {out: node for node in graph.node for out in node.output}
    consumers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node.op_type)
    integer_count, reasons = 0, {}
    for node in graph.node:
        integer_count += _computes_integers(node.op_type)
        if node.op_type in _FLOAT_OPS:
            producer = producers.get(node.input[0])
            targets = ", ".join(dict.fromkeys(consumers.get(node.output[0], []))) or "the caller"
            reads_integers = producer is not None and producer.op_type == "DequantizeLinear"
            reason = f"its result goes to {targets} in floating point" if reads_integers else "it reads floating point"
            reasons[node.output[0]] = reason
    return integer_count, reasons


def _computes_integers(op: str) -> bool:
    """Whether an operator is a layer with weights computed in integers."""
    return op.startswith("QLinearConv") or op in _INTEGER_OPS


def _optimized_graph(model: str | Path | onnx.ModelProto) -> onnx.GraphProto:
    """The graph that onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        if isinstance(model, onnx.ModelProto):
            source: str | bytes = model.SerializeToString()
        else:
            check_external_data(model)
            source = str(model)
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath, load_external_data=False).graph
