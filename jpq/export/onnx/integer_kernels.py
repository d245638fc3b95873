"""Rewrites of a QCDQ file after which runtimes find their integer kernels. Each is exact as ONNX defines it.

- A signed grid of activations, int8 around 0, becomes uint8 around 128: kernels want one type on both sides.
- A Clip of stored weights is done once, here.
- Rounding to a grid is monotone, so it changes places with MaxPool, and with what only moves numbers: the convolution
  before them is then read by a QuantizeLinear, and computes in integers. The pooling stays in floating point, held
  there by a Relu that changes nothing (onnxruntime's pooling of integers takes longer than the whole convolution).
- For the same reason a Clip of floating-point numbers (ReLU6) before rounding becomes one of integers behind it.
- The bias of a last Gemm, whose result nobody quantizes, is added behind it: onnxruntime has an integer Gemm with a
  result in floating point, but only without a bias of that kind.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, helper

from jpq.export.onnx.graph import Graph, drop_unread, nested

_MOVES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose")  # what rounding changes places with, as it is

MIDDLE = 128  # of a grid in uint8


def make_integral(model: onnx.ModelProto) -> None:
    """Apply every rewrite, in place. A file whose nodes hold graphs of their own is left as it is."""
    if nested(model):
        return
    graph = Graph(model)
    for rewrite in (_unsigned, _clipped, _before_moves, _clip_behind, _bias_apart):
        for node in list(graph.proto.node):
            rewrite(graph, node)
        graph = Graph(model)
    drop_unread(model.graph)


def _unsigned(graph: Graph, node: NodeProto) -> None:
    if node.op_type != "QuantizeLinear" or len(node.input) < 3 or node.input[2] not in graph.known:
        return
    zero = graph.array(node.input[2])
    if zero.dtype != np.int8 or zero.ndim or zero != 0:
        return
    clip = graph.only_reader(node.output[0])
    clip = clip if clip is not None and clip.op_type == "Clip" else None
    limits = [name for name in clip.input[1:3]] if clip is not None else []
    readers = graph.readers[(clip or node).output[0]]
    plain = all(r.op_type == "DequantizeLinear" and len(r.input) > 2 for r in readers)
    if not plain or (clip or node).output[0] in graph.results or any(name not in graph.known for name in limits):
        return
    middle = graph.keep("middle.of.uint8", np.array(MIDDLE, np.uint8))
    for reader in (node, *readers):
        reader.input[2] = middle
    for i, name in enumerate(limits):
        limit = int(graph.array(name)) + MIDDLE
        assert clip is not None
        clip.input[1 + i] = graph.keep(f"uint8.{limit}", np.array(limit, np.uint8))


def _clipped(graph: Graph, node: NodeProto) -> None:
    if node.op_type != "Clip" or any(name not in graph.known for name in node.input) or len(node.input) != 3:
        return
    low, high = (graph.array(name) for name in node.input[1:])
    stored = graph.keep(f"{node.output[0]}.stored", np.clip(graph.array(node.input[0]), low, high))
    for reader in graph.readers[node.output[0]]:
        for i, name in enumerate(reader.input):
            reader.input[i] = stored if name == node.output[0] else name
    graph.proto.node.remove(node)


def _clip_behind(graph: Graph, clip: NodeProto) -> None:
    """Clip, QuantizeLinear, (Clip): what the first Clip does is left to the second, made where there is none."""
    if clip.op_type != "Clip" or len(clip.input) != 3 or any(name not in graph.known for name in clip.input[1:]):
        return
    ends = [graph.array(name) for name in clip.input[1:]]
    readers = graph.readers[clip.output[0]]
    if any(end.dtype != np.float32 for end in ends) or clip.output[0] in graph.results or not readers:
        return
    grids = []
    for node in readers:
        if node.op_type != "QuantizeLinear" or any(name not in graph.known for name in node.input[1:3]):
            return
        scale, zero = (graph.array(name) for name in node.input[1:3])
        if scale.ndim or zero.dtype != np.uint8:
            return
        grids.append([int(np.clip(np.rint(end / scale) + zero, 0, 255)) for end in ends])
    for node, (low, high) in zip(readers, grids, strict=True):
        node.input[0] = clip.input[0]
        second = graph.only_reader(node.output[0])
        if second is not None and second.op_type == "Clip" and all(n in graph.known for n in second.input[1:3]):
            now = [int(graph.array(name)) for name in second.input[1:3]]
            low, high = (min(max(end, now[0]), now[1]) for end in (low, high))
            for i, n in enumerate((low, high)):
                second.input[1 + i] = graph.keep(f"uint8.{n}", np.array(n, np.uint8))
        elif (low, high) != (0, 255):
            name = node.output[0]
            limits = [graph.keep(f"uint8.{n}", np.array(n, np.uint8)) for n in (low, high)]
            node.output[0] = f"{name}.wide"
            made = helper.make_node("Clip", [node.output[0], *limits], [name], name=f"{name}.clip")
            graph.insert(node, [made], behind=True)
    graph.proto.node.remove(clip)


def _before_moves(graph: Graph, quantize: NodeProto) -> None:
    """Conv, (Relu or Clip), MaxPool or moves, QuantizeLinear: the grid is put behind the convolution, too."""
    if quantize.op_type != "QuantizeLinear" or any(name not in graph.known for name in quantize.input[1:3]):
        return
    scale, zero = (graph.array(name) for name in quantize.input[1:3])
    first, pooled = quantize, False
    while True:
        above = graph.makers.get(first.input[0])
        alone = above is not None and len(above.output) == 1 and graph.only_reader(above.output[0]) is not None
        if above is None or not alone or above.op_type not in ("MaxPool", *_MOVES):
            break
        first, pooled = above, pooled or above.op_type == "MaxPool"
    made = graph.makers.get(first.input[0])
    if made is None or graph.only_reader(made.output[0]) is None:
        return
    start = graph.makers.get(made.input[0]) if made.op_type in ("Relu", "Clip") else made
    own = start is made or graph.only_reader(made.input[0]) is not None
    if first is quantize or start is None or start.op_type != "Conv" or not own:
        return
    if scale.ndim or zero.dtype != np.uint8 or (pooled and zero.any()):
        return
    name = first.output[0]
    nodes = [helper.make_node("QuantizeLinear", [made.output[0], *quantize.input[1:]], [f"{name}.before"])]
    clip = graph.only_reader(quantize.output[0])
    if clip is not None and clip.op_type == "Clip":
        nodes.append(helper.make_node("Clip", [nodes[-1].output[0], *clip.input[1:]], [f"{name}.clipped"]))
    nodes.append(helper.make_node("DequantizeLinear", [nodes[-1].output[0], *quantize.input[1:]], [f"{name}.grid"]))
    if pooled:
        nodes.append(helper.make_node("Relu", [f"{name}.grid"], [f"{name}.held"]))
    for i, node in enumerate(nodes):
        node.name = f"{name}.grid_{i}"
    graph.insert(first, nodes)
    first.input[0] = nodes[-1].output[0]


def _bias_apart(graph: Graph, gemm: NodeProto) -> None:
    scales = {a.name: a.f for a in gemm.attribute if a.name in ("alpha", "beta")}
    if gemm.op_type != "Gemm" or len(gemm.input) != 3 or any(value != 1 for value in scales.values()):
        return
    makers = [graph.makers.get(name) for name in gemm.input[:2]]
    if any(m is None or m.op_type != "DequantizeLinear" for m in makers):
        return
    reader = graph.only_reader(gemm.output[0])
    if reader is not None and reader.op_type == "Relu":
        reader = graph.only_reader(reader.output[0])
    if reader is not None and reader.op_type == "QuantizeLinear":
        return
    result, bias = gemm.output[0], gemm.input[2]
    del gemm.input[2:]
    gemm.output[0] = f"{result}.products"
    added = helper.make_node("Add", [gemm.output[0], bias], [result], name=f"{result}.bias")
    graph.insert(gemm, [added], behind=True)
