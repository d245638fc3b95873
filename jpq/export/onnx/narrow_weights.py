"""INT4 and INT2 storage of weights in an ONNX file (opset 21 and 25): `--onnx-weights`.

The stored integers go through Cast, Mul by a power of two, Add of 128, and Cast to the uint8 that kernels read (see
integer_kernels.py). A channel whose grid has its additional level above zero (-1..2) is stored mirrored, as -2..1, and
multiplied by minus the power of two, one factor per channel. All of that is constant: onnxruntime and OpenVINO compute
it once, when they load the file. Nothing is rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, version_converter

from jpq.export.onnx.graph import Graph, remove_unused_constants
from jpq.export.onnx.integer_kernels import UINT8_MIDDLE
from jpq.types import JpqError, unknown

# narrowest type of stored weights -> (opset, version of the file format) that knows it
WEIGHTS = {"int8": (17, 8), "int4": (21, 10), "int2": (25, 13)}

# type -> (smallest integer, largest integer, ONNX data type)
_RANGES = {"int2": (-2, 1, TensorProto.INT2), "int4": (-8, 7, TensorProto.INT4)}


def store_narrow_weights(model: onnx.ModelProto, weights: str) -> onnx.ModelProto:
    """Store weights in 8 bits (no change), "int4" or "int2"; a layer that needs more bits takes the next wider type.

    The model's weights are uint8 around 128, as `prepare_integer_kernels` leaves them.

    Raises JpqError for another name, and where onnx cannot bring the file to the opset that knows the type.
    """
    if weights not in WEIGHTS:
        raise unknown("type of weights", weights, WEIGHTS)
    if weights == "int8":
        return model
    opset, ir_version = WEIGHTS[weights]
    try:
        model = version_converter.convert_version(model, opset)
    except Exception as error:  # onnx's converter has no class of its own
        reason = " ".join(str(error).split())[:120]
        raise JpqError(
            f"Weights in {weights} need opset {opset}, which onnx cannot bring this model to ({reason}). Choose int8."
        ) from error
    model.ir_version = max(model.ir_version, ir_version)
    graph = Graph(model)
    for node in list(graph.proto.node):
        if node.op_type == "DequantizeLinear" and node.input[0] in graph.constants:
            _store_narrow(graph, node, weights)
    remove_unused_constants(model.graph)
    return model


def _store_narrow(graph: Graph, dequantize: onnx.NodeProto, weights: str) -> None:
    """Store the integers that one DequantizeLinear reads in fewer bits, where they fit."""
    name = dequantize.input[0]
    if not _is_symmetric_uint8(graph, dequantize) or graph.only_consumer(name) is None:
        return
    wide = graph.array(name).astype(np.int32) - UINT8_MIDDLE
    divisor = int(np.gcd.reduce(np.abs(wide), axis=None))
    factor = divisor & -divisor if divisor else 1  # the largest power of two that divides every integer
    axis = next((a.i for a in dequantize.attribute if a.name == "axis"), 1)
    per_channel = graph.array(dequantize.input[1]).ndim > 0
    kinds = ["int2", "int4"] if weights == "int2" else ["int4"]
    for kind in kinds:
        low, high, data_type = _RANGES[kind]
        signs = _mirrored(wide // factor, high, axis if per_channel else None)
        values = wide // factor * signs
        if low <= values.min() and values.max() <= high:
            break
    else:
        return
    tensor = helper.make_tensor(f"{name}.narrow", data_type, values.shape, values.ravel().tolist())
    steps: list[tuple[str, str, dict[str, Any]]] = [("Cast", "", {"to": TensorProto.FLOAT})]
    if (signs < 0).any():
        steps.append(("Mul", graph.add_constant(f"{name}.factors", (factor * signs).astype(np.float32)), {}))
    elif factor > 1:
        steps.append(("Mul", graph.add_constant(f"times.{factor}", np.array(factor, np.float32)), {}))
    steps.append(("Add", graph.add_constant("plus.128", np.array(UINT8_MIDDLE, np.float32)), {}))
    nodes: list[onnx.NodeProto] = []
    source = graph.add_constant(tensor.name, _as_raw_bytes(tensor))
    for op, operand, options in [*steps, ("Cast", "", {"to": TensorProto.UINT8})]:
        result = f"{name}.wide_{len(nodes)}"
        inputs = [source, operand] if operand else [source]
        nodes.append(helper.make_node(op, inputs, [result], name=result, **options))
        source = result
    graph.insert(dequantize, nodes)
    dequantize.input[0] = source


def _mirrored(values: np.ndarray, high: int, axis: int | None) -> np.ndarray:
    """-1 for the channels along an axis (None: for the tensor) with integers above `high`, else 1; broadcasts."""
    others = None if axis is None else tuple(i for i in range(values.ndim) if i != axis % values.ndim)
    return np.where(values.max(axis=others, keepdims=True) > high, -1, 1)


def _is_symmetric_uint8(graph: Graph, dequantize: onnx.NodeProto) -> bool:
    """Whether a DequantizeLinear reads constant uint8 integers, at least one, around zero points of 128."""
    if len(dequantize.input) != 3 or not graph.all_constant(dequantize.input):
        return False
    integers, _, zero_points = (graph.array(name) for name in dequantize.input)
    return bool(integers.dtype == np.uint8 and integers.size and (zero_points == UINT8_MIDDLE).all())


def _as_raw_bytes(tensor: TensorProto) -> TensorProto:
    """The tensor with its values as raw bytes: the other form takes 4 bytes for each."""
    if not tensor.HasField("raw_data"):
        data = np.array(tensor.int32_data, np.uint8) if len(tensor.int32_data) else np.zeros(0, np.uint8)
        del tensor.int32_data[:]
        tensor.raw_data = data.tobytes()
    return tensor
