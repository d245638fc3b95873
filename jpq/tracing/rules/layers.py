"""Rules for ops with weights (convolution, linear, embedding) and for products of tensors (matmul, attention)."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
from torch import nn
from torch.fx import Node

from jpq.tracing.call_sizes import COUNT
from jpq.tracing.network import LayerKind
from jpq.tracing.op_call import Dims, LayerCall, OpCall, rule, shape_of
from jpq.tracing.products import einsum_terms
from jpq.types import NONE, Labels


def _or_none(labels: Labels | None, size: int) -> Labels:
    """The labels, or `[size]` times NONE where there are none."""
    return np.full(size, NONE, np.int64) if labels is None else labels


def _unlabelled(inputs: int, outputs: int) -> tuple[Labels, Labels]:
    """NONE for every channel of both sides."""
    return np.full(inputs, NONE, np.int64), np.full(outputs, NONE, np.int64)


def _labelled(dims: Dims) -> tuple[Labels, ...]:
    """The labels of the dims that have any."""
    return tuple(labels for labels in dims if labels is not None)


def _layer_weight(call: OpCall, weight: Node, kind: LayerKind, groups: int = 1) -> str | None:
    """The name of a weight that is a parameter as it is; None where it is computed, or another call's too.

    Such a call reads the weight of a module that is called itself, past its quantizers, or applies the weight of an
    earlier call in another way, as an autoencoder does whose decoder is conv_transpose2d with the encoder's weight.
    """
    state = call.state
    name = state.parameters.get(weight)
    owners = state.called.get(name or "")
    past_module = bool(owners and call.node.meta.get("nn_module_stack")) and call.module()[1] not in (owners or ())
    earlier = ((c.kind, c.groups) for c in state.calls if c.weight == name and not c.float_reason)
    return None if past_module or any(use != (kind, groups) for use in earlier) else name


def _record_computed(call: OpCall, weight: Node, layer: LayerCall) -> None:
    """Record a layer whose weight is computed from parameters; one computed from the input makes a product."""
    source = call.state.weight_source(weight)
    if source is not None:
        reason = f"its weight is computed from '{source}'"
        key = call.state.expression(weight)
        if weight in call.state.parameters:
            reason = f"'{source}' is applied in another way by another call"
            key = f"{source} {layer.kind} {layer.groups} {call.module()[0]}"
        call.state.calls.append(replace(layer, weight=source, float_reason=reason, key=key))


@rule(*(f"aten.conv{n}d" for n in (1, 2, 3)), *(f"aten.conv_transpose{n}d" for n in (1, 2, 3)))
def conv(call: OpCall) -> Dims:
    """Convolution: input labels go to its weight, output labels are new; depthwise passes labels, groups tie them.

    Where the kernel is one position (`nn.Conv1d(tokens, more, 1)` over dims of features) the dims behind pass.
    """
    x: Node = call["input"]
    weight: Node = call["weight"]
    dims, shape, groups = call.dims(x), shape_of(weight), call["groups"]
    transposed = "transpose" in call.op
    channel_dim = len(dims) - len(shape) + 1  # 0 in an example without a batch dim
    kind = LayerKind.CONV_TRANSPOSE if transposed else LayerKind.CONV
    inputs, name = dims[channel_dim], _layer_weight(call, weight, kind, groups)
    behind: Dims = dims[channel_dim + 1 :]
    padded = shape_of(x)[channel_dim + 1 :] != call.shape[channel_dim + 1 :]
    if padded or {*shape[2:], *call["stride"]} != {1}:
        for labels in behind:
            call.freeze(labels, f"{call.op} mixes neighbouring channels")
        behind = [None] * len(behind)
    n_in = shape_of(x)[channel_dim]
    applied = shape_of(x) if transposed else call.shape
    macs = prod(applied) // max(applied[channel_dim], 1) * prod(shape)
    stride = tuple(call["stride"])
    stride = stride * (len(shape) - 2) if len(stride) == 1 else stride
    size = applied[channel_dim + 1 :]
    if name is None:
        for labels in (inputs, *call.dims(weight)):
            call.freeze(labels, f"read by {call.op} with a weight that is computed")
        made = shape[1] * groups if transposed else shape[0]
        sides, rest = _unlabelled(n_in, made), _labelled([*dims[:channel_dim], *behind])
        computed = LayerCall(call.node, "", kind, shape, groups, macs, *sides, stride, size, rest)
        _record_computed(call, weight, computed)
        return [*dims[:channel_dim], None, *behind]
    if groups > 1 and n_in == groups:
        multiplier = shape[1] if transposed else shape[0] // groups
        outputs = _depthwise_outputs(call, weight, inputs, n_in, multiplier, transposed)
        if not isinstance(call.module()[1], nn.modules.conv._ConvNd):  # whose attribute `groups` follows
            call.add_size([COUNT], inputs)
    else:
        outputs = _dense_outputs(call, weight, name, inputs, groups, transposed)
    call.bind(call["bias"], 0, outputs)
    known, rest = _or_none(inputs, n_in), _labelled([*dims[:channel_dim], *behind])
    call.state.calls.append(LayerCall(call.node, name, kind, shape, groups, macs, known, outputs, stride, size, rest))
    return [*dims[:channel_dim], outputs, *behind]


def _depthwise_outputs(
    call: OpCall, weight: Node, inputs: Labels | None, n_in: int, multiplier: int, transposed: bool
) -> Labels:
    """Labels of a depthwise output: channel c * multiplier + i is made from input channel c alone."""
    if inputs is None:
        inputs = call.classes.fresh(n_in)
        call.freeze(inputs, "depthwise over channels that cannot be removed")
    outputs = np.repeat(inputs, multiplier)
    call.bind(weight, 0, inputs if transposed else outputs)
    return outputs


def _dense_outputs(
    call: OpCall, weight: Node, name: str, inputs: Labels | None, groups: int, transposed: bool
) -> Labels:
    """Labels of the output of a full product, or of one per group: groups lose channels at the same places."""
    shape = shape_of(weight)
    if inputs is not None and groups > 1:
        call.tie(inputs.reshape(groups, -1))
    if transposed:
        call.bind(weight, 0, inputs)
        return np.tile(call.state.axis(name, 1, shape[1]), groups)
    call.bind(weight, 1, None if inputs is None else inputs[: shape[1]])
    outputs = call.state.axis(name, 0, shape[0])
    call.tie(outputs.reshape(groups, -1))
    return outputs


@rule("aten.linear")
def linear(call: OpCall) -> Dims:
    """Linear: labels of the last dim go to its weight, new ones come out; all other dims pass."""
    x: Node = call["input"]
    weight: Node = call["weight"]
    dims, shape, name = call.dims(x), shape_of(weight), _layer_weight(call, weight, LayerKind.LINEAR)
    if name is None:
        for labels in (dims[-1], *call.dims(weight)):
            call.freeze(labels, "read by aten.linear with a weight that is computed")
        if len(shape) == 2:
            sides = _unlabelled(shape[1], shape[0])
            work, rest = prod(call.shape[:-1]) * prod(shape), _labelled(dims[:-1])
            computed = LayerCall(call.node, "", LayerKind.LINEAR, shape, 1, work, *sides, (), call.shape[1:-1], rest)
            _record_computed(call, weight, computed)
        return [*dims[:-1], None]
    call.bind(weight, 1, dims[-1])
    outputs = call.state.axis(name, 0, shape[0])
    call.bind(call["bias"], 0, outputs)
    if type(call.module()[1]).__name__ == "MultiheadAttention":  # its code compares sizes with attributes of its own
        for labels in (dims[-1], outputs):
            call.freeze(labels, "inside nn.MultiheadAttention, whose code has fixed sizes; jpq.decompose frees it")
    macs = prod(call.shape[:-1]) * prod(shape)
    inputs, size, rest = _or_none(dims[-1], shape[1]), call.shape[1:-1], _labelled(dims[:-1])
    layer = LayerCall(call.node, name, LayerKind.LINEAR, shape, 1, macs, inputs, outputs, (), size, rest)
    call.state.calls.append(layer)
    return [*dims[:-1], outputs]


@rule("aten.embedding")
def embedding(call: OpCall) -> Dims:
    """Embedding: rows of a table, whose columns are the channels."""
    weight: Node = call["weight"]
    index, name = call.dims(call["indices"]), call.state.parameters.get(weight)
    if name is None:
        return [*index, *call.dims(weight)[1:]]
    call.bind(weight, 0, None)
    columns = call.state.axis(name, 1, shape_of(weight)[1])
    call.state.embeddings[name.rpartition(".")[0]] = columns
    return [*index, columns]


@rule("aten.embedding_bag", "aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(call: OpCall) -> list[Dims]:
    """Embedding bag: means, sums or maxima of rows of a table, whose columns are the channels."""
    weight: Node = call["weight"]
    name, bag_dims = call.state.parameters.get(weight), [v.dim() for v in call.node.meta["val"]]
    columns = call.dims(weight)[1]
    if name is not None:
        call.bind(weight, 0, None)
        columns = call.state.axis(name, 1, shape_of(weight)[1])
        call.state.embeddings[name.rpartition(".")[0]] = columns
    rest: list[Dims] = [[None] * n for n in bag_dims[1:]]
    if len(rest) and bag_dims[-1] == 2:  # places of maxima, one per bag and column
        rest[-1] = [None, columns]
    return [[None, columns], *rest]


@rule("aten.matmul", "aten.bmm", "aten.mm", "aten.mv", "aten.dot")
def matmul(call: OpCall) -> Dims:
    """Matrix products: one dim is summed over and therefore keeps all of its channels; batch dims (heads) are tied."""
    a, b = call.tensors[0], call.tensors[-1]
    left, right = call.dims(a), call.dims(b)
    for labels in (left[-1], right[max(len(right) - 2, 0)]):
        call.freeze(labels, f"summed over by {call.op}")
    if len(left) < 2 or len(right) < 2:
        return left[:-1] if len(right) < 2 else [*right[:-2], right[-1]]
    return [*_join_batch_dims(call, [a, b]), left[-2], right[-1]]


def _join_batch_dims(call: OpCall, operands: list[Node]) -> Dims:
    """The labels of the dims before the last two, joined over the operands as broadcasting aligns them."""
    batch: Dims = []
    rank = len(call.shape) - 2
    for k in range(rank):
        size, joined, has_unlabelled = call.shape[k], None, False
        for node in operands:
            d = k - rank + len(shape_of(node)) - 2
            if d < 0 or shape_of(node)[d] != size:
                continue
            labels = call.dims(node)[d]
            has_unlabelled |= labels is None and size != 1
            if labels is not None:
                joined = labels if joined is None else call.join(joined, labels)
        batch.append(call.join(joined, None) if has_unlabelled and joined is not None else joined)
    return batch


@rule("aten.addmm", "aten.baddbmm")
def add_product(call: OpCall) -> Dims:
    """A matrix product and a tensor added to it: as matmul; what is added shrinks with the result."""
    factors = ("mat1", "mat2") if call["mat1"] is not None else ("batch1", "batch2")
    added, a, b = (call[name] for name in ("self", *factors))  # one tensor may be several of them
    left, right = call.dims(a), call.dims(b)
    for labels in (left[-1], right[-2]):
        call.freeze(labels, f"summed over by {call.op}")
    out = [*_join_batch_dims(call, [a, b]), left[-2], right[-1]]
    shape, dims = shape_of(added), call.dims(added)
    for d, labels in enumerate(out[len(out) - len(dims) :]):
        if shape[d] > 1 or shape[d] == len(labels if labels is not None else ()):
            call.bind(added, d, labels)
        else:
            call.freeze(dims[d], f"{call.op} spreads this one channel over many")
    return out


@rule("aten.scaled_dot_product_attention")
def attention(call: OpCall) -> Dims:
    """Attention, softmax(q k^T) v: heads of q, k, v and mask are tied; head sizes and tokens are summed over."""
    q, k, v = call["query"], call["key"], call["value"]
    for node in (q, k):
        call.freeze(call.dims(node)[-1], "summed over inside attention")
    for node in (k, v):
        call.freeze(call.dims(node)[-2], "attention sums over tokens")
    mask = [call["attn_mask"]] if call["attn_mask"] is not None else []
    if call["enable_gqa"]:
        _join_grouped_heads(call, q, k, v)
    return [*_join_batch_dims(call, [q, k, v, *mask]), call.dims(q)[-2], call.dims(v)[-1]]


def _join_grouped_heads(call: OpCall, q: Node, k: Node, v: Node) -> None:
    """Tie each head of keys and values to the several heads of queries, side by side, that read it."""
    heads = shape_of(q)[-3]
    for node in (k, v):
        labels, times = call.dims(node)[-3], heads // shape_of(node)[-3]
        if times == heads:
            call.freeze(labels, f"{call.op} spreads this one head over many")
        elif times > 1:
            call.join(call.dims(q)[-3], None if labels is None else np.repeat(labels, times))


@rule("aten.einsum")
def einsum(call: OpCall) -> Dims:
    """Einsum: dims of one letter are tied; a letter that is summed over keeps all of its channels."""
    operands: list[Node] = list(call["tensors"])
    terms, result = einsum_terms(call["equation"], [len(shape_of(node)) for node in operands])
    placed = [(letter, node, d) for term, node in zip(terms, operands, strict=True) for d, letter in enumerate(term)]
    sizes: dict[str, int] = {}
    for letter, node, d in placed:
        sizes[letter] = max(sizes.get(letter, 1), shape_of(node)[d])
    by_letter: dict[str, Labels | None] = {}
    for letter, node, d in placed:
        labels = call.dims(node)[d]
        if shape_of(node)[d] != sizes[letter]:
            call.freeze(labels, f"{call.op} spreads this one channel over many")
        elif letter in by_letter:
            joined = by_letter[letter]
            by_letter[letter] = joined if joined is None and labels is None else call.join(joined, labels)
        else:
            by_letter[letter] = labels
    for letter, summed in by_letter.items():
        if letter not in result:
            call.freeze(summed, "summed over by aten.einsum")
    return [by_letter[letter] for letter in result]
