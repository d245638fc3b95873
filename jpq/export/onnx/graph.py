"""`Graph`: an ONNX graph with its constants, producers and consumers looked up by tensor name.

Rewrites of an exported file work on it; this module holds those that only tidy up and change no number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

_SUBGRAPH_TYPES = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)

# operators that shape and move numbers; constants behind operators that round or multiply stay where they are
_FOLDED_OPS = {
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


class Graph:
    """A model's graph: its constants, the node that produces each tensor, the nodes that consume it.

    `outputs` are the tensors that the graph returns, and those that graphs inside its nodes (If, Loop) read.
    """

    def __init__(self, model: onnx.ModelProto):
        self.model, self.proto = model, model.graph
        self.constants: dict[str, TensorProto] = {t.name: t for t in self.proto.initializer}
        for node in self.proto.node:
            if node.op_type == "Constant" and node.attribute[0].HasField("t"):
                self.constants[node.output[0]] = node.attribute[0].t
        self.producers = {out: n for n in self.proto.node for out in n.output}
        self.consumers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.proto.node:
            for name in node.input:
                self.consumers[name].append(node)
        self.outputs = {o.name for o in self.proto.output} | _names_read_inside(self.proto)

    def array(self, name: str) -> np.ndarray:
        """The value of a constant."""
        return numpy_helper.to_array(self.constants[name])

    def all_constant(self, names: Any) -> bool:
        """Whether every named tensor is a constant."""
        return all(name in self.constants for name in names)

    def add_constant(self, name: str, value: Any) -> str:
        """Add a constant unless one of that name is there already; returns the name."""
        if name not in self.constants:
            tensor = value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value), name)
            self.proto.initializer.append(tensor)
            self.constants[name] = tensor
        return name

    def only_consumer(self, name: str) -> NodeProto | None:
        """The single node that consumes a tensor; None where several do, or where it is an output of the model."""
        return self.consumers[name][0] if len(self.consumers[name]) == 1 and name not in self.outputs else None

    def insert(self, place: NodeProto, nodes: list[NodeProto], behind: bool = False) -> None:
        """Put nodes in front of the node `place`, or behind it."""
        at = next(i for i, n in enumerate(self.proto.node) if n.output[0] == place.output[0])
        for node in reversed(nodes):
            self.proto.node.insert(at + behind, node)


def has_subgraphs(model: onnx.ModelProto) -> bool:
    """Whether nodes (If, Loop) hold graphs of their own, which may read any tensor."""
    return any(a.type in _SUBGRAPH_TYPES for n in model.graph.node for a in n.attribute)


def unlist_initializers(graph: Any) -> None:
    """Remove initializers from the graph's inputs: a runtime takes listed ones for values that a caller may replace."""
    names = {t.name for t in graph.initializer}
    for entry in [i for i in graph.input if i.name in names]:
        graph.input.remove(entry)


def declare_unread_inputs(graph: Any, inputs: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]]) -> None:
    """List the model's inputs that nothing reads, which torch.onnx leaves out: the file takes what the model takes.

    Args:
        graph: with its other inputs.
        inputs: all of them, in order; axes: the names of their dims that are free.
    """
    listed = {entry.name: entry for entry in graph.input}
    for name, value in inputs.items():
        if name not in listed:
            kind = helper.np_dtype_to_tensor_dtype(value.detach().cpu().numpy().dtype)
            free = axes.get(name, {})
            shape = [free.get(dim, size) for dim, size in enumerate(value.shape)]
            listed[name] = helper.make_tensor_value_info(name, kind, shape)
    entries = [listed[name] for name in inputs]
    del graph.input[:]
    graph.input.extend(entries)


def write_out_same_padding(graph: Any) -> None:
    """Give convolutions padded to "the same size" their pads in numbers: onnxruntime has no other where they dilate.

    Strides are 1, as torch demands; of an odd number the last pad is one larger, as in torch.
    """
    for node in [n for n in graph.node if n.op_type == "Conv"]:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if attributes.get("auto_pad", b"NOTSET") not in (b"SAME_UPPER", b"SAME_LOWER"):
            continue
        kernel = attributes["kernel_shape"]
        totals = [d * (k - 1) for k, d in zip(kernel, attributes.get("dilations", [1] * len(kernel)), strict=True)]
        pads = [total // 2 for total in totals] + [total - total // 2 for total in totals]
        kept = [a for a in node.attribute if a.name not in ("auto_pad", "pads")]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("pads", pads)])


def remove_unused_constants(graph: Any) -> None:
    """Remove initializers (with their entries among the inputs) and Constant nodes that no node reads."""
    read = {i for n in graph.node for i in n.input} | {o.name for o in graph.output} | _names_read_inside(graph)
    unused = {t.name for t in graph.initializer if t.name not in read}
    for group in (graph.initializer, graph.input):
        for item in [x for x in group if x.name in unused]:
            group.remove(item)
    for node in [n for n in graph.node if n.op_type == "Constant" and n.output[0] not in read]:
        graph.node.remove(node)


def share_equal_weights(graph: Any) -> None:
    """Store weights once that several nodes read, as the steps of a recurrent layer do: equal initializers of 2+ dims.

    Fewer dims are left alone: rewrites know them by name, and they hold little.
    """
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    renamed: dict[str, str] = {}
    for tensor in graph.initializer:
        if len(tensor.dims) > 1:
            key = (tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes())
            if (name := first.setdefault(key, tensor.name)) != tensor.name:
                renamed[tensor.name] = name
    read_inside = _names_read_inside(graph) | {o.name for o in graph.output}
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in renamed and name not in read_inside:
                node.input[i] = renamed[name]
    remove_unused_constants(graph)


def _names_read_inside(graph: Any) -> set[str]:
    """Names of the tensors that the graphs inside a graph's nodes (If, Loop) read or return."""
    names: set[str] = set()
    for attribute in [a for n in graph.node for a in n.attribute if a.type in _SUBGRAPH_TYPES]:
        for inner in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
            names |= {i for n in inner.node for i in n.input} | {o.name for o in inner.output}
            names |= _names_read_inside(inner)
    return names


def fold_constants(model: onnx.ModelProto) -> None:
    """Compute shapes and moved numbers that are constant, in place. Rounding and products of constants stay."""
    if has_subgraphs(model):
        return
    graph = Graph(model)
    for node in list(graph.proto.node):  # in the order of execution
        inputs = [name for name in node.input if name]
        if node.op_type in _FOLDED_OPS and node.domain == "" and graph.all_constant(inputs):
            for name, value in zip(node.output, _evaluate(graph, node, inputs), strict=True):
                graph.add_constant(name, value)
            graph.proto.node.remove(node)
    remove_unused_constants(model.graph)


def _evaluate(graph: Graph, node: NodeProto, inputs: list[str]) -> list[Any]:
    """The outputs of a node whose inputs are constants."""
    values = [helper.make_tensor_value_info(name, graph.constants[name].data_type, None) for name in inputs]
    outputs = [helper.make_value_info(name, onnx.TypeProto()) for name in node.output]
    model = helper.make_model(
        helper.make_graph([node], "constant", values, outputs), opset_imports=graph.model.opset_import, ir_version=8
    )
    return list(ReferenceEvaluator(model).run(None, {name: graph.array(name) for name in inputs}))
