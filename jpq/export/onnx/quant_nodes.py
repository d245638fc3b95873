"""QONNX's Quant nodes written out in standard ONNX operators, so that onnxruntime can run a QONNX file."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from jpq.export.onnx.graph import Graph
from jpq.types import JpqError

STANDARD_DOMAINS = ("", "ai.onnx")


def expand_quant_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace each Quant node by Div, Add, Round, Clip, Sub and Mul, in place.

    Raises JpqError for other nodes or roundings of QONNX.
    """
    graph = Graph(model)
    for node in [n for n in graph.proto.node if n.domain not in STANDARD_DOMAINS]:
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type != "Quant" or options.get("rounding_mode", b"ROUND") != b"ROUND":
            raise JpqError(f"A {node.op_type} node of {node.domain} has no standard form here.")
        _expand(graph, node, bool(options["signed"]), int(options["narrow"]))
    for entry in [o for o in model.opset_import if o.domain not in STANDARD_DOMAINS]:
        model.opset_import.remove(entry)
    return model


def _expand(graph: Graph, quant: onnx.NodeProto, signed: bool, narrow: int) -> None:
    """Replace one Quant node. `narrow` is 1 where the grid leaves out its outermost integer."""
    x, scale, zero, bits = quant.input
    width = float(graph.array(bits))
    low, high = (-(2 ** (width - 1)) + narrow, 2 ** (width - 1) - 1) if signed else (0.0, 2**width - 1 - narrow)
    limits = [graph.add_constant(f"limit.{end}", np.array(end, np.float32)) for end in (low, high)]
    steps = [("Div", [scale]), ("Add", [zero]), ("Round", []), ("Clip", limits), ("Sub", [zero]), ("Mul", [scale])]
    result, source = quant.output[0], x
    nodes: list[onnx.NodeProto] = []
    for i, (op, operands) in enumerate(steps):
        name = result if i == len(steps) - 1 else f"{result}.step_{i}"
        nodes.append(helper.make_node(op, [source, *operands], [name]))
        source = name
    graph.insert(quant, nodes)
    graph.proto.node.remove(quant)
