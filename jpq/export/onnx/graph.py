"""An ONNX graph with its constants and its edges at hand, for rewrites that change no number."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)

_FOLDED = {
    "Cast",
    "Concat",
    "ConstantOfShape",
    "Gather",
    "Identity",
    "Range",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}


def nested(model: onnx.ModelProto) -> bool:
    """Whether nodes hold graphs of their own, which may read anything."""
    return any(a.type in _GRAPHS for n in model.graph.node for a in n.attribute)


class Graph:
    """A model's graph: what is constant, which node makes a tensor, which nodes read it."""

    def __init__(self, model: onnx.ModelProto):
        self.model, self.proto = model, model.graph
        self.known: dict[str, TensorProto] = {t.name: t for t in self.proto.initializer}
        for node in self.proto.node:
            if node.op_type == "Constant" and node.attribute[0].HasField("t"):
                self.known[node.output[0]] = node.attribute[0].t
        self.makers = {out: n for n in self.proto.node for out in n.output}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.proto.node:
            for name in node.input:
                self.readers[name].append(node)
        self.results = {o.name for o in self.proto.output}

    def array(self, name: str) -> np.ndarray:
        """The value of a constant."""
        return numpy_helper.to_array(self.known[name])

    def keep(self, name: str, value: Any) -> str:
        """A new constant of that name, or the one that is there already."""
        if name not in self.known:
            tensor = value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value), name)
            self.proto.initializer.append(tensor)
            self.known[name] = tensor
        return name

    def only_reader(self, name: str) -> NodeProto | None:
        """The node that alone reads a tensor; None where several do, or the caller of the model."""
        return self.readers[name][0] if len(self.readers[name]) == 1 and name not in self.results else None

    def insert(self, place: NodeProto, nodes: list[NodeProto], behind: bool = False) -> None:
        """Put nodes in front of a node, or behind it."""
        at = next(i for i, n in enumerate(self.proto.node) if n.output[0] == place.output[0])
        for node in reversed(nodes):
            self.proto.node.insert(at + behind, node)


def own_constants(graph: Any) -> None:
    """Take initializers off the list of inputs, as which a runtime thinks that a caller may replace them."""
    held = {t.name for t in graph.initializer}
    for entry in [i for i in graph.input if i.name in held]:
        graph.input.remove(entry)


def drop_unread(graph: Any) -> None:
    """Take out initializers (with their entries among the inputs) and constants that nothing reads any more."""
    read = {i for n in graph.node for i in n.input} | {o.name for o in graph.output}
    unread = {t.name for t in graph.initializer if t.name not in read}
    for group in (graph.initializer, graph.input):
        for item in [x for x in group if x.name in unread]:
            group.remove(item)
    for node in [n for n in graph.node if n.op_type == "Constant" and n.output[0] not in read]:
        graph.node.remove(node)


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
