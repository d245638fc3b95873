"""Weights in the ONNX file at the narrowest type that holds them: INT4 (opset 21) or INT2 (opset 25).

The stored integers go through Cast, Mul by a power of two, Cast to the 8-bit integers that kernels read. All of that is
constant: onnxruntime and OpenVINO compute it once, when they load the file. Nothing is rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, version_converter

from jpq.export.onnx.graph import Graph, drop_unread
from jpq.types import JpqError, unknown

# type of the narrowest integers -> (opset, version of the format) that they need
WEIGHTS = {"int8": (17, 8), "int4": (21, 10), "int2": (25, 13)}

_HOLD = {"int2": (-2, 1, TensorProto.INT2), "int4": (-8, 7, TensorProto.INT4)}


def narrowed(model: onnx.ModelProto, weights: str) -> onnx.ModelProto:
    """The model with weights in "int8" (as it is), "int4" or "int2"; where a layer needs more bits, in the next wider.

    Raises JpqError for another name, and where onnx cannot bring the file to the opset that knows the type.
    """
    if weights not in WEIGHTS:
        raise unknown("type of weights", weights, WEIGHTS)
    if weights == "int8":
        return model
    opset, ir = WEIGHTS[weights]
    try:
        model = version_converter.convert_version(model, opset)
    except Exception as error:  # onnx's converter has no class of its own
        reason = " ".join(str(error).split())[:120]
        raise JpqError(
            f"Weights in {weights} need opset {opset}, which onnx cannot bring this model to ({reason}). Choose int8."
        ) from error
    model.ir_version = max(model.ir_version, ir)
    graph = Graph(model)
    for node in list(graph.proto.node):
        if node.op_type == "DequantizeLinear" and node.input[0] in graph.known:
            _narrow(graph, node, weights)
    drop_unread(model.graph)
    return model


def _narrow(graph: Graph, node: onnx.NodeProto, weights: str) -> None:
    """Store what one DequantizeLinear reads in fewer bits, where it fits."""
    name = node.input[0]
    integers = graph.array(name)
    if integers.dtype != np.int8 or not integers.size or graph.only_reader(name) is None:
        return
    wide = integers.astype(np.int32)
    factor = int(np.gcd.reduce(np.abs(wide), axis=None))
    factor = factor & -factor if factor else 1  # the largest power of two in all of them
    values = wide // factor
    kinds = ["int2", "int4"] if weights == "int2" else ["int4"]
    fits = [_HOLD[k] for k in kinds if _HOLD[k][0] <= values.min() and values.max() <= _HOLD[k][1]]
    if not fits:
        return
    tensor = helper.make_tensor(f"{name}.narrow", fits[0][2], values.shape, values.ravel().tolist())
    steps: list[tuple[str, str, dict[str, Any]]] = [("Cast", "", {"to": TensorProto.FLOAT})]
    if factor > 1:
        steps.append(("Mul", graph.keep(f"times.{factor}", np.array(factor, np.float32)), {}))
    nodes: list[onnx.NodeProto] = []
    read = graph.keep(tensor.name, _packed(tensor))
    for op, other, options in [*steps, ("Cast", "", {"to": TensorProto.INT8})]:
        out = f"{name}.wide_{len(nodes)}"
        nodes.append(helper.make_node(op, [read, other] if other else [read], [out], name=out, **options))
        read = out
    graph.insert(node, nodes)
    node.input[0] = read


def _packed(tensor: TensorProto) -> TensorProto:
    """With its values as bytes: the other form takes 4 bytes for each."""
    if not tensor.HasField("raw_data"):
        packed = np.array(tensor.int32_data, np.uint8) if len(tensor.int32_data) else np.zeros(0, np.uint8)
        del tensor.int32_data[:]
        tensor.raw_data = packed.tobytes()
    return tensor
