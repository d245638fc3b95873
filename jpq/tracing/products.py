"""Products that code makes by torch functions, as calls of plain layers: which operand is the weight, and its layout.

F.linear, F.conv*d and F.conv_transpose*d, matmul (`@`), mm, addmm, tensordot and einsum of two operands. A product
that sums over dims of its input with a matrix is an nn.Linear between two moves: the summed dims go last and become
one, and the outputs go where they belong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from string import ascii_letters
from typing import Any, NamedTuple

from torch import Tensor

from jpq.plan import RoutedCall


class Operands(NamedTuple):
    """What a function multiplies: two operands, what it adds, and its other arguments."""

    operands: tuple[Tensor, Tensor]
    bias: Tensor | None
    options: dict[str, Any]


@dataclass(frozen=True)
class Product:
    """A call as that of a plain layer of class `kind` in torch.nn.

    `weight` is a view of the operand whose dims, reshaped to `shape`, are those of the layer's weight.
    """

    kind: str
    input: Tensor
    weight: Tensor
    shape: tuple[int, ...]
    bias: Tensor | None
    call: RoutedCall
    options: dict[str, Any] = field(default_factory=dict)


def read_operands(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Operands | None:
    """The operands of a call of the torch function `name`; None where it is no product of two tensors."""
    binder = _BINDERS.get(name)
    if binder is None:
        return None
    try:
        found = binder(name, args, kwargs)
    except (TypeError, ValueError, KeyError, IndexError):  # another overload
        return None
    return found if all(isinstance(t, Tensor) for t in found.operands) else None


def read_product(name: str, found: Operands, weight: int) -> Product | None:
    """The call as that of a layer whose weight is operand `weight`, 0 or 1; None where no plain layer computes it."""
    if name == "linear":
        return _linear(found) if weight == 1 else None
    if name.startswith("conv"):
        return _convolution(name, found) if weight == 1 else None
    return _contraction(found, weight)


def _bound(names: str, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name; `names` in order, with alternatives of one behind a bar."""
    order = [name.split("|") for name in names.split()]
    if len(args) > len(order):
        raise TypeError("more arguments than names")
    values = {name[0]: value for name, value in zip(order, args, strict=False)}
    first = {alias: name[0] for name in order for alias in name}
    return values | {first[key]: value for key, value in kwargs.items()}


def _bind_linear(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Operands:
    values = _bound("input weight bias", args, kwargs)
    return Operands((values["input"], values["weight"]), values.get("bias"), {})


def _bind_convolution(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Operands:
    transposed, dims = "transpose" in name, int(name[-2])
    tail = "output_padding groups dilation" if transposed else "dilation groups"
    values = _bound(f"input weight bias stride padding {tail}", args, kwargs)
    options: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    options |= {"output_padding": 0} if transposed else {}
    options |= {key: values[key] for key in options if key in values}
    sizes = {key: _tuple(value, dims) for key, value in options.items() if key != "groups"}
    return Operands((values["input"], values["weight"]), values.get("bias"), {**options, **sizes})


def _tuple(value: Any, dims: int) -> Any:
    """One size per dim, as plain integers; "same" and "valid" stay."""
    if isinstance(value, str):
        return value
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    sizes = sizes * dims if len(sizes) == 1 else sizes
    return tuple(int(size) for size in sizes)


def _bind_matmul(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Operands:
    values = _bound("input|self other|tensor2|mat2", args, kwargs)
    a, b = values["input"], values["other"]
    if not a.dim() or not b.dim() or min(a.dim(), b.dim()) > 2:
        raise ValueError("no matrix among the operands")
    batch = ascii_letters[: max(a.dim(), b.dim(), 2) - 2]
    left = (batch if a.dim() > 2 else "") + "XZ"[-a.dim() :]
    right = (batch if b.dim() > 2 else "") + ("ZY" if b.dim() > 1 else "Z")
    result = batch + ("X" if a.dim() > 1 else "") + ("Y" if b.dim() > 1 else "")
    return Operands((a, b), None, {"terms": (left, right), "result": result})


def _bind_addmm(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Operands:
    values = _bound("input|self mat1 mat2", args, {k: v for k, v in kwargs.items() if k not in ("beta", "alpha")})
    bias = values["input"]
    columns = values["mat2"].shape[1]
    if {kwargs.get("beta", 1), kwargs.get("alpha", 1)} != {1} or not bias.numel() == columns == bias.shape[-1]:
        raise ValueError("what is added is no bias")
    return Operands((values["mat1"], values["mat2"]), bias, {"terms": ("XZ", "ZY"), "result": "XY"})


def _bind_tensordot(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Operands:
    values = _bound("a b dims out", args, kwargs)
    a, b, dims = values["a"], values["b"], values.get("dims", 2)
    if isinstance(dims, int):
        dims = (range(-dims, 0), range(dims))
    left, right = list(ascii_letters[: a.dim()]), list(ascii_letters[26 : 26 + b.dim()])
    summed = [tuple(d) if isinstance(d, (tuple, list, range)) else (d,) for d in dims]
    for i, k in zip(*summed, strict=True):
        right[k] = left[i]
    rest = [letter for letter in left if letter not in right]
    result = rest + [letter for letter in right if letter not in left]
    return Operands((a, b), None, {"terms": ("".join(left), "".join(right)), "result": "".join(result)})


def _bind_einsum(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Operands:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    a, b = operands
    terms, result = einsum_terms(equation, (a.dim(), b.dim()))
    if any(len(set(term)) < len(term) for term in (*terms, result)):
        raise ValueError("a letter twice in one term")
    return Operands((a, b), None, {"terms": tuple(terms), "result": result})


def einsum_terms(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The indices of each operand and of the result, `...` written out as unused letters."""
    text, arrow, result = equation.replace(" ", "").partition("->")
    terms = text.split(",")
    free = [letter for letter in ascii_letters if letter not in equation]
    ranked = list(zip(terms, ranks, strict=True))
    wide = max((rank - len(term) + 3 for term, rank in ranked if "..." in term), default=0)
    dots = "".join(free[:wide])
    terms = [term.replace("...", dots[wide - (rank - len(term) + 3) :]) for term, rank in ranked]
    if not arrow:
        letters = "".join(terms)
        result = "..." + "".join(sorted(n for n in set(letters) if letters.count(n) == 1 and n not in dots))
    return terms, result.replace("...", dots)


_BINDERS: dict[str, Callable[[str, Sequence[Any], dict[str, Any]], Operands]] = {
    "linear": _bind_linear,
    **{f"conv{n}d": _bind_convolution for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _bind_convolution for n in (1, 2, 3)},
    "matmul": _bind_matmul,
    "mm": _bind_matmul,
    "addmm": _bind_addmm,
    "tensordot": _bind_tensordot,
    "einsum": _bind_einsum,
}


def _linear(found: Operands) -> Product | None:
    """F.linear."""
    x, weight = found.operands
    if weight.dim() != 2:
        return None
    return Product("Linear", x, weight, tuple(weight.shape), found.bias, RoutedCall())


def _convolution(name: str, found: Operands) -> Product:
    """F.conv*d and F.conv_transpose*d, by the options of this call."""
    kind = name.replace("conv_transpose", "ConvTranspose").replace("conv", "Conv")
    x, weight = found.operands
    return Product(kind, x, weight, tuple(weight.shape), found.bias, RoutedCall(), found.options)


def _contraction(found: Operands, weight: int) -> Product | None:
    """A sum over dims of the input with a matrix; None where dims of both go on side by side."""
    x, w = found.operands[1 - weight], found.operands[weight]
    terms, result = found.options["terms"], found.options["result"]
    in_letters, w_letters = terms[1 - weight], terms[weight]
    summed = [letter for letter in w_letters if letter in in_letters]
    outputs = [letter for letter in result if letter in w_letters]
    rest = [letter for letter in in_letters if letter not in summed]
    if set(summed) & set(result) or set(w_letters) - set(summed) - set(outputs) or set(rest) - set(result):
        return None
    if not summed or not outputs or (found.bias is not None and weight == 0):
        return None  # addmm adds its bias along the columns of the second operand
    summed = [letter for letter in in_letters if letter in summed]
    view = w.permute([w_letters.index(letter) for letter in (*outputs, *summed)])
    sizes = [w.shape[w_letters.index(letter)] for letter in outputs]
    order = [[*rest, *outputs].index(letter) for letter in result]
    call = RoutedCall(
        operand=1 - weight,
        summed=tuple(in_letters.index(letter) - len(in_letters) for letter in summed),
        sizes=tuple(sizes) if len(sizes) > 1 else (),
        order=tuple(order) if order != sorted(order) else (),
    )
    inputs = prod(w.shape[w_letters.index(letter)] for letter in summed)
    return Product("Linear", x, view, (prod(sizes), inputs), found.bias, call)


def call_layer(layer: Any, x: Tensor, call: RoutedCall) -> Any:
    """The product of `x`, computed by a plain layer: its summed dims moved last, its outputs where they belong."""
    if call.summed not in ((), (-1,)):
        kept = [d for d in range(x.dim()) if d - x.dim() not in call.summed]
        x = x.permute([*kept, *(d + x.dim() for d in call.summed)])
    if len(call.summed) > 1:
        x = x.flatten(-len(call.summed))
    y = layer(x)
    if call.sizes:
        y = y.unflatten(-1, (-1, *call.sizes[1:]))
    return y.permute(call.order) if call.order else y
