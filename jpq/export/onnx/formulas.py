"""Functions of torch that its ONNX exporter has no translation for up to opset 17, or a wrong one, by other functions.

The exporter gives `//` of fractions rounded towards zero, softplus without its threshold, and distances of other norms
than the Euclidean as NaN. It takes sizes of pools, windows and norms as numbers alone, while x.shape[2] is a tensor in
a trace: here they become numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def as_number(size: Any) -> Any:
    """A size, or a nest of them, as int: in a trace they may be tensors."""
    if isinstance(size, (tuple, list)):
        return [as_number(n) for n in size]
    return int(size) if isinstance(size, Tensor) else size


def _with_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a tensor whose other arguments are sizes: they are given as numbers."""

    def call(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(input, *as_number(args), **{name: as_number(value) for name, value in kwargs.items()})

    return call


def _layer_norm(input: Tensor, normalized_shape: Sequence[Any], *args: Any, **kwargs: Any) -> Tensor:
    return torch.layer_norm(input, as_number(normalized_shape), *args, **kwargs)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """With a scale of ones: without one the exporter must know the number of channels."""
    if weight is None and use_input_stats:
        weight, bias = input.new_ones(int(input.shape[1])), input.new_zeros(int(input.shape[1]))
    return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, *args, **kwargs)


def _inner(input: Tensor, other: Tensor) -> Tensor:
    if not input.dim() or not other.dim():
        return input * other
    return torch.tensordot(input, other, dims=([-1], [-1]))


def _addmv(input: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * input + alpha * (mat @ vec)


def _addbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * input + alpha * torch.bmm(batch1, batch2).sum(0)


def _addr(input: Tensor, vec1: Tensor, vec2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * input + alpha * (vec1.unsqueeze(1) * vec2)


def _multi_dot(tensors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.matmul, tensors)


def _diag_embed(input: Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
    if (offset, dim1, dim2) != (0, -2, -1):
        return torch.diag_embed(input, offset, dim1, dim2)
    on_diagonal = torch.eye(int(input.shape[-1]), dtype=torch.bool)
    return torch.where(on_diagonal, input.unsqueeze(-1), torch.zeros_like(input).unsqueeze(-1))


def _diag(input: Tensor, diagonal: int = 0) -> Tensor:
    return torch.diagonal(input, diagonal) if input.dim() > 1 else _diag_embed(input, diagonal)


def _fill_diagonal(input: Tensor, fill_value: float, wrap: bool = False) -> Tensor:
    if wrap or input.dim() != 2:
        return input.fill_diagonal_(fill_value, wrap)
    on_diagonal = torch.eye(*as_number(input.shape), dtype=torch.bool)
    return input.masked_fill_(on_diagonal, fill_value)


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, *args: Any, **kwargs: Any) -> Tensor:
    if p == 2:
        return torch.cdist(x1, x2, p, *args, **kwargs)
    apart = (x1.unsqueeze(-2) - x2.unsqueeze(-3)).abs()
    if p in (1, math.inf):
        return apart.sum(-1) if p == 1 else apart.amax(-1)
    return apart.pow(p).sum(-1).pow(1 / p)


def _floor_divide(input: Any, other: Any) -> Any:
    if isinstance(input, Tensor) and input.is_floating_point():
        return torch.div(input, other, rounding_mode="floor")
    return torch.floor_divide(input, other)


def _softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    y = F.softplus(input, beta)
    return y if threshold == 20 else torch.where(input * beta > threshold, input, y)


def _trunc(input: Tensor) -> Tensor:
    return torch.sign(input) * torch.floor(input.abs())


def _sinc(input: Tensor) -> Tensor:
    x = torch.where(input == 0, torch.ones_like(input), input * math.pi)
    return torch.where(input == 0, torch.ones_like(input), torch.sin(x) / x)


def _xlogy(input: Tensor, other: Tensor) -> Tensor:
    return torch.where(input == 0, torch.zeros_like(input), input * torch.log(other))


def _heaviside(input: Tensor, values: Tensor) -> Tensor:
    return torch.where(input == 0, values, (input > 0).to(input.dtype))


def _addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + value * (tensor1 / tensor2)


def _logaddexp(input: Tensor, other: Tensor) -> Tensor:
    larger = torch.maximum(input, other)
    sums = larger + torch.log(torch.exp(input - larger) + torch.exp(other - larger))
    return torch.where(larger.abs() == math.inf, larger, sums)  # infinity less infinity is no number


def _nansum(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.where(torch.isnan(input), torch.zeros_like(input), input).sum(*args, **kwargs)


def _diff(input: Tensor, n: int = 1, dim: int = -1, prepend: Tensor | None = None, append: Tensor | None = None) -> Any:
    parts = [t for t in (prepend, input, append) if t is not None]
    x = torch.cat(parts, dim) if len(parts) > 1 else input
    for _ in range(n):
        size = x.shape[dim]
        x = x.narrow(dim, 1, size - 1) - x.narrow(dim, 0, size - 1)
    return x


def _column_stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1, 1) if t.dim() < 2 else t for t in tensors], 1)


def _asinh(input: Tensor) -> Tensor:
    size = input.abs()
    return torch.sign(input) * torch.log(size + torch.sqrt(size * size + 1))


def _with_known_kernel(convolution: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A convolution whose weight is computed for each sample (`groups` is then a size): its sizes become numbers."""

    def call(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if any(isinstance(value, Tensor) and not value.dim() for value in (*args, *kwargs.values())):
            weight = weight.reshape(as_number(weight.shape))
            args = tuple(value if isinstance(value, Tensor) and value.dim() else as_number(value) for value in args)
            kwargs = {name: value if name == "bias" else as_number(value) for name, value in kwargs.items()}
        return convolution(input, weight, *args, **kwargs)

    return call


_BY_NAME: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("inner", _inner),
    ("addmv", _addmv),
    ("addbmm", _addbmm),
    ("addr", _addr),
    ("multi_dot", _multi_dot),
    ("diag_embed", _diag_embed),
    ("diag", _diag),
    ("fill_diagonal_", _fill_diagonal),
    ("cdist", _cdist),
    ("floor_divide __floordiv__", _floor_divide),
    ("softplus", _softplus),
    ("trunc fix", _trunc),
    ("frac", lambda x: x - _trunc(x)),
    ("sinc", _sinc),
    ("xlogy", _xlogy),
    ("heaviside", _heaviside),
    ("addcdiv", _addcdiv),
    ("logaddexp", _logaddexp),
    ("nansum", _nansum),
    ("count_nonzero", lambda x, dim=None: (x != 0).sum(dim)),
    ("diff", _diff),
    ("column_stack", _column_stack),
    ("ravel", lambda x: x.reshape(-1)),
    ("fliplr", lambda x: x.flip(1)),
    ("flipud", lambda x: x.flip(0)),
    ("expm1", lambda x: torch.exp(x) - 1),
    ("exp2", lambda x: torch.pow(2.0, x)),
    ("hypot", lambda x, other: torch.sqrt(x * x + other * other)),
    ("sinh", lambda x: (torch.exp(x) - torch.exp(-x)) / 2),
    ("cosh", lambda x: (torch.exp(x) + torch.exp(-x)) / 2),
    ("asinh arcsinh", _asinh),
    ("erfc", lambda x: 1 - torch.erf(x)),
    ("deg2rad", lambda x: x * (math.pi / 180)),
    ("rad2deg", lambda x: x * (180 / math.pi)),
    ("sgn", torch.sign),
    ("adjoint", lambda x: x.transpose(-2, -1)),
    ("layer_norm", _layer_norm),
)

_OWNERS = (torch, Tensor, F, torch.linalg, torch.special)

FORMULAS: dict[Any, Callable[..., Any]] = {  # torch's functions, and methods of tensors, of these names
    getattr(owner, name): function
    for names, function in _BY_NAME
    for name in names.split()
    for owner in _OWNERS
    if callable(getattr(owner, name, None))
}
FORMULAS[F.instance_norm] = _instance_norm  # torch.instance_norm takes its arguments in another order
for _convolution in (F.conv1d, F.conv2d, F.conv3d):
    FORMULAS[_convolution] = _with_known_kernel(_convolution)
FORMULAS[F.unfold] = _with_numbers(F.unfold)  # Tensor.unfold is another function
for _pool in (F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d):
    FORMULAS[_pool] = _with_numbers(_pool)
for _property in (Tensor.H, Tensor.mH):
    FORMULAS[_property.__get__] = lambda x, *_: x.transpose(-2, -1)  # type: ignore[attr-defined]
