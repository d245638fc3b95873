"""Rewrites of a QCDQ file that let runtimes use their integer kernels. Each is exact as ONNX defines the operators.

- A signed grid of activations, int8 around 0, becomes uint8 around 128: kernels expect one type on both sides.
- A Clip of stored weights is computed here, once.
- Stored weights of few bits are shifted to the left, and their scale to the right: integer kernels round biases to
  whole products of the scales, which are then fine enough to hold every bias of jpq (exact_steps.py).
- Weights stored as int8 around 0 become uint8 around 128. On x86 processors without VNNI, integer kernels for uint8
  times int8 add pairs of products in 16 bits (the instruction vpmaddubsw), which saturates: 2 * 255 * 127 is twice the
  largest number there. Those for uint8 times uint8 widen both to 16 bits and add in 32: they are exact on every
  processor.
- Rounding to a grid is monotone, so it changes places with MaxPool and with operators that only move numbers: the
  convolution before them is then read by a QuantizeLinear and computes in integers. The pooling stays in floating
  point, held there by a Relu that changes nothing (onnxruntime's integer pooling takes longer than the convolution).
- For the same reason a Clip of floating-point numbers (ReLU6) before rounding becomes a Clip of integers behind it.
- The bias of a last Gemm, whose result is not quantized, is added behind it: onnxruntime has an integer Gemm with a
  floating-point result, but only without a floating-point bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto, helper

from jpq.export.onnx.graph import Graph, has_subgraphs, remove_unused_constants

UINT8_MIDDLE = 128  # zero point of a symmetric grid in uint8

LARGEST_INT8, LARGEST_UINT8, LARGEST_INT32 = 2**7 - 1, 2**8 - 1, 2**31 - 1

_MOVES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose")  # operators that only move numbers


def prepare_integer_kernels(model: onnx.ModelProto) -> None:
    """Apply every rewrite, in place; where nodes hold graphs of their own, only those of stored weights."""
    graph = Graph(model)
    weight_rewrites = (_clip_stored_weights, _shift_weights, _store_weights_unsigned)
    grid_rewrites = (_make_grid_unsigned, _round_before_moves, _move_clip_behind_rounding, _add_bias_behind)
    for rewrite in weight_rewrites if has_subgraphs(model) else weight_rewrites + grid_rewrites:
        for node in list(graph.proto.node):
            rewrite(graph, node)
        graph = Graph(model)
    remove_unused_constants(model.graph)


def _make_grid_unsigned(graph: Graph, quantize: NodeProto) -> None:
    """QuantizeLinear to int8 at zero point 0, (Clip), DequantizeLinear: the same in uint8 at zero point 128."""
    if not _rounds_to_int8(graph, quantize):
        return
    clip = _clip_of(graph, quantize)
    limits = list(clip.input[1:3]) if clip is not None else []
    grid = (clip or quantize).output[0]
    consumers = graph.consumers[grid]
    dequantized = all(node.op_type == "DequantizeLinear" and len(node.input) > 2 for node in consumers)
    if not dequantized or grid in graph.outputs or not graph.all_constant(limits):
        return
    middle = graph.add_constant("middle.of.uint8", np.array(UINT8_MIDDLE, np.uint8))
    for node in (quantize, *consumers):
        node.input[2] = middle
    if clip is not None:
        _set_limits(graph, clip, [int(graph.array(name)) + UINT8_MIDDLE for name in limits])


def _rounds_to_int8(graph: Graph, node: NodeProto) -> bool:
    """Whether a node is a QuantizeLinear with one constant int8 zero point of 0."""
    if node.op_type != "QuantizeLinear" or len(node.input) < 3 or node.input[2] not in graph.constants:
        return False
    zero = graph.array(node.input[2])
    return bool(zero.dtype == np.int8 and zero.ndim == 0 and zero == 0)


def _clip_of(graph: Graph, quantize: NodeProto) -> NodeProto | None:
    """The Clip that alone consumes a QuantizeLinear's integers, if there is one."""
    node = graph.only_consumer(quantize.output[0])
    return node if node is not None and node.op_type == "Clip" else None


def _limit_names(graph: Graph, limits: Sequence[int]) -> list[str]:
    """Names of uint8 constants with these values."""
    return [graph.add_constant(f"uint8.{limit}", np.array(limit, np.uint8)) for limit in limits]


def _set_limits(graph: Graph, clip: NodeProto, limits: Sequence[int]) -> None:
    """Let a Clip of uint8 numbers use these limits."""
    for i, name in enumerate(_limit_names(graph, limits)):
        clip.input[1 + i] = name


def _clip_stored_weights(graph: Graph, clip: NodeProto) -> None:
    """Clip with constant inputs: its result is stored instead."""
    if clip.op_type != "Clip" or not graph.all_constant(clip.input) or len(clip.input) != 3:
        return
    if clip.output[0] in graph.outputs:
        return
    low, high = (graph.array(name) for name in clip.input[1:])
    result = clip.output[0]
    stored = graph.add_constant(f"{result}.stored", np.clip(graph.array(clip.input[0]), low, high))
    for node in graph.consumers[result]:
        for i, name in enumerate(node.input):
            node.input[i] = stored if name == result else name
    graph.proto.node.remove(clip)


def _shift_weights(graph: Graph, dequantize: NodeProto) -> None:
    """DequantizeLinear of stored int8 integers around 0: as many places to the left as 8 bits allow, the same product.

    Not so far that a sum of 32 bits could overflow.
    """
    if dequantize.op_type != "DequantizeLinear" or len(dequantize.input) != 3:
        return
    if not graph.all_constant(dequantize.input) or graph.array(dequantize.input[2]).any():
        return
    integers, scale = (graph.array(name) for name in dequantize.input[:2])
    if integers.dtype != np.int8 or not integers.any():
        return
    wide = np.abs(integers.astype(np.int64))
    largest_sum = float(wide.reshape(len(wide), -1).sum(1).max()) * LARGEST_UINT8
    shift = int(np.log2(min(LARGEST_INT8 / wide.max(), LARGEST_INT32 / largest_sum)))
    if shift < 1 or (scale * np.float32(2.0**-shift)).min() < np.finfo(np.float32).tiny:
        return
    name = dequantize.output[0]
    shifted = (integers.astype(np.int16) << shift).astype(np.int8)
    dequantize.input[0] = graph.add_constant(f"{name}.shifted", shifted)
    dequantize.input[1] = graph.add_constant(f"{name}.finer", scale * np.float32(2.0**-shift))


def _store_weights_unsigned(graph: Graph, dequantize: NodeProto) -> None:
    """DequantizeLinear of a stored int8 tensor: integers and zero points are stored in uint8, 128 larger."""
    if dequantize.op_type != "DequantizeLinear" or len(dequantize.input) != 3:
        return
    if not graph.all_constant(dequantize.input) or graph.array(dequantize.input[0]).dtype != np.int8:
        return
    for i in (0, 2):
        name = dequantize.input[i]
        integers = graph.array(name).astype(np.int16) + UINT8_MIDDLE
        dequantize.input[i] = graph.add_constant(f"{name}.uint8", integers.astype(np.uint8))


def _round_before_moves(graph: Graph, quantize: NodeProto) -> None:
    """Conv, (Relu or Clip), MaxPool or moves, QuantizeLinear: the grid is put behind the convolution as well."""
    if quantize.op_type != "QuantizeLinear" or not graph.all_constant(quantize.input[1:3]):
        return
    moves = _moves_before(graph, quantize)
    if not moves or not _follows_convolution(graph, moves[-1]):
        return
    scale, zero = (graph.array(name) for name in quantize.input[1:3])
    pooled = any(node.op_type == "MaxPool" for node in moves)
    if scale.ndim or zero.dtype != np.uint8 or (pooled and zero.any()):
        return
    _insert_grid(graph, moves[-1], quantize, hold=pooled)


def _moves_before(graph: Graph, quantize: NodeProto) -> list[NodeProto]:
    """The poolings and moves that feed a QuantizeLinear and nothing else, from the last to the first."""
    moves: list[NodeProto] = []
    name = quantize.input[0]
    while True:
        node = graph.producers.get(name)
        if node is None or len(node.output) != 1 or graph.only_consumer(name) is None:
            return moves
        if node.op_type not in ("MaxPool", *_MOVES):
            return moves
        moves.append(node)
        name = node.input[0]


def _follows_convolution(graph: Graph, move: NodeProto) -> bool:
    """Whether a node alone reads a convolution, or the activation that alone reads one."""
    producer = graph.producers.get(move.input[0])
    if producer is not None and graph.only_consumer(producer.output[0]) is None:
        return False
    if producer is not None and producer.op_type in ("Relu", "Clip"):
        if graph.only_consumer(producer.input[0]) is None:
            return False
        producer = graph.producers.get(producer.input[0])
    return producer is not None and producer.op_type == "Conv"


def _insert_grid(graph: Graph, move: NodeProto, quantize: NodeProto, hold: bool) -> None:
    """Round what a node reads to the grid of `quantize`; `hold` keeps it in floating point by a Relu."""
    name, source = move.output[0], move.input[0]
    nodes = [helper.make_node("QuantizeLinear", [source, *quantize.input[1:]], [f"{name}.before"])]
    clip = _clip_of(graph, quantize)
    if clip is not None:
        nodes.append(helper.make_node("Clip", [nodes[-1].output[0], *clip.input[1:]], [f"{name}.clipped"]))
    nodes.append(helper.make_node("DequantizeLinear", [nodes[-1].output[0], *quantize.input[1:]], [f"{name}.grid"]))
    if hold:
        nodes.append(helper.make_node("Relu", [f"{name}.grid"], [f"{name}.held"]))
    for i, node in enumerate(nodes):
        node.name = f"{name}.grid_{i}"
    graph.insert(move, nodes)
    move.input[0] = nodes[-1].output[0]


def _move_clip_behind_rounding(graph: Graph, clip: NodeProto) -> None:
    """Clip, QuantizeLinear, (Clip): the first Clip is merged into the second, which is added where there is none."""
    if clip.op_type != "Clip" or len(clip.input) != 3 or not graph.all_constant(clip.input[1:]):
        return
    limits = [graph.array(name) for name in clip.input[1:]]
    consumers = graph.consumers[clip.output[0]]
    if any(limit.dtype != np.float32 for limit in limits) or clip.output[0] in graph.outputs or not consumers:
        return
    rounded = []
    for node in consumers:
        integers = _rounded_limits(graph, node, limits)
        if integers is None:
            return
        rounded.append(integers)
    for node, integers in zip(consumers, rounded, strict=True):
        node.input[0] = clip.input[0]
        _clip_integers(graph, node, integers)
    graph.proto.node.remove(clip)


def _rounded_limits(graph: Graph, node: NodeProto, limits: Sequence[np.ndarray]) -> list[int] | None:
    """Limits as integers on a QuantizeLinear's uint8 grid; None where the node does not round to such a grid."""
    if node.op_type != "QuantizeLinear" or not graph.all_constant(node.input[1:3]):
        return None
    scale, zero = (graph.array(name) for name in node.input[1:3])
    if scale.ndim or zero.dtype != np.uint8:
        return None
    return [int(np.clip(np.rint(limit / scale) + zero, 0, 255)) for limit in limits]


def _clip_integers(graph: Graph, quantize: NodeProto, limits: Sequence[int]) -> None:
    """Limit a QuantizeLinear's integers: in the Clip behind it, or in a new one."""
    clip = _clip_of(graph, quantize)
    if clip is not None and graph.all_constant(clip.input[1:3]):
        low, high = (int(graph.array(name)) for name in clip.input[1:3])
        _set_limits(graph, clip, [min(max(limit, low), high) for limit in limits])
    elif tuple(limits) != (0, 255):
        name = quantize.output[0]
        inputs = [f"{name}.wide", *_limit_names(graph, limits)]
        quantize.output[0] = f"{name}.wide"
        graph.insert(quantize, [helper.make_node("Clip", inputs, [name], name=f"{name}.clip")], behind=True)


def _add_bias_behind(graph: Graph, gemm: NodeProto) -> None:
    """Gemm of dequantized inputs whose result is not quantized: its bias becomes an Add behind it."""
    if not _multiplies_integers(graph, gemm):
        return
    consumer = graph.only_consumer(gemm.output[0])
    if consumer is not None and consumer.op_type == "Relu":
        consumer = graph.only_consumer(consumer.output[0])
    if consumer is not None and consumer.op_type == "QuantizeLinear":
        return
    result, bias = gemm.output[0], gemm.input[2]
    del gemm.input[2:]
    gemm.output[0] = f"{result}.products"
    add = helper.make_node("Add", [gemm.output[0], bias], [result], name=f"{result}.bias")
    graph.insert(gemm, [add], behind=True)


def _multiplies_integers(graph: Graph, node: NodeProto) -> bool:
    """Whether a node is a plain Gemm with a bias, on two dequantized tensors."""
    factors = [a.f for a in node.attribute if a.name in ("alpha", "beta")]
    if node.op_type != "Gemm" or len(node.input) != 3 or any(factor != 1 for factor in factors):
        return False
    producers = [graph.producers.get(name) for name in node.input[:2]]
    return all(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers)
