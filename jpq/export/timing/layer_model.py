"""One layer as an ONNX model of its own, to be timed: float, or quantized to 8 bits as jpq exports it (QDQ).

Copies of the layer (with weights of their own) read one input, so that the cost of a call can be told from the layer's.
Convolutions and linear layers are followed by ReLU, which runtimes fuse with them.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from jpq.costs.latency_table import Shape
from jpq.tracing.network import LayerKind

OPSET = 17

IR = 9

SCALE = 0.05  # of every grid: what the numbers are does not matter for time


def layer_model(shape: Shape, inputs: int, outputs: int, copies: int, form: str | None = None) -> ModelProto:
    """`copies` layers of this shape side by side, one sample.

    `form` says what a quantized layer reads and hands on, such as "float>int8"; None: a float layer. Padding is half
    the kernel (rounded down), dilation 1: the same work at the same places, whatever the layer's own.
    """
    rng = np.random.default_rng(0)
    int8 = form is not None
    reads, hands = (form or "float>float").split(">")
    kinds = {"int8": TensorProto.UINT8, "float": TensorProto.FLOAT}
    x = helper.make_tensor_value_info("x", kinds[reads], _input(shape, inputs))
    nodes: list[NodeProto] = []
    grids: dict[str, np.ndarray] = {
        "scale": np.array(SCALE, np.float32),
        "zero": np.array(0, np.uint8),
        "zero8": np.array(0, np.int8),
        "scales": np.full(outputs, SCALE, np.float32),
        "zeros": np.zeros(outputs, np.int8),
    }
    tensors = [numpy_helper.from_array(value, name) for name, value in grids.items()] if int8 else []
    size = _weight(shape, inputs, outputs)
    axis = 0 if shape.kind == "depthwise" else LayerKind(shape.kind).output_dim
    for i in range(copies):
        stored = rng.integers(-127, 128, size).astype(np.int8) if int8 else rng.normal(0, 0.1, size).astype(np.float32)
        tensors.append(numpy_helper.from_array(stored, f"w{i}"))
        tensors.append(numpy_helper.from_array(np.zeros(outputs, np.float32), f"b{i}"))
        weight = f"w{i}"
        if int8:
            grid = ["scales", "zeros"] if size[axis] == outputs else ["scale", "zero8"]
            options: dict[str, Any] = {"axis": axis} if grid[0] == "scales" else {}
            nodes.append(helper.make_node("DequantizeLinear", [weight, *grid], [f"dw{i}"], **options))
            weight = f"dw{i}"
        read = "x"
        if reads == "float" and int8:  # every copy quantizes for itself, on a grid of its own: nothing is shared
            tensors.append(numpy_helper.from_array(np.array(SCALE * (1 + i / 64), np.float32), f"scale{i}"))
            nodes.append(helper.make_node("QuantizeLinear", ["x", f"scale{i}", "zero"], [f"q{i}"]))
            read = f"q{i}"
        if int8:
            grid_in = f"scale{i}" if reads == "float" else "scale"
            nodes.append(helper.make_node("DequantizeLinear", [read, grid_in, "zero"], [f"x{i}"]))
            read = f"x{i}"
        nodes += _layer(shape, inputs, read, weight, f"b{i}", f"y{i}")
        nodes.append(helper.make_node("Relu", [f"y{i}"], [f"r{i}"]))
        if hands == "int8":
            nodes.append(helper.make_node("QuantizeLinear", [f"r{i}", "scale", "zero"], [f"out{i}"]))
    free = [None] * len(_input(shape, inputs))
    results = [
        helper.make_tensor_value_info(f"{'out' if hands == 'int8' else 'r'}{i}", kinds[hands], free)
        for i in range(copies)
    ]
    graph = helper.make_graph(nodes, "layer", [x], results, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)


def call_model() -> ModelProto:
    """A model that does next to nothing: what a call costs by itself."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "call", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)


def _input(shape: Shape, inputs: int) -> list[int]:
    if shape.kind == LayerKind.LINEAR:
        return [max(1, prod(shape.size)), inputs]
    if shape.kind == LayerKind.CONV_TRANSPOSE:
        return [1, inputs, *shape.size]
    sides = zip(shape.size, shape.stride, shape.kernel, strict=True)
    return [1, inputs, *(max(1, (n - 1) * s + k - 2 * (k // 2)) for n, s, k in sides)]


def _weight(shape: Shape, inputs: int, outputs: int) -> tuple[int, ...]:
    if shape.kind == LayerKind.LINEAR:
        return outputs, inputs
    if shape.kind == "depthwise":
        return (outputs, 1, *shape.kernel)
    if shape.kind == LayerKind.CONV_TRANSPOSE:
        return (inputs, outputs // shape.groups, *shape.kernel)
    return (outputs, inputs // shape.groups, *shape.kernel)


def _layer(shape: Shape, inputs: int, x: str, weight: str, bias: str, y: str) -> list[NodeProto]:
    if shape.kind == LayerKind.LINEAR:
        return [helper.make_node("Gemm", [x, weight, bias], [y], transB=1)]
    op = "ConvTranspose" if shape.kind == LayerKind.CONV_TRANSPOSE else "Conv"
    options: dict[str, Any] = {
        "kernel_shape": list(shape.kernel),
        "strides": list(shape.stride),
        "group": inputs if shape.kind == "depthwise" else shape.groups,
        "pads": [] if op == "ConvTranspose" else [k // 2 for k in shape.kernel] * 2,
    }
    return [helper.make_node(op, [x, weight, bias], [y], **{k: v for k, v in options.items() if v != []})]
