"""The multiplications of each ATen op: sums of products of two tensors over indices that they share.

    MACs = prod of the sizes of all indices of both operands               matmul: b i k, b k j -> b i j: B * I * K * J

Elementwise products, poolings, norms and transforms (FFT) hold none by the conventions of `jpq.costs.counts`.
`torch.utils.flop_counter` counts the same at another level: half of its flops are these MACs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from string import ascii_letters
from typing import Any

from torch.fx import Node

from jpq.tracing.op_call import OpCall, shape_of
from jpq.tracing.products import einsum_terms
from jpq.types import Labels

EUCLIDEAN_ROWS = 25  # torch.cdist turns to a matrix product above so many rows, by |a|^2 + |b|^2 - 2 a b


@dataclass(frozen=True, eq=False)
class Contraction:
    """One sum of products of two tensors in index notation, as einsum has it."""

    name: str  # that tells it from the op's others: "q@k"; the op's own where it has one
    operands: tuple[Node | None, Node | None]  # None: computed inside the op
    indices: tuple[str, str]  # of each operand, a letter per dim
    result: str
    sizes: Mapping[str, int]
    labels: Mapping[str, Labels]  # index -> class of each of its values, where it has classes

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole example batch."""
        return prod(self.sizes[index] for index in dict.fromkeys("".join(self.indices)))


Counter = Callable[[OpCall], list[Contraction]]

CONTRACTIONS: dict[str, Counter] = {}  # "matmul" -> its contractions; overloads and in-place variants share them


def contractions(call: OpCall) -> list[Contraction]:
    """The contractions of one call; none for an op that multiplies nothing, or only element by element."""
    count = CONTRACTIONS.get(call.op.rpartition(".")[2].rpartition(":")[2].rstrip("_"))
    return count(call) if count else []


def _counts(*ops: str) -> Callable[[Counter], Counter]:
    """A decorator that registers the counter of these ops."""

    def register(counter: Counter) -> Counter:
        CONTRACTIONS.update(dict.fromkeys(ops, counter))
        return counter

    return register


def _contract(call: OpCall, name: str, operands: Sequence[tuple[Node | None, str]], result: str) -> Contraction:
    """The product of the first two operands; others only say sizes and classes of their indices."""
    sizes: dict[str, int] = {}
    labels: dict[str, Labels] = {}
    for node, indices in operands:
        if node is None:
            continue
        for index, size, dim in zip(indices, shape_of(node), call.dims(node), strict=True):
            if size >= sizes.get(index, 1):
                sizes[index] = size
            if dim is not None and size > 1 and len(labels.get(index, ())) < size:
                labels[index] = dim
    (a, a_indices), (b, b_indices) = operands[:2]
    known = {index: dim for index, dim in labels.items() if len(dim) == sizes[index]}
    return Contraction(name, (a, b), (a_indices, b_indices), result, sizes, known)


def _work(name: str, macs: int) -> Contraction:
    """Work of known amount inside a fused op, whose operands are not told apart."""
    return Contraction(name, (None, None), ("n", ""), "n", {"n": macs}, {})


@_counts("matmul", "mm", "bmm", "mv", "dot", "vdot", "linalg_matmul", "linalg_vecdot", "_scaled_mm")
def _matmul(call: OpCall) -> list[Contraction]:
    return [_matrix_product(call, call.tensors[0], call.tensors[1 if len(call.tensors) > 1 else 0])]


@_counts("addmm", "baddbmm", "addmv", "addbmm")
def _add_product(call: OpCall) -> list[Contraction]:
    names = {"addmv": ("mat", "vec"), "addmm": ("mat1", "mat2")}.get(call.op.rpartition(".")[2].rstrip("_"))
    a, b = (call[name] for name in names or ("batch1", "batch2"))
    return [_matrix_product(call, a, b)]


def _matrix_product(call: OpCall, a: Node, b: Node) -> Contraction:
    """matmul: the last dim of `a` with the last but one of `b`, other dims aligned from the right."""
    rank = max(len(shape_of(a)), len(shape_of(b)), 2) - 2
    batch = ascii_letters[26 : 26 + rank]
    left = batch[rank - max(len(shape_of(a)) - 2, 0) :] + ("ik" if len(shape_of(a)) > 1 else "k")
    right = batch[rank - max(len(shape_of(b)) - 2, 0) :] + ("kj" if len(shape_of(b)) > 1 else "k")
    result = batch + left.replace("k", "")[-1:] * (len(shape_of(a)) > 1) + "j" * (len(shape_of(b)) > 1)
    return _contract(call, "", [(a, left), (b, right)], result)


@_counts("linear")
def _linear(call: OpCall) -> list[Contraction]:
    x, weight = call["input"], call["weight"]
    batch = ascii_letters[26 : 26 + len(shape_of(x)) - 1]
    matrix = len(shape_of(weight)) > 1
    return [_contract(call, "", [(x, batch + "k"), (weight, "jk" if matrix else "k")], batch + "j" * matrix)]


@_counts(
    *(f"conv{n}d" for n in (1, 2, 3)),
    *(f"conv_transpose{n}d" for n in (1, 2, 3)),
    *("convolution", "_convolution", "conv_tbc", "cudnn_convolution", "mkldnn_convolution"),
)
def _convolution(call: OpCall) -> list[Contraction]:
    """Convolution: a product of the kernel at every position, of the output, or of the input if transposed."""
    x, weight = call["input"] or call["self"], call["weight"]
    shape, rank = shape_of(weight), len(shape_of(weight)) - 2
    if call.op.endswith("conv_tbc"):  # [time, batch, channels], weight [kernel, in, out]
        sizes = {"n": prod(call.shape[:2]), **dict(zip("kio", shape, strict=True))}
        return [Contraction("", (x, weight), ("n", "kio"), "no", sizes, {})]
    transposed = "conv_transpose" in call.op or bool(call["transposed"])
    applied = shape_of(x) if transposed else call.shape
    channel = len(applied) - rank - 1
    positions = prod(applied) // max(applied[channel], 1)
    indices = "io" if transposed else "oi"
    indices += ascii_letters[26 : 26 + rank]
    sizes = {"n": positions, **dict(zip(indices, shape, strict=True))}
    return [Contraction("", (x, weight), ("n", indices), "no", sizes, {})]


@_counts("scaled_dot_product_attention", "_scaled_dot_product_attention_math")
def _attention(call: OpCall) -> list[Contraction]:
    q, k, v = (call[name] for name in ("query", "key", "value"))
    return _two_products(call, q, k, v)


def _two_products(call: OpCall, q: Node, k: Node, v: Node) -> list[Contraction]:
    """Attention: q k^T over the size of a head, then softmax of it with v over the tokens."""
    batch = ascii_letters[26 : 26 + len(shape_of(q)) - 2]
    queries, keys, values = (q, batch + "le"), (k, batch + "se"), (v, batch + "sf")
    rest = (None, batch + "ls")
    second = _contract(call, "weights@v", [rest, values, queries, keys], batch + "lf")
    return [_contract(call, "q@k", [queries, keys, values], batch + "ls"), second]


@_counts("_native_multi_head_attention", "_transformer_encoder_layer_fwd")
def _fused_attention(call: OpCall) -> list[Contraction]:
    """Torch's fused encoder layers: four projections, two products, and two linear layers where there are any."""
    x = call["query"] or call["src"]
    rows, width = prod(shape_of(x)[:-1]), shape_of(x)[-1]
    tokens = shape_of(x)[-2]
    weights = [call[name] for name in ("qkv_weight", "proj_weight", "ffn_weight_1", "ffn_weight_2")]
    layers = rows * sum(prod(shape_of(weight)) for weight in weights if weight is not None)
    return [_work("projections", layers), *(_work(name, rows * tokens * width) for name in ("q@k", "weights@v"))]


@_counts("einsum")
def _einsum(call: OpCall) -> list[Contraction]:
    """Einsum: operands are contracted in pairs; an index that only one of them has is summed before."""
    nodes = list(call["tensors"])
    terms, result = einsum_terms(call["equation"], [len(shape_of(node)) for node in nodes])
    operands: list[tuple[Node | None, str]] = list(zip(nodes, terms, strict=True))
    whole = _contract(call, "", [*operands, (None, "")], result)
    found = []
    for i, j in _einsum_pairs(call["path"], len(operands)):
        (a, left), (b, right) = operands[i], operands[j]
        operands = [operand for n, operand in enumerate(operands) if n not in (i, j)]
        later = set(result).union(*(indices for _, indices in operands))
        left, right = (
            "".join(n for n in dict.fromkeys(mine) if n in later or n in theirs)
            for mine, theirs in ((left, right), (right, left))
        )
        both = "".join(n for n in dict.fromkeys(left + right) if n in later)
        if (set(left) & set(right)) - later:  # without a sum it is an elementwise product
            found.append(Contraction("", (a, b), (left, right), both, whole.sizes, whole.labels))
        operands.append((None, both))
    return found


def _einsum_pairs(path: Sequence[int] | None, count: int) -> list[tuple[int, int]]:
    """The pairs of operands in the order of contraction; results go to the end of the list, as in torch.einsum."""
    if path:
        return [(path[i], path[i + 1]) for i in range(0, len(path) - 1, 2)]
    return [(0, 1), *((count - 1 - done, 0) for done in range(1, count - 1))][: count - 1]


@_counts("linalg_multi_dot", "chain_matmul")
def _chain(call: OpCall) -> list[Contraction]:
    """A chain of matrices, multiplied in the order of least work."""
    nodes = list(call["tensors"] or call["matrices"])
    first = len(shape_of(nodes[0])) > 1  # the ends may be vectors
    letters = ascii_letters[: len(nodes) + 1]
    operands: list[tuple[Node | None, str]] = [(n, letters[i : i + 2]) for i, n in enumerate(nodes)]
    if not first:
        operands[0] = (nodes[0], letters[1])
    if len(shape_of(nodes[-1])) == 1:
        operands[-1] = (nodes[-1], letters[-2])
    whole = _contract(call, "", operands, "")
    sizes = [whole.sizes.get(letter, 1) for letter in letters]
    found: list[Contraction] = []

    def multiply(start: int, stop: int) -> tuple[Node | None, str]:
        if stop - start == 1:
            return operands[start]
        split = _cheapest_split(sizes, start, stop)
        (a, left), (b, right) = multiply(start, split), multiply(split, stop)
        result = "".join(n for n in left + right if n != letters[split])
        found.append(Contraction("", (a, b), (left, right), result, whole.sizes, whole.labels))
        return None, result

    multiply(0, len(nodes))
    return found


def _cheapest_split(sizes: Sequence[int], start: int, stop: int) -> int:
    """Where the chain of matrices start to stop - 1 is multiplied last; matrix i is sizes[i] x sizes[i + 1]."""
    work = {(i, i + 1): 0 for i in range(start, stop)}
    split = {}
    for length in range(2, stop - start + 1):
        for i in range(start, stop - length + 1):
            j = i + length
            costs = {k: work[i, k] + work[k, j] + sizes[i] * sizes[k] * sizes[j] for k in range(j - 1, i, -1)}
            split[i, j] = min(costs, key=lambda k: costs[k])
            work[i, j] = costs[split[i, j]]
    return split[start, stop]


@_counts("tensordot")
def _tensordot(call: OpCall) -> list[Contraction]:
    a, b = call["self"], call["other"]
    left = list(ascii_letters[: len(shape_of(a))])
    right = list(ascii_letters[26 : 26 + len(shape_of(b))])
    for i, j in zip(call["dims_self"], call["dims_other"], strict=True):
        right[j] = left[i]
    result = [n for n in left + right if (left + right).count(n) == 1]
    return [_contract(call, "", [(a, "".join(left)), (b, "".join(right))], "".join(result))]


@_counts("inner")
def _inner(call: OpCall) -> list[Contraction]:
    a, b = call.tensors[0], call.tensors[-1]
    left, right = ascii_letters[1 : len(shape_of(a))], ascii_letters[26 : 25 + len(shape_of(b))]
    return [_contract(call, "", [(a, left + "a"), (b, right + "a")], left + right)]


@_counts("bilinear", "_trilinear")
def _bilinear(call: OpCall) -> list[Contraction]:
    """y_o = x1 W_o x2: the first input with the weight, then the result with the second."""
    if call.op.endswith("_trilinear"):
        return [_work("", prod(shape_of(call["i1"])[:1]) * prod(shape_of(call["i2"])))]
    x1, weight, x2 = (call[name] for name in ("input1", "weight", "input2"))
    batch = ascii_letters[26 : 26 + len(shape_of(x1)) - 1]
    first = _contract(call, "", [(x1, batch + "i"), (weight, "oij")], batch + "oj")
    return [first, _contract(call, "x2", [(None, batch + "oj"), (x2, batch + "j"), (weight, "oij")], batch + "o")]


@_counts("cdist", "_euclidean_dist", "_cdist_forward")
def _cdist(call: OpCall) -> list[Contraction]:
    """Euclidean distances by a matrix product; other ones, and those of few rows, are sums without products."""
    a, b = call["x1"], call["x2"]
    rows, columns = shape_of(a)[-2], shape_of(b)[-2]
    mode = call["compute_mode"] or 0
    by_product = mode == 1 or (mode == 0 and max(rows, columns) > EUCLIDEAN_ROWS)
    if call.op.endswith("_euclidean_dist"):
        by_product = True
    elif call.op.endswith("_cdist_forward") or call["p"] != 2:
        by_product = False
    batch = prod(call.shape[:-2])
    return [_work("", batch * rows * columns * (shape_of(a)[-1] + 2))] if by_product else []


_CELLS = ("gru", "lstm", "rnn_tanh", "rnn_relu", "quantized_lstm", "quantized_gru")


@_counts(*_CELLS, *(f"{cell}_cell" for cell in ("gru", "lstm", "rnn_tanh", "rnn_relu")))
def _recurrent(call: OpCall) -> list[Contraction]:
    """Recurrent layers: each matrix once for every token of every sample."""
    x = call["input"] if call["input"] is not None else call["data"]
    tokens = prod(shape_of(x)[:-1])
    weights: list[Any] = list(call["params"] or [call["w_ih"], call["w_hh"]])
    sizes = [shape_of(weight) for weight in weights if weight is not None]
    return [_work("cell", tokens * sum(prod(size) for size in sizes if len(size) > 1))]


@_counts("deform_conv2d")
def _deformable(call: OpCall) -> list[Contraction]:
    """torchvision's deformable convolution: a kernel at every position of the output."""
    weight = call["weight"]
    positions = prod(call.shape) // call.shape[1]
    sizes = {"n": positions, **dict(zip("oihw", shape_of(weight), strict=True))}
    return [Contraction("", (call["input"], weight), ("n", "oihw"), "no", sizes, {})]
