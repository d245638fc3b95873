"""Rules for ops that move, split or join dims without arithmetic: permute, slice, cat, index, pad."""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from jpq.tracing.call_sizes import COUNT, KEEP, Pattern
from jpq.tracing.op_call import Dims, OpCall, rule, shape_of
from jpq.tracing.own_calls import call_of_node
from jpq.tracing.pad_channels import PadChannels
from jpq.tracing.rules.reshape import feeds_attention
from jpq.types import NONE, Labels


@rule("aten.permute")
def permute(call: OpCall) -> Dims:
    """Permute: dims in another order."""
    dims = call.x
    return [dims[call.dim(d)] for d in call["dims"]]


@rule("aten.transpose", "aten.swapaxes", "aten.swapdims", "aten.t", "aten.numpy_T", "aten.mT", "aten.movedim")
@rule("aten.moveaxis")
def transpose(call: OpCall) -> Dims:
    """Transpose and its relatives: two dims change places, or one moves."""
    dims = call.x
    if call.op in ("aten.movedim", "aten.moveaxis"):
        order = np.moveaxis(np.empty(range(1, len(dims) + 1)), call["source"], call["destination"]).shape
        return [dims[n - 1] for n in order]
    if call.op == "aten.mT":
        return [*dims[:-2], dims[-1], dims[-2]]
    if call.op in ("aten.t", "aten.numpy_T"):
        return dims[::-1]
    names = ("axis0", "axis1") if call.op == "aten.swapaxes" else ("dim0", "dim1")
    i, j = (call.dim(call[name]) for name in names)
    dims[i], dims[j] = dims[j], dims[i]
    return dims


@rule("aten.unsqueeze")
def unsqueeze(call: OpCall) -> Dims:
    """Unsqueeze: a new dim of size 1 without labels."""
    dims = call.x
    dims.insert(call.dim(call["dim"], len(dims) + 1), None)
    return dims


@rule("aten.squeeze")
def squeeze(call: OpCall) -> Dims:
    """Squeeze: dims of size 1 are removed; a single channel in such a dim is frozen."""
    dims, shape, dim = call.x, shape_of(call.tensors[0]), call["dim"]
    named = range(len(dims)) if dim is None else [call.dim(d) for d in (dim if isinstance(dim, list) else [dim])]
    removed = [d for d in named if shape[d] == 1]
    for d in removed:
        call.freeze(dims[d], "a single channel whose dim is squeezed away")
    return [labels for d, labels in enumerate(dims) if d not in removed]


@rule("aten.select", "aten.unbind")
def select(call: OpCall) -> Dims | list[Dims]:
    """Select: single indices of a dim, whose places are fixed in the code."""
    dims, d = call.x, call.dim(call["dim"])
    call.freeze(dims[d], f"picked by its index in {call.op}")
    other_dims = [*dims[:d], *dims[d + 1 :]]
    return other_dims if call.op == "aten.select" else [other_dims] * len(call.node.meta["val"])


@rule("aten.slice", "aten.narrow")
def slice_dim(call: OpCall) -> Dims:
    """Slice: a part of a dim; bounds within labelled channels are numbers in the model's code, which may follow."""
    dims, d = call.x, call.dim(call["dim"])
    labels = dims[d]
    if labels is not None and call.shape[d] != len(labels):
        start = call["start"] if isinstance(call["start"], int) else 0
        start, step = max(start + len(labels), 0) if start < 0 else start, call["step"] or 1
        followed = step == 1 and _record_bounds(call, d, labels, start, start + call.shape[d])
        call.freeze_unless_followed(labels, f"cut at a fixed place by {call.op}", followed)
        dims[d] = labels[start::step][: call.shape[d]]
    return dims


def _record_bounds(call: OpCall, d: int, labels: Labels, start: int, stop: int) -> bool:
    """Record that start and stop (or length) of a slice follow the channels before them; whether they can."""
    own = call_of_node(call.node)
    if own is not None and own.key.startswith("narrow:"):
        before = call.add_size([COUNT, stop - start], labels[:start])
        return call.add_size([start, COUNT], labels[start:stop]) and before
    if own is not None and not own.key.startswith("__getitem__:"):
        return False
    free: list[int | str] = [KEEP] * (2 * d)
    followed = stop == len(labels) or call.add_size([*free, start, COUNT], labels[:stop])
    return followed and (start == 0 or call.add_size([*free, COUNT, stop], labels[:start]))


@rule("aten.chunk", "aten.split", "aten.split_with_sizes", "aten.tensor_split", "aten.unsafe_chunk")
@rule("aten.unsafe_split", "aten.unsafe_split_with_sizes")
def split(call: OpCall) -> list[Dims]:
    """Split: several parts of a dim. Equal parts lose channels at the same places; unequal ones need other sizes."""
    dims, d = call.x, call.dim(call["dim"])
    labels, sizes = dims[d], [int(v.shape[d]) for v in call.node.meta["val"]]
    if labels is None:
        return [dims] * len(sizes)
    parts = np.split(labels, np.cumsum(sizes)[:-1])
    followed = [call.add_size([COUNT if i == k else n for i, n in enumerate(sizes)], p) for k, p in enumerate(parts)]
    if len(set(sizes)) == 1:
        call.tie(labels.reshape(len(sizes), -1))
        if call.op != "aten.chunk":
            call.suspect(labels)
    else:
        call.freeze_unless_followed(labels, f"cut into unequal parts by {call.op}", all(followed))
    return [[*dims[:d], part, *dims[d + 1 :]] for part in parts]


@rule("aten.glu")
def glu(call: OpCall) -> Dims:
    """GLU: one half of a dim times the sigmoid of the other; both lose channels at the same places."""
    dims, d = call.x, call.dim(call["dim"])
    labels = dims[d]
    if labels is not None:
        dims[d] = call.tie(labels.reshape(2, -1)).copy()
    return dims


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(call: OpCall) -> Dims:
    """Concatenation: labels side by side along one dim, tied index by index on all others."""
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
            joined = parts[0]
            for part in parts[1:]:
                joined = call.join(joined, part)
            out.append(joined)
    return out


@rule("aten.stack")
def stack(call: OpCall) -> Dims:
    """Stack: operands are tied index by index; the new dim has no labels."""
    nodes: list[Node] = list(call["tensors"])
    out = call.dims(nodes[0])
    for node in nodes[1:]:
        pairs = zip(out, call.dims(node), strict=True)
        out = [a if a is None and b is None else call.join(a, b) for a, b in pairs]
    out.insert(call.dim(call["dim"], len(out) + 1), None)
    return out


@rule("aten.expand", "aten.broadcast_to")
def expand(call: OpCall) -> Dims:
    """Expand: dims of size 1 grow; labelled dims pass, though the code may name their size."""
    return _expanded(call)


@rule("aten.expand_as")
def expand_as(call: OpCall) -> Dims:
    """Expand to another tensor's shape: dims of size 1 grow to its channels, if it has any there."""
    other, out, shape = call.dims(call["other"]), _expanded(call), shape_of(call["self"])
    new = len(out) - len(shape)
    for d, labels in enumerate(call.x):
        if labels is None and shape[d] == 1:
            out[d + new] = other[d + new]
        elif labels is not None and shape[d] > 1:
            call.join(labels, other[d + new])
    return [*other[:new], *out[new:]]


def _expanded(call: OpCall) -> Dims:
    """The labels of an expanded tensor."""
    dims, shape = call.x, call.shape
    new = len(shape) - len(dims)
    added: Dims = [None] * new
    sizes = call["size"] or [-1] * len(shape)
    copied = _copied_heads(call, added + dims)
    for d, labels in enumerate(dims):
        if labels is None:
            continue
        if shape[d + new] != len(labels):
            call.freeze(labels, f"{call.op} spreads this one channel over many")
            dims[d] = None
        elif sizes[d + new] != -1:
            call.suspect(labels)
            call.add_size([COUNT if k == d + new else KEEP for k in range(len(shape))], labels)
    out = added + dims
    if copied is not None:
        out[copied] = _copies(call, copied, [COUNT if k == copied else KEEP for k in range(len(shape))])
    return out


def _copied_heads(call: OpCall, dims: Dims) -> int | None:
    """The dim in which one head, of keys or a mask, is copied to all heads of an attention; None where none is.

    It is the only one that grows of those between the batch and the last two, and none of these has channels.
    """
    shape, rank = shape_of(call.tensors[0]), len(dims)
    shape = (1,) * (rank - len(shape)) + shape
    between = range(1, rank - 2)
    grown = [d for d in between if shape[d] == 1 != call.shape[d]]
    if len(grown) != 1 or any(dims[d] is not None for d in between) or not feeds_attention(call.node):
        return None
    return grown[0]


def _copies(call: OpCall, dim: int, pattern: Pattern) -> Labels:
    """New labels for the copies of one head along `dim`: their number, which the code names, may follow the heads."""
    copies = call.classes.fresh(call.shape[dim])
    reason = f"{call.op} copies one head to a number that is fixed in the code"
    call.freeze_unless_followed(copies, reason, call.add_size(pattern, copies))
    return copies


@rule("aten.repeat", "aten.tile")
def repeat(call: OpCall) -> Dims:
    """Repeat: copies side by side carry the same labels."""
    times = list(call["repeats"] or call["dims"])
    times = [1] * (len(call.x) - len(times)) + times
    dims = [None] * (len(times) - len(call.x)) + call.x
    out: Dims = [None if labels is None else np.tile(labels, n) for labels, n in zip(dims, times, strict=True)]
    copied = _copied_heads(call, dims)
    if copied is not None and len(call["repeats"] or call["dims"]) == len(dims):
        out[copied] = _copies(call, copied, [COUNT if k == copied else KEEP for k in range(len(dims))])
    return out


@rule("aten.repeat_interleave")
def repeat_interleave(call: OpCall) -> Dims:
    """Repeat-interleave: each index several times in a row, with the same label.

    Where the counts are a tensor, or dims are flattened, all channels are frozen.
    """
    dims, times = call.x, call["repeats"]
    if call["dim"] is None or not isinstance(times, int):
        for labels in dims:
            call.freeze(labels, f"repeated by {call.op} in an order that is not known")
        return [None] * len(call.shape)
    d = call.dim(call["dim"])
    labels = dims[d]
    copied = _copied_heads(call, dims) if labels is None else None
    call.add_size([times], labels)  # held, where the code computes it from a number of heads that shrinks
    dims[d] = _copies(call, d, [COUNT]) if copied == d else None if labels is None else np.repeat(labels, times)
    return dims


@rule("aten.flip")
def flip(call: OpCall) -> Dims:
    """Flip: a reversed dim has reversed labels."""
    dims = call.x
    for d in {call.dim(d) for d in call["dims"]}:
        dims[d] = _reversed(dims[d])
    return dims


@rule("aten.rot90")
def rotate(call: OpCall) -> Dims:
    """Rotation by quarter turns in the plane of two dims."""
    dims = call.x
    a, b = (call.dim(d) for d in call["dims"])
    for _ in range(call["k"] % 4):
        dims[a], dims[b] = _reversed(dims[b]), dims[a]
    return dims


def _reversed(labels: Labels | None) -> Labels | None:
    """The labels from last to first."""
    return None if labels is None else labels[::-1].copy()


@rule("aten.roll")
def roll(call: OpCall) -> Dims:
    """Roll: channels that are rolled keep all of theirs, other dims pass."""
    dims, rolled = call.x, [call.dim(d) for d in call["dims"]]
    shifts = call["shifts"] if isinstance(call["shifts"], (list, tuple)) else [call["shifts"]]
    for d in rolled or range(len(dims)):  # without dims the whole tensor is rolled as one row
        call.freeze(dims[d], "rolled by a fixed number of places")
    if not rolled:
        return [None] * len(dims)
    for d, shift in zip(rolled, shifts, strict=True):
        labels = dims[d]
        dims[d] = None if labels is None else np.roll(labels, shift)
    return dims


@rule("aten.im2col")
def unfold_windows(call: OpCall) -> Dims:
    """F.unfold, [N, C, H, W] -> [N, C * window, positions]: a channel becomes one row per place of the window."""
    dims = call.x
    for labels in dims[-2:]:
        call.freeze(labels, f"{call.op} mixes neighbouring channels")
    channels = dims[-3]
    return [*dims[:-3], None if channels is None else np.repeat(channels, np.prod(call["kernel_size"])), None]


@rule("aten.col2im")
def fold_windows(call: OpCall) -> Dims:
    """F.fold, [N, C * window, positions] -> [N, C, H, W]: the rows of a channel are kept or removed together."""
    dims = call.x
    call.freeze(dims[-1], f"{call.op} adds up positions")
    rows = dims[-2]
    channels = None if rows is None else call.tie(rows.reshape(-1, int(np.prod(call["kernel_size"]))).T).copy()
    return [*dims[:-2], channels, None, None]


@rule("aten.unfold")
def slide(call: OpCall) -> Dims:
    """Tensor.unfold: windows along one dim, which become a last dim; other dims pass."""
    dims, d = call.x, call.dim(call["dimension"])
    call.freeze(dims[d], f"{call.op} mixes neighbouring channels")
    return [*dims[:d], None, *dims[d + 1 :], None]


@rule("aten.gather", "aten.take_along_dim")
def gather(call: OpCall) -> Dims:
    """Gather: entries of one dim picked by an index per place; other dims pass where the index goes along them."""
    source, index = call["self"], call["index"] if call.op == "aten.gather" else call["indices"]
    dims, places = call.dims(source), call.dims(index)
    d = None if call["dim"] is None else call.dim(call["dim"])
    out: Dims = []
    for k, labels in enumerate(dims if d is not None else []):
        if k == d or call.shape[k] != shape_of(source)[k] or (labels is None and places[k] is not None):
            call.freeze(labels, "picked by index")
            call.freeze(places[k], "an index that is fixed there")
            out.append(None)
            continue
        if labels is not None and places[k] is not None:
            call.join(labels, places[k])
        call.suspect(labels)  # the index, too, must be as wide as the channels
        out.append(labels)
    for labels in dims if d is None else []:
        call.freeze(labels, "picked by index")
    return out if d is not None else [None] * len(call.shape)


@rule("aten.index_select")
def index_select(call: OpCall) -> Dims:
    """Index-select: entries of one dim picked by an index tensor; other dims pass."""
    dims, d = call.dims(call["self"]), call.dim(call["dim"])
    call.freeze(dims[d], "picked by index")
    return [None if k == d else labels for k, labels in enumerate(dims)]


@rule("aten.index")
def index(call: OpCall) -> Dims:
    """Index: entries picked by an index tensor per dim, of which the first dim takes the place; other dims pass.

    The picked entries come first where dims that are not indexed lie between those that are.
    """
    source: Node = call["self"]
    dims, picks = call.dims(source), dict(enumerate(call["indices"]))
    picks = {d: pick for d, pick in picks.items() if pick is not None}
    for d in picks:
        call.freeze(dims[d], "picked by index")
    picked: Dims = [None] * max(len(shape_of(pick)) for pick in picks.values())
    others = [labels for d, labels in enumerate(dims) if d not in picks]
    start = min(picks) if max(picks) - min(picks) + 1 == len(picks) else 0
    return [*others[:start], *picked, *others[start:]]


@rule("aten.pad", "aten.constant_pad_nd")
def pad(call: OpCall) -> Dims:
    """Padding: unlabelled dims pass; zero channels get labels where `PadChannels` makes them, else they are frozen."""
    dims, shape, sizes = call.x, shape_of(call.tensors[0]), list(call["pad"])
    path, module = call.module()
    for k, (before, after) in enumerate(zip(sizes[::2], sizes[1::2], strict=True)):
        d = len(dims) - 1 - k
        labels = dims[d]
        if labels is None or before == after == 0:
            continue
        zeros = call.classes.fresh(before + after)
        if isinstance(module, PadChannels):
            call.state.add_attribute(f"{path}.before", zeros[:before])
            call.state.add_attribute(f"{path}.after", zeros[before:])
        else:
            reason = "zero channels whose number is fixed in the code; use jpq.tracing.PadChannels"
            call.freeze_unless_followed(zeros, reason, _record_padding(call, 2 * k, zeros, before))
            call.suspect(labels)
        if min(before, after) < 0 or len(labels) != shape[d]:
            call.freeze(labels, "cropped by a negative padding")
            dims[d] = None
        else:
            dims[d] = np.concatenate([zeros[:before], labels, zeros[before:]])
    return dims


def _record_padding(call: OpCall, place: int, zeros: Labels, before: int) -> bool:
    """Record that the numbers of zero channels before and after follow their labels; whether they can."""
    own = call_of_node(call.node)
    if own is None or not own.key.startswith("pad:") or before < 0 or before > len(zeros):
        return False
    free: list[int | str] = [KEEP] * place
    first = call.add_size([*free, COUNT, len(zeros) - before], zeros[:before])
    return call.add_size([*free, before, COUNT], zeros[before:]) and first


@rule("aten.pixel_shuffle", "aten.pixel_unshuffle")
def shuffle_pixels(call: OpCall) -> Dims:
    """Pixel shuffles of [..., channels, height, width]: blocks of channels lose channels at the same places."""
    dims = call.x
    labels = dims[-3]
    if labels is not None:
        if call.op == "aten.pixel_shuffle":
            dims[-3] = call.tie(labels.reshape(-1, call["upscale_factor"] ** 2).T).copy()
        else:
            dims[-3] = np.repeat(labels, call["downscale_factor"] ** 2)
    return dims


@rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def shuffle_channels(call: OpCall) -> Dims:
    """Channel shuffles of [batch, channels, ...]: groups that are interleaved lose channels at the same places."""
    dims = call.x
    labels = dims[1]
    if labels is not None:
        blocks = labels.reshape(call["groups"], -1)
        call.tie(blocks)
        dims[1] = blocks.T.reshape(-1)
    return dims
