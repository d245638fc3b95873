"""Dequantization of the weights of transposed convolutions, written out as Cast, Add and Mul.

OpenVINO (2026.4) leaves out the zero point of a DequantizeLinear whose result is the weight of a ConvTranspose, and its
integer kernels saturate where weights have no zero point (integer_kernels.py). Cast, Add of minus the zero point and
Mul by the scale give the same numbers to the bit, and OpenVINO computes them once, when it loads the file. onnxruntime
computes transposed convolutions in floating point either way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from jpq.export.onnx.graph import Graph, remove_unused_constants


def write_out_transposed_weights(model: onnx.ModelProto) -> None:
    """Replace each DequantizeLinear that only ConvTranspose nodes read, as their weight, in place."""
    graph = Graph(model)
    for node in list(graph.proto.node):
        if node.op_type == "DequantizeLinear" and _is_transposed_weight(graph, node):
            _write_out(graph, node)
    remove_unused_constants(model.graph)


def _is_transposed_weight(graph: Graph, dequantize: NodeProto) -> bool:
    """Whether ConvTranspose nodes, and nothing else, read the result as their weight; its grid must be constant."""
    result, grid = dequantize.output[0], dequantize.input[1:]
    if len(grid) != 2 or not graph.all_constant(grid) or result in graph.outputs:
        return False
    return all(node.op_type == "ConvTranspose" and node.input[1] == result for node in graph.consumers[result])


def _write_out(graph: Graph, dequantize: NodeProto) -> None:
    """Put Cast, Add and Mul in the place of one DequantizeLinear."""
    result = dequantize.output[0]
    scale, zero_point = (graph.array(name) for name in dequantize.input[1:])
    convolution = graph.consumers[result][0]
    rank = 2 + next(len(a.ints) for a in convolution.attribute if a.name == "kernel_shape")
    axis = next((a.i for a in dequantize.attribute if a.name == "axis"), 1) % rank
    shape = (-1, *[1] * (rank - axis - 1)) if scale.ndim else ()  # beside the weight's dims, whose last ones are 1
    offset = -zero_point.astype(np.float32).reshape(shape)
    steps: list[tuple[str, list[str], dict[str, Any]]] = [
        ("Cast", [], {"to": TensorProto.FLOAT}),
        ("Add", [graph.add_constant(f"{result}.offset", offset)], {}),
        ("Mul", [graph.add_constant(f"{result}.scale", scale.reshape(shape))], {}),
    ]
    nodes, source = list[NodeProto](), dequantize.input[0]
    for i, (op, operands, options) in enumerate(steps):
        name = result if i == len(steps) - 1 else f"{result}.step_{i}"
        nodes.append(helper.make_node(op, [source, *operands], [name], name=f"{result}.{op}", **options))
        source = name
    graph.insert(dequantize, nodes)
    graph.proto.node.remove(dequantize)
