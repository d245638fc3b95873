"""Folding of BatchNormalization into the quantized Conv before it, in the ONNX file, so that integer kernels can run.

A runtime turns DequantizeLinear, Conv, QuantizeLinear into one integer kernel; with a BatchNormalization between them
it computes in floating point. Per channel c with gain g = gamma / sqrt(variance + eps), and integers q at scale s:

    g (s q * x + b - mean) + beta  =  (|g| s) (sign(g) q) * x + g (b - mean) + beta

Nothing is rounded anew: the integers change their sign at most (a grid that is not symmetric, or a gain of 0, is left
alone), and are shifted left as far as 8 bits allow, their scale by as much to the right.

Why shifted: onnxruntime's integer kernels round the bias to whole steps of (weight scale) x (input scale). With 3-bit
weights such a step is so coarse that values cross rounding boundaries of the next layer by the percent; a weight scale
that is 2^5 times as fine puts the bias where it belongs, at the same product. `model.packed` keeps the real widths.

Why not `fold_batchnorms` (jpq/export/packed) before export: the file would change, in three respects. That function
folds into the quantizer's range, a logarithm, in single precision, while here scale and bias are computed in double
precision and rounded once: on the test zoo it gives other last bits in 40 to 65 % of the scales and 10 to 65 % of the
biases. Its integers keep their width, so a pass that shifts them would still be needed. And it reads modules, so it
leaves functional norms and norms that are called several times, and folds norms behind Linear, which stay here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from jpq.export.onnx.graph import Graph, has_subgraphs, remove_unused_constants

MAX_INTEGER = 127  # of a weight in the file


@dataclass(frozen=True)
class _StoredWeight:
    """Where a convolution's quantized weight is stored in the graph."""

    dequantize: NodeProto
    clip: NodeProto | None  # between the integers and `dequantize`
    integers: str  # names of constants
    scale: str
    limits: Sequence[str]  # of the clip


def fold_norms(model: onnx.ModelProto) -> int:
    """Fold the normalizations that allow it, in place, and return their number.

    A file whose nodes hold graphs of their own is left as it is: those graphs may read any tensor.
    """
    if has_subgraphs(model):
        return 0
    graph = Graph(model)
    folded = [norm for norm in list(graph.proto.node) if _fold_norm(graph, norm)]
    for norm in folded:
        graph.proto.node.remove(norm)
    remove_unused_constants(graph.proto)
    return len(folded)


def _fold_norm(graph: Graph, norm: NodeProto) -> bool:
    """Fold one node, if it is a normalization that can be folded; the node itself is left for the caller to remove."""
    conv = graph.producers.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
    if conv is None or conv.op_type != "Conv" or len(norm.output) != 1 or _use_count(graph, conv.output[0]) != 1:
        return False
    weight = _stored_weight(graph, conv)
    if weight is None:
        return False
    names = (*norm.input[1:], *conv.input[2:], weight.scale, weight.integers, *weight.limits)
    return graph.all_constant(names) and _fold(graph, norm, conv, weight)


def _use_count(graph: Graph, name: str) -> int:
    """How often nodes and the model's outputs use a tensor."""
    return len(graph.consumers[name]) + sum(o.name == name for o in graph.proto.output)


def _stored_weight(graph: Graph, conv: NodeProto) -> _StoredWeight | None:
    """The stored weight of a convolution; None where it is not quantized, or shared with another node."""
    dequantize = graph.producers.get(conv.input[1])
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or _use_count(graph, conv.input[1]) != 1:
        return None
    clip = graph.producers.get(dequantize.input[0])
    if clip is None or clip.op_type != "Clip":
        return _StoredWeight(dequantize, None, dequantize.input[0], dequantize.input[1], ())
    if _use_count(graph, clip.output[0]) != 1:
        return None
    return _StoredWeight(dequantize, clip, clip.input[0], dequantize.input[1], clip.input[1:3])


def _fold(graph: Graph, norm: NodeProto, conv: NodeProto, weight: _StoredWeight) -> bool:
    """Write new integers, scale and bias, where the numbers allow it."""
    integers, scale = graph.array(weight.integers), graph.array(weight.scale)
    gamma, beta, mean, variance = (graph.array(name).astype(np.float64) for name in norm.input[1:5])
    eps = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    gain = gamma / np.sqrt(variance + eps)
    limits = [int(graph.array(name)) for name in weight.limits] or [int(integers.min()), int(integers.max())]
    symmetric = limits[0] == -limits[1] or (not weight.limits and limits[0] > -128)
    if integers.dtype != np.int8 or scale.shape != gain.shape or not _is_foldable(gain, scale, symmetric):
        return False
    shift = int(np.log2(MAX_INTEGER / max(1, *(abs(limit) for limit in limits))))
    if (np.abs(gain) * scale * 2.0**-shift).astype(np.float32).min() < np.finfo(np.float32).tiny:
        shift = 0
    conv_bias = graph.array(conv.input[2]).astype(np.float64) if len(conv.input) > 2 else 0.0
    name = norm.output[0]
    clipped = np.clip(integers.astype(np.int32), limits[0], limits[1])
    signs = np.where(gain < 0, -1, 1).reshape(-1, *[1] * (integers.ndim - 1))
    constants = {
        f"{name}.integers": (clipped * signs * 2**shift).astype(np.int8),
        f"{name}.scale": (np.abs(gain) * scale * 2.0**-shift).astype(np.float32),
        f"{name}.bias": (gain * (conv_bias - mean) + beta).astype(np.float32),
    }
    if weight.clip is not None:  # the new integers are clipped already
        graph.proto.node.remove(weight.clip)
    graph.proto.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    weight.dequantize.input[0], weight.dequantize.input[1] = f"{name}.integers", f"{name}.scale"
    del conv.input[2:]
    conv.input.append(f"{name}.bias")
    conv.output[0] = name
    return True


def _is_foldable(gain: np.ndarray, scale: np.ndarray, symmetric: bool) -> bool:
    """Whether gains are finite, not zero, turn no sign of an asymmetric grid, and leave scales above zero."""
    if not gain.all() or not np.isfinite(gain).all() or (bool((gain < 0).any()) and not symmetric):
        return False
    return bool((np.abs(gain) * scale).astype(np.float32).min() > 0)
