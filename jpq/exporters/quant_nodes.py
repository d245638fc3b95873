"""A QONNX file in standard operators, so that onnxruntime can check it.

QONNX's Quant node (Pappalardo et al., 2022, arXiv:2206.07527, and the specification in the qonnx repository):

    y = (clip(round(x / scale + zero), low, high) - zero) * scale

with low = -2^(bits - 1) + narrow, high = 2^(bits - 1) - 1 where signed, else low = 0, high = 2^bits - 1 - narrow.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from jpq.exporters.graph import Graph
from jpq.types import JpqError

DOMAIN = "qonnx.custom_op.general"


def standard(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with each Quant node written out. Raises JpqError for other nodes or roundings of QONNX."""
    graph = Graph(model)
    for node in [n for n in graph.proto.node if n.domain not in ("", "ai.onnx")]:
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type != "Quant" or options.get("rounding_mode", b"ROUND") != b"ROUND":
            raise JpqError(f"A {node.op_type} node of {node.domain} has no standard form here.")
        x, scale, zero, bits = node.input
        width, signed, narrow = float(graph.array(bits)), bool(options["signed"]), int(options["narrow"])
        low, high = (-(2 ** (width - 1)) + narrow, 2 ** (width - 1) - 1) if signed else (0.0, 2**width - 1 - narrow)
        out = node.output[0]
        limits = [graph.keep(f"limit.{end}", np.array(end, np.float32)) for end in (low, high)]
        steps = [("Div", [x, scale]), ("Add", ["", zero]), ("Round", [""]), ("Clip", ["", *limits]),
                 ("Sub", ["", zero]), ("Mul", ["", scale])]  # fmt: skip
        made: list[onnx.NodeProto] = []
        for i, (op, inputs) in enumerate(steps):
            read = [made[-1].output[0], *inputs[1:]] if made else inputs
            made.append(helper.make_node(op, read, [out if i == len(steps) - 1 else f"{out}.step_{i}"]))
        graph.insert(node, made)
        graph.proto.node.remove(node)
    for entry in [o for o in model.opset_import if o.domain not in ("", "ai.onnx")]:
        model.opset_import.remove(entry)
    return model
