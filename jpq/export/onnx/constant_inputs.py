"""Linear layers that read constants (learned queries, coordinates of a grid), written so that integers multiply them.

onnxruntime makes a Gemm between two Reshapes of a MatMul of three dims and an addition, where the sizes are known. Of
constants it computes the integers as it loads the file, but not what dequantizes them; the Gemm then looks like one
that reads floating-point numbers, and onnxruntime (1.32) computes it by MatMulNBits, which rounds these to 8 bits of
its own. Here such a layer reads rows: its input is flattened to two dims before it is rounded, and its result reshaped.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, helper

from jpq.export.onnx.graph import Graph, has_subgraphs

_ROUNDING = ("QuantizeLinear", "Clip", "DequantizeLinear")


def read_constants_as_rows(model: onnx.ModelProto) -> None:
    """Let every MatMul of a rounded constant with a matrix multiply rows, in place. No number changes."""
    if has_subgraphs(model):
        return
    graph = Graph(model)
    constant = _constant_names(graph)
    for quantize in list(graph.proto.node):
        if quantize.op_type == "QuantizeLinear" and quantize.input[0] in constant:
            products = _products_of(graph, quantize)
            if products and not graph.array(quantize.input[1]).ndim:
                _multiply_rows(graph, quantize, products)


def _constant_names(graph: Graph) -> set[str]:
    """The tensors that depend on no input of the model."""
    names = set(graph.constants)
    for node in graph.proto.node:
        if all(name in names for name in node.input if name) and not node.op_type.startswith("Random"):
            names.update(node.output)
    return names


def _products_of(graph: Graph, quantize: NodeProto) -> list[NodeProto]:
    """The MatMuls that read what a QuantizeLinear rounds, if nothing else does."""
    node, products = quantize, []
    while node.op_type in _ROUNDING:
        products = [*graph.consumers[node.output[0]]]
        if node.output[0] in graph.outputs or not products:
            return []
        if node.op_type == "DequantizeLinear":
            break
        if len(products) > 1:
            return []
        node = products[0]
    first = all(product.op_type == "MatMul" and product.input[0] == node.output[0] for product in products)
    matrices = first and all(_is_matrix(graph, p.input[1]) and p.input[0] != p.input[1] for p in products)
    return products if node.op_type == "DequantizeLinear" and matrices else []


def _is_matrix(graph: Graph, name: str) -> bool:
    """Whether a tensor is a stored weight of two dims; keys of every sample, [batch, n, m], are none."""
    while name not in graph.constants:
        producer = graph.producers.get(name)
        if producer is None or producer.op_type not in (*_ROUNDING, "Transpose"):
            return False
        name = producer.input[0]
    return graph.array(name).ndim == 2


def _multiply_rows(graph: Graph, quantize: NodeProto, products: list[NodeProto]) -> None:
    """Put a Reshape to rows in front of the rounding, and one to the dims that there were behind every product."""
    source, name = quantize.input[0], quantize.output[0]
    zero, last = (graph.add_constant(f"int64.{n}", np.array([n])) for n in (0, -1))
    flat = helper.make_node("Flatten", [source], [f"{name}.flat"], axis=-1)
    nodes = [
        flat,
        helper.make_node("Shape", [source], [f"{name}.dims"]),
        helper.make_node("Slice", [f"{name}.dims", zero, last], [f"{name}.outer"]),
        helper.make_node("Concat", [f"{name}.outer", last], [f"{name}.back"], axis=0),
    ]
    for node in nodes:
        node.name = node.output[0]
    graph.insert(quantize, nodes)
    quantize.input[0] = flat.output[0]
    for product in products:
        result = product.output[0]
        product.output[0] = f"{result}.rows"
        back = helper.make_node("Reshape", [f"{result}.rows", f"{name}.back"], [result], name=f"{result}.back")
        graph.insert(product, [back], behind=True)
