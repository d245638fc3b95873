"""Additions behind a quantized layer that runtimes must not take for its bias, since they would round it.

onnxruntime merges a constant that is added to a matrix product into the product's bias, and stores that as whole
multiples of (step of inputs) x (step of weights). Biases of jpq's layers are such multiples (exact_steps.py). A vector
that a module's own code adds, as in `self.linear(x) + self.shift`, is not: subtracting its negative is the same number
to the bit, and is merged by nobody.

So is a bias that is more steps than 32 bits count: that of a layer whose inputs are always nearly zero, for which their
step is tiny.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, helper

from jpq.export.onnx.graph import Graph, has_subgraphs, remove_unused_constants

_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_LARGEST_BIAS = 2.0**30  # steps, of the 2^31 that an integer kernel counts
_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze")


def separate_additions(model: onnx.ModelProto) -> None:
    """Replace each addition of a constant off the grid of the product before it by a subtraction, in place."""
    if has_subgraphs(model):
        return
    graph = Graph(model)
    for layer in [node for node in graph.proto.node if node.op_type in _PRODUCTS and len(node.input) > 2]:
        _separate_large_bias(graph, layer)
    for add in [node for node in graph.proto.node if node.op_type == "Add"]:
        for term, constant in (tuple(add.input), tuple(reversed(add.input))):
            layer = graph.producers.get(term)
            if constant not in graph.constants or layer is None or layer.op_type not in _PRODUCTS:
                continue
            value, grid = graph.array(constant), _grid_of(graph, layer)
            if value.dtype == np.float32 and grid is not None and not _is_on_grid(value, grid):
                del add.input[:]
                add.input.extend([term, graph.add_constant(f"{constant}.negative", -value)])
                add.op_type = "Sub"
                break
    remove_unused_constants(model.graph)


def _separate_large_bias(graph: Graph, layer: NodeProto) -> None:
    """Subtract the negative of a layer's bias behind it, where integer kernels could not count its steps."""
    bias, grid = layer.input[2], _grid_of(graph, layer)
    if any(a.name in ("alpha", "beta") and a.f != 1 for a in layer.attribute):
        return
    if bias not in graph.constants or grid is None or grid.size not in (1, graph.array(bias).size):
        return
    value = graph.array(bias)
    if (np.abs(value.reshape(-1) / grid) < _LARGEST_BIAS).all():
        return
    sides = next((len(a.ints) for a in layer.attribute if a.name == "kernel_shape"), 0)  # of a convolution
    negative = graph.add_constant(f"{bias}.negative.{sides}", -value.reshape(-1, *[1] * sides))
    result = layer.output[0]
    del layer.input[2:]
    layer.output[0] = f"{result}.products"
    graph.insert(layer, [helper.make_node("Sub", [layer.output[0], negative], [result], f"{result}.bias")], behind=True)


def _grid_of(graph: Graph, layer: NodeProto) -> np.ndarray | None:
    """Step of the products of a layer on integers, one or one per channel; None where a side is no integers."""
    steps = []
    for name in layer.input[:2]:
        node = graph.producers.get(name)
        while node is not None and node.op_type in _MOVES:
            node = graph.producers.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear" or node.input[1] not in graph.constants:
            return None
        steps.append(graph.array(node.input[1]).astype(np.float64).reshape(-1))
    return np.asarray(steps[0] * steps[1])


def _is_on_grid(value: np.ndarray, grid: np.ndarray) -> bool:
    """Whether a constant is whole multiples of a grid, channel by channel, that integer kernels can count."""
    flat = value.astype(np.float64).reshape(-1)
    if grid.size not in (1, flat.size) and flat.size != 1:
        return False
    multiples = flat / grid
    return bool((multiples == np.rint(multiples)).all() and (np.abs(multiples) < _LARGEST_BIAS).all())
