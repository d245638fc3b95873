"""Nodes of an ONNX file that depend on constants alone, computed once: exporters write a padding as a dozen of them."""

from __future__ import annotations

import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from jpq.exporters.graph import Graph, drop_unread, nested

_FOLDED = {
    "Cast", "Concat", "ConstantOfShape", "Gather", "Identity", "Range", "Reshape", "Slice", "Squeeze", "Transpose",
    "Unsqueeze",
}  # fmt: skip


def fold_constants(model: onnx.ModelProto) -> None:
    """Compute them, in place: those that shape and move numbers. What rounds numbers, or multiplies them, stays."""
    if nested(model):
        return
    graph = Graph(model)
    for node in list(graph.proto.node):  # in the order of execution
        given = [name for name in node.input if name]
        if node.op_type in _FOLDED and node.domain == "" and all(name in graph.known for name in given):
            values = [helper.make_tensor_value_info(name, graph.known[name].data_type, None) for name in given]
            made = [helper.make_value_info(name, onnx.TypeProto()) for name in node.output]
            alone = helper.make_model(
                helper.make_graph([node], "constant", values, made), opset_imports=model.opset_import, ir_version=8
            )
            feed = {name: graph.array(name) for name in given}
            for name, value in zip(node.output, ReferenceEvaluator(alone).run(None, feed), strict=True):
                graph.keep(name, value)
            graph.proto.node.remove(node)
    drop_unread(model.graph)
