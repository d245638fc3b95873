"""The rule for view, reshape, flatten and unflatten: where labels go when dims are merged and split."""

from __future__ import annotations

import operator
from math import prod

import numpy as np
from torch.fx import Node

from jpq.tracing.op_call import Dims, OpCall, rule, shape_of
from jpq.types import Labels

_HEADS = ("heads", "num_heads", "n_heads", "nheads", "n_head", "num_attention_heads")

_WIDTH = "hidden_dim"  # where torchvision's ViT keeps the number of channels that it reshapes by

_PRODUCTS = ("matmul", "bmm", "scaled_dot_product_attention", "einsum")

_PASSING = """view reshape permute transpose swapaxes select unbind getitem mul div contiguous chunk split unsqueeze
squeeze expand clone softmax slice t numpy_T"""  # what may lie between a reshape and the product it prepares


@rule("aten.view", "aten.reshape", "aten.flatten", "aten.unflatten", "aten._unsafe_view", "aten.view_as")
def reshape(call: OpCall) -> Dims:
    """Dims merged, split or regrouped; see `_regroup`. Sizes written as numbers are put to the test afterwards."""
    source, dims = shape_of(call.tensors[0]), call.x
    target, out = call.shape, [None] * len(call.shape)
    free = set(range(len(target))) if call.op == "aten.flatten" else set()
    if call.op in ("aten.view", "aten.reshape"):
        free = {d for d, n in enumerate(call["size"] or call["shape"]) if n == -1}
    if call.op == "aten.unflatten":
        start = call.dim(call["dim"])
        free = set(range(len(target))) - {start + d for d, n in enumerate(call["sizes"]) if n != -1}
    result: Dims = list(out)
    for src, dst in _blocks(source, target):
        labelled = [d for d in src if dims[d] is not None]
        if len(labelled) > 1:
            for d in labelled:
                call.freeze(dims[d], f"{call.op} merges two dims that both hold channels")
        elif labelled:
            labels = dims[labelled[0]]
            assert labels is not None
            at, moved = _regroup(call, labels, labelled[0], src, dst)
            if at is not None:
                result[at] = moved
                if at not in free:
                    call.suspect(labels)
                    call.counts(_WIDTH, call.shape[at], moved)
    return result


def _blocks(source: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dims with equal products."""
    out: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) or j < len(target):
        src, dst = [i] if i < len(source) else [], [j] if j < len(target) else []
        a, b, i, j = prod(source[k] for k in src), prod(target[k] for k in dst), i + 1, j + 1
        while a != b:
            if a < b:
                src.append(i)
                a, i = a * source[i], i + 1
            else:
                dst.append(j)
                b, j = b * target[j], j + 1
        out.append((src, dst))
    return out


def _regroup(call: OpCall, labels: Labels, d: int, src: list[int], dst: list[int]) -> tuple[int | None, Labels | None]:
    """Where the labels of source dim `d` go, and what they are there."""
    sizes = [shape_of(call.tensors[0])[k] for k in src]
    wide = [k for k in dst if call.shape[k] != 1]
    spread = np.broadcast_to(labels.reshape([-1 if k == d else 1 for k in src]), sizes).reshape(-1)
    if not wide:
        if len(labels) == 1 and dst:
            return dst[0], labels
        call.freeze(labels, "a single channel whose dim is squeezed away")
        return None, None
    if len(wide) == 1:
        return wide[0], spread
    blocks = spread.reshape([call.shape[k] for k in wide])
    for axis, k in enumerate(wide):  # the inverse of an earlier merge
        rows = np.moveaxis(blocks, axis, -1).reshape(-1, blocks.shape[axis])
        if (rows == rows[0]).all():
            return k, rows[0].copy()
    axis = _varying(call, blocks.shape)
    first = call.tie(np.moveaxis(blocks, axis, -1).reshape(-1, blocks.shape[axis])).copy()
    if _feeds_attention(call.node):
        _count_heads(call, first)
    return wide[axis], first


def _varying(call: OpCall, shape: tuple[int, ...]) -> int:
    """Which of the dims that channels are split into can lose entries: heads before attention, else the longest."""
    if len(shape) > 1 and _feeds_attention(call.node):
        return len(shape) - 2
    return max(range(len(shape)), key=lambda k: (shape[k], k))


def _count_heads(call: OpCall, labels: Labels) -> None:
    """Attention keeps its number of heads in an attribute of the module: it counts these labels."""
    path, _ = call.module()
    module = call.book.model.get_submodule(path)
    for name in _HEADS:
        if vars(module).get(name) == len(labels):
            call.book.attribute(f"{path}.{name}".lstrip("."), labels)


def _feeds_attention(node: Node) -> bool:
    """Whether a product of two tensors is reached through nothing but moves."""
    seen, todo, passing = {node}, [node], _PASSING.split()
    while todo:
        for user in todo.pop().users:
            base = "getitem" if user.target is operator.getitem else str(user.target).split(".")[1:2]
            name = base if isinstance(base, str) else (base[0].rstrip("_") if base else "")
            if name in _PRODUCTS:
                return True
            if name in passing and user not in seen:
                seen.add(user)
                todo.append(user)
    return False
