"""Fold normalisations into the quantized convolutions before them, in the ONNX file: then integer kernels can run.

A runtime turns DequantizeLinear, Conv, QuantizeLinear into one integer kernel; with a BatchNormalization between it
computes in floating point. Per channel c with gain g = gamma / sqrt(variance + eps), and integers q at scale s:

    g (s q * x + b - mean) + beta  =  (|g| s) (sign(g) q) * x + g (b - mean) + beta

Nothing is rounded anew: the integers change their sign at most (a grid that is not symmetric, or a gain of 0, is left
alone), and are shifted left as far as 8 bits allow, their scale by as much to the right.

Why shifted: onnxruntime's integer kernels round the bias to whole steps of (weight scale) x (input scale). With 3-bit
weights such a step is so coarse that values cross rounding boundaries of the next layer by the percent; a weight scale
that is 2^5 times as fine puts the bias where it belongs, at the same product. `model.packed` keeps the real widths.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from jpq.export.onnx.graph import drop_unread, nested

WIDEST = 127  # largest integer of a weight in the file


def fold_norms(model: onnx.ModelProto) -> int:
    """Fold what can be folded, in place; how many normalisations went: none where nodes hold graphs of their own."""
    if nested(model):  # graphs inside nodes read values that are not counted here
        return 0
    graph = model.graph
    known = {t.name: t for t in graph.initializer}
    known |= {
        n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant" and n.attribute[0].HasField("t")
    }
    makers = {out: n for n in graph.node for out in n.output}
    readers: dict[str, int] = defaultdict(int)
    for name in [i for n in graph.node for i in n.input] + [o.name for o in graph.output]:
        readers[name] += 1
    gone = []
    for norm in graph.node:
        conv = makers.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if conv is not None and conv.op_type == "Conv" and readers[conv.output[0]] == 1 and len(norm.output) == 1:
            parts = _weight(conv, makers, readers)
            stored = parts and all(name in known for name in (*norm.input[1:], *conv.input[2:], *parts[1:]))
            if parts and stored and _fold(graph, norm, conv, parts, known):
                gone.append(norm)
    for norm in gone:
        graph.node.remove(norm)
    drop_unread(graph)
    return len(gone)


def _weight(conv: NodeProto, makers: dict[str, NodeProto], readers: dict[str, int]) -> tuple[Any, ...] | None:
    """(node that reads the stored integers, their name, name of their scale, the clip's limits if any)."""
    scaled = makers.get(conv.input[1])
    if scaled is None or scaled.op_type != "DequantizeLinear" or readers[scaled.output[0]] != 1:
        return None
    clip = makers.get(scaled.input[0])
    if clip is None or clip.op_type != "Clip":
        return scaled, scaled.input[0], scaled.input[1]
    return (clip, clip.input[0], scaled.input[1], *clip.input[1:3]) if readers[clip.output[0]] == 1 else None


def _fold(graph: Any, norm: NodeProto, conv: NodeProto, parts: tuple[Any, ...], known: dict[str, Any]) -> bool:
    reader, integers, scale, *limits = parts
    q, s = (numpy_helper.to_array(known[name]) for name in (integers, scale))
    gamma, beta, mean, variance = (numpy_helper.to_array(known[name]).astype(np.float64) for name in norm.input[1:5])
    ends = [int(numpy_helper.to_array(known[name])) for name in limits] or [int(q.min()), int(q.max())]
    eps = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    gain = gamma / np.sqrt(variance + eps)
    flips = bool((gain < 0).any())
    mirrored = ends[0] == -ends[1] or (not limits and ends[0] > -128)
    if q.dtype != np.int8 or s.shape != gain.shape or not gain.all() or (flips and not mirrored):
        return False
    if not np.isfinite(gain).all() or (np.abs(gain) * s).astype(np.float32).min() <= 0:
        return False
    shift = int(np.log2(WIDEST / max(1, *(abs(end) for end in ends))))
    if (np.abs(gain) * s * 2.0**-shift).astype(np.float32).min() < np.finfo(np.float32).tiny:
        shift = 0
    own = numpy_helper.to_array(known[conv.input[2]]).astype(np.float64) if len(conv.input) > 2 else 0.0
    name = norm.output[0]
    signs = np.where(gain < 0, -1, 1).reshape(-1, *[1] * (q.ndim - 1))
    made = {
        f"{name}.integers": (np.clip(q.astype(np.int32), ends[0], ends[1]) * signs * 2**shift).astype(np.int8),
        f"{name}.scale": (np.abs(gain) * s * 2.0**-shift).astype(np.float32),
        f"{name}.bias": (gain * (own - mean) + beta).astype(np.float32),
    }
    scaled = reader
    if reader.op_type == "Clip":  # done already
        scaled = _reader(graph, reader.output[0])
        graph.node.remove(reader)
    graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in made.items())
    scaled.input[0], scaled.input[1] = f"{name}.integers", f"{name}.scale"
    del conv.input[2:]
    conv.input.append(f"{name}.bias")
    conv.output[0] = name
    return True


def _reader(graph: Any, name: str) -> NodeProto:
    return next(n for n in graph.node if name in n.input)
