"""The rule for view, reshape, flatten and unflatten, which merge and split dims."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from torch.fx import Node

from jpq.tracing.call_sizes import COUNT, KEEP
from jpq.tracing.op_call import Dims, OpCall, module_path, rule, shape_of
from jpq.tracing.own_calls import call_of_node
from jpq.types import NONE, Labels

_HEADS = ("heads", "num_heads", "n_heads", "nheads", "n_head", "num_attention_heads")

_SPLITS = ("aten.view", "aten.reshape", "aten.unflatten", "aten._unsafe_view")

_WIDTH = "hidden_dim"  # attribute of torchvision's ViT: the number of channels that it reshapes by

_PRODUCTS = ("matmul", "bmm", "scaled_dot_product_attention", "einsum")

_PASSING = """view reshape permute transpose swapaxes select unbind getitem mul div contiguous chunk split unsqueeze
squeeze expand clone softmax slice t numpy_T cat neg add to _to_copy layer_norm rms_norm repeat_interleave dropout
split_with_sizes unsafe_split unsafe_chunk narrow flatten unflatten index broadcast_to expand_as repeat tile movedim
moveaxis mT"""  # what may lie between a reshape and the product it prepares


@rule("aten.view", "aten.reshape", "aten.flatten", "aten.unflatten", "aten._unsafe_view")
def reshape(call: OpCall) -> Dims:
    """Reshape: dims merged, split or regrouped (see `_regroup`). Sizes written as numbers are tried out afterwards."""
    dims = call.x
    inferred = _inferred_dims(call)
    out: Dims = [None] * len(call.shape)
    for source_dims, target_dims in _match_dims(shape_of(call.tensors[0]), call.shape):
        labelled = {d: labels for d in source_dims if (labels := dims[d]) is not None}
        if labelled:
            d, labels = _leading_dim(call, labelled)
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


def _leading_dim(call: OpCall, labelled: dict[int, Labels]) -> tuple[int, Labels]:
    """The one dim whose channels can go, of those that a reshape merges or splits together; the others are frozen.

    A merged channel (h, s) can follow h or s, not both: it follows the first dim that is not frozen yet, which is the
    heads before their size, and channels before positions.
    """
    candidates = [d for d, labels in labelled.items() if len(labelled) > 1 and not _is_frozen(call, labels)]
    leading = next(iter([*(d for d in candidates if len(labelled[d]) > 1), *candidates, *labelled]))
    for d, labels in labelled.items():
        if d != leading:
            call.freeze(labels, f"{call.op} merges it with another dim that holds channels, such as heads")
    return leading, labelled[leading]


def _is_frozen(call: OpCall, labels: Labels) -> bool:
    """Whether every channel is frozen already."""
    frozen = call.classes.frozen()
    return all(c in frozen or c == NONE for c in call.classes.find(labels).tolist())


def _record_size(call: OpCall, source: list[int], target: list[int], counted: int, labels: Labels | None) -> None:
    """Record that the size of dim `counted` follows its labels, and that other parts of the channels are held."""
    named = call["size"] or call["shape"] or call["sizes"] or []
    if 0 in source and len(source) > 1 and (target == [counted] or counted == 0) and -1 in named:
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
    axis = _shrinkable_axis(call, long_dims)
    tied = call.tie(np.moveaxis(blocks, axis, -1).reshape(-1, blocks.shape[axis])).copy()
    if feeds_attention(call.node):
        _record_heads(call, tied)
    return long_dims[axis], tied


def _shrinkable_axis(call: OpCall, target: list[int]) -> int:
    """Which of the dims `target`, that channels are split into, loses entries: heads before attention, or the longest.

    Heads are the dim whose size the module names so, that whose size the code leaves open (-1), or that which another
    split of the module has before a head's size, too: keys and values, where queries are split into groups of heads.
    Otherwise they are the last but one.
    """
    shape = [call.shape[d] for d in target]
    if len(shape) == 1 or not feeds_attention(call.node):
        return max(range(len(shape)), key=lambda k: (shape[k], k))
    module: Mapping[str, Any] = vars(call.module()[1])
    inferred, others = _inferred_dims(call) & {*target}, _numbers_of_heads(call)
    for found in (
        _named_heads(module, shape),
        [k for k, d in enumerate(target[:-1]) if inferred == {d}],
        [k for k, n in enumerate(shape[:-1]) if n in others][:1],
    ):
        if found:
            return found[-1]
    return len(shape) - 2


def _named_heads(module: Mapping[str, Any], shape: Sequence[int]) -> list[int]:
    """The dim whose size is the module's number of heads: the last but one of several, or else the first."""
    found = [k for k, n in enumerate(shape) if any(module.get(name) == n for name in _HEADS)]
    return [len(shape) - 2] if len(shape) - 2 in found else found[:1]


def _numbers_of_heads(call: OpCall) -> set[int]:
    """The numbers of heads of the calling module's other splits: channels become heads of this call's head size."""
    path, size = call.module()[0], call.shape[-1]
    found = set()
    for node in call.node.graph.nodes:
        if node is call.node or node.op != "call_function" or not str(node.target).startswith(_SPLITS):
            continue
        shape, source = shape_of(node), shape_of(node.all_input_nodes[0])
        if len(shape) > 2 and shape[-1] == size and source[-1:] == (shape[-2] * size,) and module_path(node) == path:
            found.add(shape[-2])
    return found


def _record_heads(call: OpCall, labels: Labels) -> None:
    """Record that the attribute in which an attention module keeps its number of heads counts these labels."""
    path, module = call.module()
    for name in _HEADS:
        if vars(module).get(name) == len(labels):
            call.state.add_attribute(f"{path}.{name}".lstrip("."), labels)


def feeds_attention(node: Node) -> bool:
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
