"""Rules for ops that move, cut and glue dims without computing anything."""

from __future__ import annotations

import operator
from math import prod

import numpy as np
from torch.fx import Node

from jpq.network.call import Call, Dims, rule, shape_of
from jpq.types import NONE, Labels


@rule("aten.permute")
def permute(call: Call) -> Dims:
    """Dims in another order."""
    dims = call.x
    return [dims[call.dim(d)] for d in call["dims"]]


@rule("aten.transpose", "aten.swapaxes", "aten.t", "aten.numpy_T", "aten.movedim")
def transpose(call: Call) -> Dims:
    """Two dims change places."""
    dims = call.x
    if call.op == "aten.movedim":
        return list(np.moveaxis(np.array(dims, object), call["source"], call["destination"]))
    if call.op in ("aten.t", "aten.numpy_T"):
        return dims[::-1]
    names = ("axis0", "axis1") if call.op == "aten.swapaxes" else ("dim0", "dim1")
    i, j = (call.dim(call[name]) for name in names)
    dims[i], dims[j] = dims[j], dims[i]
    return dims


@rule("aten.unsqueeze")
def unsqueeze(call: Call) -> Dims:
    """A new dim of size 1."""
    dims = call.x
    dims.insert(call.dim(call["dim"], len(dims) + 1), None)
    return dims


@rule("aten.squeeze")
def squeeze(call: Call) -> Dims:
    """Dims of size 1 go; a single channel that goes this way stays in the network."""
    dims, shape, dim = call.x, shape_of(call.tensors[0]), call["dim"]
    named = range(len(dims)) if dim is None else [call.dim(d) for d in (dim if isinstance(dim, list) else [dim])]
    gone = [d for d in named if shape[d] == 1]
    for d in gone:
        call.freeze(dims[d], "a single channel whose dim is squeezed away")
    return [labels for d, labels in enumerate(dims) if d not in gone]


@rule("aten.select", "aten.unbind")
def select(call: Call) -> Dims | list[Dims]:
    """Picks single indices of a dim: their places in the code are fixed."""
    dims, d = call.x, call.dim(call["dim"])
    call.freeze(dims[d], f"picked by its index in {call.op}")
    out = [*dims[:d], *dims[d + 1 :]]
    return out if call.op == "aten.select" else [out] * len(call.node.meta["val"])


@rule("aten.slice", "aten.narrow")
def cut(call: Call) -> Dims:
    """A part of a dim; bounds within labelled channels are numbers in the model's code."""
    dims, d = call.x, call.dim(call["dim"])
    labels = dims[d]
    if labels is not None and call.shape[d] != len(labels):
        call.freeze(labels, f"cut at a fixed place by {call.op}")
        start = call["start"] if isinstance(call["start"], int) else 0
        start = max(start + len(labels), 0) if start < 0 else start
        dims[d] = labels[start :: call["step"] or 1][: call.shape[d]]
    return dims


@rule("aten.chunk", "aten.split", "aten.split_with_sizes", "aten.tensor_split")
def split(call: Call) -> list[Dims]:
    """Several parts of a dim. Equal parts lose channels at the same places; unequal ones keep all of theirs."""
    dims, d = call.x, call.dim(call["dim"])
    labels, sizes = dims[d], [int(v.shape[d]) for v in call.node.meta["val"]]
    if labels is None:
        return [dims] * len(sizes)
    if len(set(sizes)) == 1:
        call.tie(labels.reshape(len(sizes), -1))
        if call.op != "aten.chunk":
            call.suspect(labels)
    else:
        call.freeze(labels, f"cut into unequal parts by {call.op}")
    parts = np.split(labels, np.cumsum(sizes)[:-1])
    return [[*dims[:d], part, *dims[d + 1 :]] for part in parts]


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(call: Call) -> Dims:
    """Labels side by side along the dim, tied index by index on all others."""
    nodes: list[Node] = [n for n in call["tensors"] if shape_of(n) != (0,)]
    d = call.dim(call["dim"])
    out: Dims = []
    for k in range(len(call.shape)):
        parts = [call.dims(n)[k] for n in nodes]
        if all(p is None for p in parts):
            out.append(None)
        elif k == d:
            sized = zip(parts, nodes, strict=True)
            out.append(np.concatenate([np.full(shape_of(n)[k], NONE) if p is None else p for p, n in sized]))
        else:
            first = parts[0]
            for other in parts[1:]:
                first = call.join(first, other)
            out.append(first)
    return out


@rule("aten.stack")
def stack(call: Call) -> Dims:
    """Tied index by index; the new dim has no labels."""
    nodes: list[Node] = list(call["tensors"])
    out = call.dims(nodes[0])
    for node in nodes[1:]:
        other = call.dims(node)
        out = [a if a is None and b is None else call.join(a, b) for a, b in zip(out, other, strict=True)]
    out.insert(call.dim(call["dim"], len(out) + 1), None)
    return out


@rule("aten.expand", "aten.expand_as", "aten.broadcast_to")
def expand(call: Call) -> Dims:
    """Dims of size 1 grow; labelled dims pass, though the code may name their size."""
    dims, shape = call.x, call.shape
    new = len(shape) - len(dims)
    sizes = call["size"] or [-1] * len(shape)
    for d, labels in enumerate(dims):
        if labels is None:
            continue
        if shape[d + new] != len(labels):
            call.freeze(labels, f"{call.op} spreads this one channel over many")
            dims[d] = None
        elif sizes[d + new] != -1:
            call.suspect(labels)
    return [None] * new + dims


@rule("aten.repeat", "aten.tile")
def repeat(call: Call) -> Dims:
    """Copies side by side carry the same labels."""
    times = list(call["repeats"] or call["dims"])
    dims = [None] * (len(times) - len(call.x)) + call.x
    return [None if labels is None else np.tile(labels, n) for labels, n in zip(dims, times, strict=True)]


@rule("aten.flip", "aten.roll")
def flip(call: Call) -> Dims:
    """A reversed dim has reversed labels; channels that are rolled keep their places."""
    dims = call.x
    for d in (call.dim(d) for d in call["dims"]):
        labels = dims[d]
        if labels is not None and call.op == "aten.roll":
            call.freeze(labels, "rolled by a fixed number of places")
            shift = call["shifts"][call["dims"].index(d)] if d in call["dims"] else 0
            dims[d] = np.roll(labels, shift)
        elif labels is not None:
            dims[d] = labels[::-1].copy()
    return dims


@rule("aten.index")
def index(call: Call) -> Dims:
    """Rows of one dim picked by one index tensor; the dims that are not indexed pass."""
    source: Node = call["self"]
    dims, picks = call.dims(source), list(call["indices"])
    used = [d for d, pick in enumerate(picks) if pick is not None]
    for d in used:
        call.freeze(dims[d], "picked by index")
    if len(used) != 1:
        for labels in dims:
            call.freeze(labels, "picked by several indices at once")
        return [None] * len(call.shape)
    return [*dims[: used[0]], *([None] * len(shape_of(picks[used[0]]))), *dims[used[0] + 1 :]]


@rule("aten.pad", "aten.constant_pad_nd")
def pad(call: Call) -> Dims:
    """Padding around unlabelled dims; zero channels are labelled where PadChannels makes them, else frozen."""
    dims, shape, sizes = call.x, shape_of(call.tensors[0]), list(call["pad"])
    path, kind = call.module()
    for k, (before, after) in enumerate(zip(sizes[::2], sizes[1::2], strict=True)):
        d = len(dims) - 1 - k
        labels = dims[d]
        if labels is None or before == after == 0:
            continue
        known = call.classes.fresh(before + after)
        if kind.endswith("jpq.network.pad.PadChannels"):
            call.book.attribute(f"{path}.before", known[:before])
            call.book.attribute(f"{path}.after", known[before:])
        else:
            call.freeze(known, "zero channels whose number is fixed in the code; use jpq.models.PadChannels")
            call.suspect(labels)
        if min(before, after) < 0 or len(labels) != shape[d]:
            call.freeze(labels, "cropped by a negative padding")
            dims[d] = None
        else:
            dims[d] = np.concatenate([known[:before], labels, known[before:]])
    return dims


@rule("aten.pixel_shuffle", "aten.pixel_unshuffle", "aten.channel_shuffle")
def shuffle(call: Call) -> Dims:
    """Channels to pixels and back, or channels among themselves: the blocks lose channels at the same places."""
    dims = call.x
    labels = dims[-3]
    if labels is not None:
        if call.op == "aten.pixel_shuffle":
            dims[-3] = call.tie(labels.reshape(-1, call["upscale_factor"] ** 2).T).copy()
        elif call.op == "aten.pixel_unshuffle":
            dims[-3] = np.repeat(labels, call["downscale_factor"] ** 2)
        else:
            blocks = labels.reshape(call["groups"], -1)
            call.tie(blocks)
            dims[-3] = blocks.T.reshape(-1)
    return dims


@rule("aten.view", "aten.reshape", "aten.flatten", "aten.unflatten", "aten._unsafe_view", "aten.view_as")
def reshape(call: Call) -> Dims:
    """Dims merged, split or regrouped; see `_regroup`. Sizes written as numbers are put to the test afterwards."""
    source, dims = shape_of(call.tensors[0]), call.x
    target, out = call.shape, [None] * len(call.shape)
    free = set(range(len(target))) if call.op == "aten.flatten" else set()
    if call.op in ("aten.view", "aten.reshape"):
        free = {d for d, n in enumerate(call["size"] or call["shape"]) if n == -1}
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


def _regroup(call: Call, labels: Labels, d: int, src: list[int], dst: list[int]) -> tuple[int | None, Labels | None]:
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


def _varying(call: Call, shape: tuple[int, ...]) -> int:
    """Which of the dims that channels are split into can lose entries: heads before attention, else the longest."""
    if len(shape) > 1 and _feeds_attention(call.node):
        return len(shape) - 2
    return max(range(len(shape)), key=lambda k: (shape[k], k))


def _count_heads(call: Call, labels: Labels) -> None:
    """Attention keeps its number of heads in an attribute of the module: it counts these labels."""
    path, _ = call.module()
    module = call.book.model.get_submodule(path)
    for name in _HEADS:
        if vars(module).get(name) == len(labels):
            call.book.attribute(f"{path}.{name}".lstrip("."), labels)


_PASSING = ("view", "reshape", "permute", "transpose", "swapaxes", "select", "unbind", "getitem", "mul", "div",
            "contiguous", "chunk", "split", "unsqueeze", "squeeze", "expand", "clone", "softmax", "normalize", "slice",
            "t", "numpy_T")  # fmt: skip
_HEADS = ("heads", "num_heads", "n_heads", "nheads", "n_head", "num_attention_heads")
_PRODUCTS = ("matmul", "bmm", "scaled_dot_product_attention", "einsum")


def _feeds_attention(node: Node) -> bool:
    """Whether a product of two tensors is reached through nothing but moves."""
    seen, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            base = "getitem" if user.target is operator.getitem else str(user.target).split(".")[1:2]
            name = base if isinstance(base, str) else (base[0].rstrip("_") if base else "")
            if name in _PRODUCTS:
                return True
            if name in _PASSING and user not in seen:
                seen.add(user)
                todo.append(user)
    return False
