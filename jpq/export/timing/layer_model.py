"""ONNX models of one layer, to be timed: in float, or quantized to 8 bits as jpq exports it (QDQ).

Copies of the layer (with weights of their own) read one input, so that the cost of a call can be told from the layer's.
Convolutions and linear layers are followed by ReLU, which runtimes fuse with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from jpq.costs.latency_table import Shape
from jpq.export.onnx.integer_kernels import UINT8_MIDDLE
from jpq.tracing.network import LayerKind

OPSET = 17

IR_VERSION = 9

SCALE = 0.05  # scale of every grid; its value does not change the time

_TYPES = {"int8": TensorProto.UINT8, "float": TensorProto.FLOAT}  # of activations, by the words of a form


def layer_model(shape: Shape, inputs: int, outputs: int, copies: int, form: str | None = None) -> ModelProto:
    """An ONNX model of `copies` layers of this shape side by side, for one sample.

    Args:
        shape: kernel, stride, groups and output size of the layer.
        inputs, outputs: numbers of channels.
        copies: number of layers.
        form: types of the input and the output of a quantized layer, such as "float>int8"; None: a float layer.

    Padding is half the kernel (rounded down), dilation 1: the same work at the same places, whatever the layer's own.
    """
    source, target = (form or "float>float").split(">")
    constants, nodes = (_grids(outputs) if form else {}), list[NodeProto]()
    rng = np.random.default_rng(0)
    for i in range(copies):
        layer_constants, layer_nodes = _copy_of_layer(shape, inputs, outputs, i, form, rng)
        constants |= layer_constants
        nodes += layer_nodes
    input_size = _input_size(shape, inputs)
    x = helper.make_tensor_value_info("x", _TYPES[source], input_size)
    result_name = "out" if target == "int8" else "r"
    free = [None] * len(input_size)
    results = [helper.make_tensor_value_info(f"{result_name}{i}", _TYPES[target], free) for i in range(copies)]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    return _model(helper.make_graph(nodes, "layer", [x], results, tensors))


def empty_model() -> ModelProto:
    """An ONNX model with almost no work, whose time is the overhead of a call."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1]) for name in "xy")
    return _model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "call", [x], [y]))


def _model(graph: Any) -> ModelProto:
    """An ONNX model of these nodes and constants."""
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _grids(outputs: int) -> dict[str, np.ndarray]:
    """Scales and zero points that the quantized copies share."""
    return {
        "scale": np.array(SCALE, np.float32),
        "zero": np.array(0, np.uint8),
        "middle": np.array(UINT8_MIDDLE, np.uint8),
        "scales": np.full(outputs, SCALE, np.float32),
        "middles": np.full(outputs, UINT8_MIDDLE, np.uint8),
    }


def _copy_of_layer(
    shape: Shape, inputs: int, outputs: int, i: int, form: str | None, rng: np.random.Generator
) -> tuple[Mapping[str, np.ndarray], list[NodeProto]]:
    """(constants, nodes) of the layer number `i`, from "x" to "r{i}" or "out{i}"."""
    size = _weight_size(shape, inputs, outputs)
    values = rng.integers(1, 256, size).astype(np.uint8) if form else rng.normal(0, 0.1, size).astype(np.float32)
    constants: dict[str, np.ndarray] = {f"w{i}": values, f"b{i}": np.zeros(outputs, np.float32)}
    nodes, x, weight = list[NodeProto](), "x", f"w{i}"
    if form:
        weight = f"dw{i}"
        nodes.append(_dequantized_weight(shape, size, outputs, i))
        x = f"x{i}"
        integers, scale = "x", "scale"
        if form.startswith("float"):  # every copy quantizes for itself, on a grid of its own: nothing is shared
            integers, scale = f"q{i}", f"scale{i}"
            constants[scale] = np.array(SCALE * (1 + i / 64), np.float32)
            nodes.append(helper.make_node("QuantizeLinear", ["x", scale, "zero"], [integers]))
        nodes.append(helper.make_node("DequantizeLinear", [integers, scale, "zero"], [x]))
    nodes.append(_layer_node(shape, inputs, [x, weight, f"b{i}"], f"y{i}"))
    nodes.append(helper.make_node("Relu", [f"y{i}"], [f"r{i}"]))
    if form and form.endswith("int8"):
        nodes.append(helper.make_node("QuantizeLinear", [f"r{i}", "scale", "zero"], [f"out{i}"]))
    return constants, nodes


def _dequantized_weight(shape: Shape, size: tuple[int, ...], outputs: int, i: int) -> NodeProto:
    """The DequantizeLinear of a weight, per output channel where it has a dim of them."""
    axis = 0 if shape.kind == "depthwise" else LayerKind(shape.kind).output_dim
    per_channel = size[axis] == outputs
    grid = ["scales", "middles"] if per_channel else ["scale", "middle"]
    options: dict[str, Any] = {"axis": axis} if per_channel else {}
    return helper.make_node("DequantizeLinear", [f"w{i}", *grid], [f"dw{i}"], **options)


def _layer_node(shape: Shape, inputs: int, operands: list[str], result: str) -> NodeProto:
    """The Gemm, Conv or ConvTranspose itself, on its input, weight and bias."""
    if shape.kind == LayerKind.LINEAR:
        return helper.make_node("Gemm", operands, [result], transB=1)
    options: dict[str, Any] = {
        "kernel_shape": list(shape.kernel),
        "strides": list(shape.stride),
        "group": inputs if shape.kind == "depthwise" else shape.groups,
    }
    if shape.kind == LayerKind.CONV_TRANSPOSE:
        return helper.make_node("ConvTranspose", operands, [result], **options)
    return helper.make_node("Conv", operands, [result], **options, pads=[k // 2 for k in shape.kernel] * 2)


def _input_size(shape: Shape, inputs: int) -> list[int]:
    """Size of the layer's input for one sample."""
    if shape.kind == LayerKind.LINEAR:
        return [max(1, prod(shape.size)), inputs]
    if shape.kind == LayerKind.CONV_TRANSPOSE:
        return [1, inputs, *shape.size]
    sides = zip(shape.size, shape.stride, shape.kernel, strict=True)
    return [1, inputs, *(max(1, (n - 1) * s + k - 2 * (k // 2)) for n, s, k in sides)]


def _weight_size(shape: Shape, inputs: int, outputs: int) -> tuple[int, ...]:
    """Size of the layer's weight, as torch has it."""
    if shape.kind == LayerKind.LINEAR:
        return outputs, inputs
    if shape.kind == "depthwise":
        return (outputs, 1, *shape.kernel)
    if shape.kind == LayerKind.CONV_TRANSPOSE:
        return (inputs, outputs // shape.groups, *shape.kernel)
    return (outputs, inputs // shape.groups, *shape.kernel)
