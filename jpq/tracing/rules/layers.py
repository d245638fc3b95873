"""Rules for the layers whose weights are counted and masked, for embeddings, and for attention's products."""

from __future__ import annotations

from math import prod

import numpy as np
from torch.fx import Node

from jpq.tracing.network import LayerKind
from jpq.tracing.op_call import Dims, LayerCall, OpCall, rule, shape_of
from jpq.types import NONE, Labels


def _known(labels: Labels | None, size: int) -> Labels:
    return np.full(size, NONE, np.int64) if labels is None else labels


@rule(*(f"aten.conv{n}d" for n in (1, 2, 3)), *(f"aten.conv_transpose{n}d" for n in (1, 2, 3)))
def conv(call: OpCall) -> Dims:
    """Reads the input's labels on its weight, makes new ones; depthwise passes them, other groups tie them."""
    x: Node = call["input"]
    weight: Node = call["weight"]
    dims, shape, groups = call.dims(x), shape_of(weight), call["groups"]
    transposed = "transpose" in call.op
    at = len(dims) - len(shape) + 1  # the channel dim: 0 in an example without a batch dim
    inner, name = dims[at], call.book.parameters.get(weight)
    for labels in dims[at + 1 :]:
        call.freeze(labels, f"{call.op} mixes neighbouring channels")
    if name is None:
        call.freeze(inner, f"read by {call.op} with a weight that is computed")
        return [*dims[:at], *([None] * (len(dims) - at))]
    n_in = shape_of(x)[at]
    if groups > 1 and n_in == groups:
        outer = _depthwise(call, weight, inner, n_in, shape[1] if transposed else shape[0] // groups, transposed)
    else:
        outer = _dense(call, weight, name, inner, groups, transposed)
    call.bind(call["bias"], 0, outer)
    applied = shape_of(x) if transposed else call.shape
    positions = prod(applied) // applied[at]
    n_out = len(outer)
    macs = positions * n_in * n_out * prod(shape[2:]) // groups
    kind = LayerKind.CONV_TRANSPOSE if transposed else LayerKind.CONV
    stride = tuple(call["stride"])
    stride = stride * (len(shape) - 2) if len(stride) == 1 else stride
    call.book.calls.append(
        LayerCall(call.node, name, kind, shape, groups, macs, _known(inner, n_in), outer, stride, applied[at + 1 :])
    )
    return [*dims[:at], outer, *([None] * (len(dims) - at - 1))]


def _depthwise(call: OpCall, weight: Node, inner: Labels | None, n_in: int, times: int, transposed: bool) -> Labels:
    """Output channel c * times + i is made from input channel c alone, so it carries that label."""
    if inner is None:
        inner = call.classes.fresh(n_in)
        call.freeze(inner, "depthwise over channels that cannot be removed")
    outer = np.repeat(inner, times)
    call.bind(weight, 0, inner if transposed else outer)
    return outer


def _dense(call: OpCall, weight: Node, name: str, inner: Labels | None, groups: int, transposed: bool) -> Labels:
    """A full product, or one per group: groups lose channels at the same places."""
    shape = shape_of(weight)
    if inner is not None and groups > 1:
        call.tie(inner.reshape(groups, -1))
    if transposed:
        call.bind(weight, 0, inner)
        return np.tile(call.book.axis(name, 1, shape[1]), groups)
    call.bind(weight, 1, None if inner is None else inner[: shape[1]])
    outer = call.book.axis(name, 0, shape[0])
    call.tie(outer.reshape(groups, -1))
    return outer


@rule("aten.linear")
def linear(call: OpCall) -> Dims:
    """Reads labels on the last dim, makes new ones there; all other dims pass."""
    x: Node = call["input"]
    weight: Node = call["weight"]
    dims, shape, name = call.dims(x), shape_of(weight), call.book.parameters.get(weight)
    if name is None:
        for labels in (dims[-1], *call.dims(weight)):
            call.freeze(labels, "read by aten.linear with a weight that is computed")
        return [*dims[:-1], None]
    call.bind(weight, 1, dims[-1])
    outer = call.book.axis(name, 0, shape[0])
    call.bind(call["bias"], 0, outer)
    if call.module()[1].endswith(".MultiheadAttention"):  # its code compares sizes with attributes of its own
        for labels in (dims[-1], outer):
            call.freeze(labels, "inside nn.MultiheadAttention, whose code has fixed sizes; jpq.decompose frees it")
    macs = prod(call.shape[:-1]) * prod(shape)
    seen, size = _known(dims[-1], shape[1]), call.shape[1:-1]
    call.book.calls.append(LayerCall(call.node, name, LayerKind.LINEAR, shape, 1, macs, seen, outer, (), size))
    return [*dims[:-1], outer]


@rule("aten.embedding")
def embedding(call: OpCall) -> Dims:
    """Rows of a table: the columns are the channels."""
    weight: Node = call["weight"]
    index, name = call.dims(call["indices"]), call.book.parameters.get(weight)
    if name is None:
        return [*index, *call.dims(weight)[1:]]
    call.bind(weight, 0, None)
    outer = call.book.axis(name, 1, shape_of(weight)[1])
    call.book.embeddings[name.rpartition(".")[0]] = outer
    return [*index, outer]


@rule("aten.matmul", "aten.bmm", "aten.mm", "aten.mv", "aten.dot")
def matmul(call: OpCall) -> Dims:
    """Sums over one dim, which therefore keeps all of its channels; batch dims (heads) are tied."""
    a, b = call.tensors[0], call.tensors[-1]
    left, right = call.dims(a), call.dims(b)
    for labels in (left[-1], right[max(len(right) - 2, 0)]):
        call.freeze(labels, f"summed over by {call.op}")
    if len(left) < 2 or len(right) < 2:
        return [*left[:-1], *right[len(right) :]] if len(right) < 2 else [*right[:-2], right[-1]]
    batch = _batch(call, [(a, 2), (b, 2)])
    return [*batch, left[-2], right[-1]]


def _batch(call: OpCall, operands: list[tuple[Node, int]]) -> Dims:
    """Broadcast dims before the last two."""
    out: Dims = []
    rank = len(call.shape) - 2
    for k in range(rank):
        n, known, fixed = call.shape[k], None, False
        for node, tail in operands:
            d = k - rank + len(shape_of(node)) - tail
            if d < 0 or shape_of(node)[d] != n:
                continue
            labels = call.dims(node)[d]
            fixed |= labels is None and n != 1
            if labels is not None:
                known = labels if known is None else call.join(known, labels)
        out.append(call.join(known, None) if fixed and known is not None else known)
    return out


@rule("aten.scaled_dot_product_attention")
def attention(call: OpCall) -> Dims:
    """softmax(q k^T) v per head: heads are tied between q, k, v and mask; head sizes and tokens are summed over."""
    q, k, v = call["query"], call["key"], call["value"]
    for node in (q, k):
        call.freeze(call.dims(node)[-1], "summed over inside attention")
    for node in (k, v):
        call.freeze(call.dims(node)[-2], "attention sums over tokens")
    mask = [(call["attn_mask"], 2)] if call["attn_mask"] is not None else []
    return [*_batch(call, [(q, 2), (k, 2), (v, 2), *mask]), call.dims(q)[-2], call.dims(v)[-1]]


@rule("aten.einsum")
def einsum(call: OpCall) -> Dims:
    """Letters are dims: a letter in the result ties its dims, a letter that is summed keeps all of its channels."""
    equation, operands = call["equation"].replace(" ", ""), list(call["tensors"])
    terms, _, result = equation.partition("->")
    if not result or "." in equation:
        for node in operands:
            for labels in call.dims(node):
                call.freeze(labels, "aten.einsum without an explicit result has no rule")
        return [None] * len(call.shape)
    known: dict[str, Labels | None] = {}
    for term, node in zip(terms.split(","), operands, strict=True):
        for letter, labels in zip(term, call.dims(node), strict=True):
            known[letter] = call.join(known[letter], labels) if letter in known else labels
    for letter, labels in known.items():
        if letter not in result:
            call.freeze(labels, "summed over by aten.einsum")
    return [known[letter] for letter in result]
