"""The rule for view, reshape, flatten and unflatten, which merge and split dims."""

from __future__ import annotations

import operator
from math import prod

import numpy as np
from torch.fx import Node

from jpq.tracing.call_sizes import COUNT, KEEP
from jpq.tracing.op_call import Dims, OpCall, rule, shape_of
from jpq.tracing.own_calls import call_of_node
from jpq.types import Labels

_HEADS = ("heads", "num_heads", "n_heads", "nheads", "n_head", "num_attention_heads")

_WIDTH = "hidden_dim"  # attribute of torchvision's ViT: the number of channels that it reshapes by

_PRODUCTS = ("matmul", "bmm", "scaled_dot_product_attention", "einsum")

_PASSING = """view reshape permute transpose swapaxes select unbind getitem mul div contiguous chunk split unsqueeze
squeeze expand clone softmax slice t numpy_T cat neg add to _to_copy layer_norm rms_norm repeat_interleave dropout
split_with_sizes unsafe_split unsafe_chunk narrow"""  # what may lie between a reshape and the product it prepares


@rule("aten.view", "aten.reshape", "aten.flatten", "aten.unflatten", "aten._unsafe_view")
def reshape(call: OpCall) -> Dims:
    """Reshape: dims merged, split or regrouped (see `_regroup`). Sizes written as numbers are tried out afterwards."""
    dims = call.x
    inferred = _inferred_dims(call)
    out: Dims = [None] * len(call.shape)
    for source_dims, target_dims in _match_dims(shape_of(call.tensors[0]), call.shape):
        labelled = [(d, labels) for d in source_dims if (labels := dims[d]) is not None]
        if len(labelled) > 1:
            for _, labels in labelled:
                call.freeze(labels, f"{call.op} merges two dims that both hold channels")
        elif labelled:
            ((d, labels),) = labelled
            target, moved = _regroup(call, labels, d, source_dims, target_dims)
            if target is not None:
                out[target] = moved
                if target not in inferred:
                    call.suspect(labels)
                    call.add_attribute(_WIDTH, call.shape[target], moved)
                    _record_size(call, source_dims, target_dims, target, moved)
    return out


@rule("aten.view_as", "aten.reshape_as")
def reshape_as(call: OpCall) -> Dims:
    """Reshape to another tensor's shape: every size follows that tensor, whose channels are tied to these."""
    out = reshape(call)
    assert not any(isinstance(labels, list) for labels in out)
    joined: Dims = []
    for labels, other in zip(out, call.dims(call["other"]), strict=True):
        joined.append(labels if labels is None and other is None else call.join(labels, other))  # type: ignore[arg-type]
    return joined


def _record_size(call: OpCall, source: list[int], target: list[int], counted: int, labels: Labels | None) -> None:
    """Record that the size of dim `counted` follows its labels, and that other parts of the channels are held."""
    named = call["size"] or call["shape"] or call["sizes"] or []
    if 0 in source and len(source) > 1 and target == [counted] and -1 in named:
        return  # the number would hold for this batch size only
    pattern: list[int | str] = [KEEP] * len(call.shape)
    for d in target:
        pattern[d] = KEEP if 0 in source else call.shape[d]
    pattern[counted] = COUNT
    own = call_of_node(call.node)
    if own is not None and own.key.startswith("unflatten:"):
        pattern = [pattern[d] for d in target]
    call.add_size(pattern, labels)


def _inferred_dims(call: OpCall) -> set[int]:
    """Dims of the output whose size follows from the input, rather than being written as a number."""
    every = set(range(len(call.shape)))
    if call.op in ("aten.flatten", "aten.view_as", "aten.reshape_as"):
        return every
    if call.op in ("aten.view", "aten.reshape"):
        return {d for d, n in enumerate(call["size"] or call["shape"]) if n == -1}
    if call.op == "aten.unflatten":
        start = call.dim(call["dim"])
        return every - {start + d for d, n in enumerate(call["sizes"]) if n != -1}
    return set()


def _match_dims(source: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of source dims and of target dims with equal products, in order."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) or j < len(target):
        source_dims, target_dims = [i] if i < len(source) else [], [j] if j < len(target) else []
        a, b = prod(source[k] for k in source_dims), prod(target[k] for k in target_dims)
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                source_dims.append(i)
                a, i = a * source[i], i + 1
            else:
                target_dims.append(j)
                b, j = b * target[j], j + 1
        runs.append((source_dims, target_dims))
    return runs


def _regroup(
    call: OpCall, labels: Labels, d: int, source_dims: list[int], target_dims: list[int]
) -> tuple[int | None, Labels | None]:
    """(target dim, labels there) of the labels of source dim `d`; (None, None) where they are frozen."""
    sizes = [shape_of(call.tensors[0])[k] for k in source_dims]
    long_dims = [k for k in target_dims if call.shape[k] != 1]
    spread = np.broadcast_to(labels.reshape([-1 if k == d else 1 for k in source_dims]), sizes).reshape(-1)
    if not long_dims:
        if len(labels) == 1 and target_dims:
            return target_dims[0], labels
        call.freeze(labels, "a single channel whose dim is squeezed away")
        return None, None
    if len(long_dims) == 1:
        return long_dims[0], spread
    blocks = spread.reshape([call.shape[k] for k in long_dims])
    for axis, k in enumerate(long_dims):  # the inverse of an earlier merge
        rows = np.moveaxis(blocks, axis, -1).reshape(-1, blocks.shape[axis])
        if (rows == rows[0]).all():
            return k, rows[0].copy()
    axis = _shrinkable_axis(call, blocks.shape)
    tied = call.tie(np.moveaxis(blocks, axis, -1).reshape(-1, blocks.shape[axis])).copy()
    if _feeds_attention(call.node):
        _record_heads(call, tied)
    return long_dims[axis], tied


def _shrinkable_axis(call: OpCall, shape: tuple[int, ...]) -> int:
    """The dim that can lose entries, of those that channels are split into: heads before attention, or the longest."""
    if len(shape) > 1 and _feeds_attention(call.node):
        module = vars(call.module()[1])
        heads = [k for k, n in enumerate(shape) if any(module.get(name) == n for name in _HEADS)]
        return heads[0] if heads and len(shape) - 2 not in heads else len(shape) - 2
    return max(range(len(shape)), key=lambda k: (shape[k], k))


def _record_heads(call: OpCall, labels: Labels) -> None:
    """Record that the attribute in which an attention module keeps its number of heads counts these labels."""
    path, module = call.module()
    for name in _HEADS:
        if vars(module).get(name) == len(labels):
            call.state.add_attribute(f"{path}.{name}".lstrip("."), labels)


def _feeds_attention(node: Node) -> bool:
    """Whether the value reaches a product of two tensors through nothing but moves and scaling."""
    visited, todo, passing = {node}, [node], _PASSING.split()
    while todo:
        for user in todo.pop().users:
            base = "getitem" if user.target is operator.getitem else str(user.target).split(".")[1:2]
            name = base if isinstance(base, str) else (base[0].rstrip("_") if base else "")
            if name in _PRODUCTS:
                return True
            if name in passing and user not in visited:
                visited.add(user)
                todo.append(user)
    return False
