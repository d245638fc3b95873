"""A second rounding of some weights, which changes nothing: it keeps OpenVINO from computing something else.

OpenVINO's "dynamic quantization", on by default, rounds the inputs of a linear layer to 8 bits of its own where the
weights are stored in 8 bits or fewer and 32 inputs or more are read. And OpenVINO 2026.4 leaves out the zero point of
the weights of a transposed convolution. Weights that are dequantized, rounded to the grid they are on already, and
dequantized again are taken for computed ones: both are then exact. onnxruntime removes the second pair when it loads
the file, and uses its integer kernels as before; nor does it round such weights to 8 bits of its own, as it does with
those of a transposed convolution that no DequantizeLinear gives.
"""

from __future__ import annotations

import onnx
from onnx import NodeProto, helper

from jpq.export.onnx.graph import Graph, has_subgraphs

_READERS = ("Gemm", "MatMul", "ConvTranspose")


def round_weights_twice(model: onnx.ModelProto) -> None:
    """Put a second QuantizeLinear and DequantizeLinear behind constant weights that only `_READERS` read, in place."""
    if has_subgraphs(model):
        return
    graph = Graph(model)
    for node in list(graph.proto.node):
        if node.op_type == "DequantizeLinear" and _is_weight(graph, node):
            _round_again(graph, node)


def _is_weight(graph: Graph, dequantize: NodeProto) -> bool:
    """Whether a node gives a constant weight that only matrix products and transposed convolutions read."""
    result, consumers = dequantize.output[0], graph.consumers[dequantize.output[0]]
    if len(dequantize.input) != 3 or not graph.all_constant(dequantize.input[1:]) or result in graph.outputs:
        return False
    stored = dequantize.input[0] in graph.constants or _is_widened(graph, dequantize.input[0])
    return stored and bool(consumers) and all(node.op_type in _READERS for node in consumers)


def _is_widened(graph: Graph, name: str) -> bool:
    """Whether a tensor is computed from constants alone, as weights of fewer than 8 bits are."""
    producer = graph.producers.get(name)
    while producer is not None and producer.op_type in ("Cast", "Mul", "Add"):
        if graph.all_constant(producer.input):
            return True
        producer = graph.producers.get(producer.input[0])
    return False


def _round_again(graph: Graph, dequantize: NodeProto) -> None:
    """Put the second pair behind one DequantizeLinear."""
    result, grid = dequantize.output[0], dequantize.input[1:]
    dequantize.output[0] = f"{result}.once"
    nodes = [
        helper.make_node("QuantizeLinear", [f"{result}.once", *grid], [f"{result}.rounded"]),
        helper.make_node("DequantizeLinear", [f"{result}.rounded", *grid], [result]),
    ]
    for node in nodes:
        node.name = node.output[0]
        node.attribute.extend(dequantize.attribute)
    graph.insert(dequantize, nodes, behind=True)
