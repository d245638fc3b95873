"""Folding of BatchNormalization into the bias of the Conv before it, in the ONNX file, so that integer kernels can run.

A runtime turns DequantizeLinear, Conv, QuantizeLinear into one integer kernel; with a BatchNormalization between them
it computes in floating point. A norm that `finalize` has folded (jpq/export/exact_steps.py) has a gain of 1 and only
adds a bias, which is a whole number of the layer's steps: as the bias of the Conv it is exact, in integer kernels too.

Other norms stay in the file and are computed in floating point, as in the model: those behind a layer that is called
several times, or with a gain of 0. Folded, their biases would lie between the steps, and onnxruntime's integer kernels
round biases to whole steps: values cross rounding boundaries of the next layer.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from jpq.export.onnx.graph import Graph, has_subgraphs, remove_unused_constants

NEUTRAL = 2.0**-20  # distance of a gain from 1 that single-precision mean and variance of a folded norm explain


def fold_norms(model: onnx.ModelProto) -> int:
    """Fold the normalizations that only add a bias, in place, and return their number.

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
    """Fold one node, if it is such a normalization; the node itself is left for the caller to remove."""
    conv = graph.producers.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
    if conv is None or conv.op_type != "Conv" or len(norm.output) != 1 or _use_count(graph, conv.output[0]) != 1:
        return False
    if not graph.all_constant((*norm.input[1:], *conv.input[2:])):
        return False
    gamma, beta, mean, variance = (graph.array(name).astype(np.float64) for name in norm.input[1:5])
    eps = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    if not (np.abs(gamma / np.sqrt(variance + eps) - 1) <= NEUTRAL).all():
        return False
    own = graph.array(conv.input[2]).astype(np.float64) if len(conv.input) > 2 else 0.0
    bias = f"{norm.output[0]}.bias"
    graph.proto.initializer.append(numpy_helper.from_array((own - mean + beta).astype(np.float32), bias))
    del conv.input[2:]
    conv.input.append(bias)
    conv.output[0] = norm.output[0]
    return True


def _use_count(graph: Graph, name: str) -> int:
    """How often nodes and the model's outputs use a tensor."""
    return len(graph.consumers[name]) + sum(o.name == name for o in graph.proto.output)
