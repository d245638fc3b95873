"""Calls that torch's ONNX exporter does not know, or whose sizes it freezes, as other calls that compute the same.

- `unflatten`: the exporter takes its result for one of fixed shape, so that what later reads a size of it, as
  `torch.zeros_like` and the first state of a recurrent layer do, is a constant of the example's batch.
- Adaptive pools, for which the exporter must know the input's size and it must be a multiple of the output's: fixed
  pools, or a reduction of each window.
- Average pools with a divisor of their own, which the exporter leaves out.
- hardswish and hardsigmoid, whose operators runtimes compute with a factor of 1/6 where torch divides by 6: a third of
  the results differ in their last digit, enough to fall on the other side of a rounding boundary in the next layer.
- Interpolation by areas and to the nearest-exact pixels, and what formulas.py writes out.
- Changes in place of a part that was cut out of a tensor (`x[:, :4].relu_()`), which the exporter loses more often than
  not: the part is put back by an assignment (`x[:, :4] = part`), which it knows.
- `rms_norm`, `channel_shuffle`, `mT`, `rot90`, `threshold`, `bilinear`, `fold`, max-unpooling and `affine_grid` have no
  translation up to opset 17.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from jpq.export.onnx.formulas import FORMULAS, as_number


class WrittenOutCalls(TorchFunctionMode):
    """A context in which such calls are made by other operators."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: dict[int, tuple[Tensor, Tensor, Any]] = {}  # id of a part -> it, the tensor, its index there

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """The call itself, or the one in its place."""
        kwargs = kwargs or {}
        copied = func is Tensor.copy_ and id(args[0]) in self._parts
        result = (_copy if copied else _REPLACEMENTS.get(func, func))(*args, **kwargs)
        index = _index_of_part(func, args, result)
        if index is not None:
            self._parts[id(result)] = result, args[0], index
        elif args and _changes_in_place(func, kwargs):
            changed = args[0]
            while id(changed) in self._parts:
                part, changed, index = self._parts[id(changed)]
                changed[index] = part
        return result


def _index_of_part(function: Any, args: tuple[Any, ...], result: Any) -> Any:
    """The index of what a call cuts out of its first argument without a copy; None for other calls."""
    name = getattr(function, "__name__", "")
    if name not in ("__getitem__", "narrow", "select") or len(args) < 2 or not isinstance(result, Tensor):
        return None
    if result.untyped_storage().data_ptr() != args[0].untyped_storage().data_ptr():
        return None  # picked by an index, which copies
    if name == "__getitem__":
        return args[1]
    if len(args) < (4 if name == "narrow" else 3):
        return None  # by keywords
    place = slice(args[2], args[2] + args[3]) if name == "narrow" else args[2]
    return (*[slice(None)] * (args[1] % args[0].dim()), place)


def _changes_in_place(function: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call changes its first argument."""
    name = getattr(function, "__name__", "")
    return name in _AUGMENTED or (name.endswith("_") and not name.endswith("__")) or bool(kwargs.get("inplace"))


def _copy(input: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`input` with the numbers of another tensor, by operators that the exporter takes for changes of `input`."""
    source = source.clone()
    return input.zero_().add_(source)


_AUGMENTED = (
    "__setitem__",
    "__iadd__",
    "__isub__",
    "__imul__",
    "__itruediv__",
    "__ifloordiv__",
    "__imod__",
    "__ipow__",
)


def _unflatten(input: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """`input` with one dim split into `sizes`, of which one may be -1."""
    dim = dim % input.dim()
    return input.reshape(*input.shape[:dim], *sizes, *input.shape[dim + 1 :])


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`input` over the root of its mean square over the last dims (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    dims = [-1 - i for i in range(len(normalized_shape))]
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    x = input * torch.rsqrt(input.square().mean(dims, keepdim=True) + eps)
    return x if weight is None else x * weight


def _channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """`input`, [batch, channels, ...], with the channels of all groups taken in turns."""
    split = input.reshape(input.shape[0], groups, input.shape[1] // groups, *input.shape[2:])
    return split.transpose(1, 2).reshape(input.shape)


def _matrix_transpose(input: Tensor, *_: Any) -> Tensor:
    """`input` with its last two dims exchanged."""
    return input.transpose(-2, -1)


def _rot90(input: Tensor, k: int = 1, dims: Sequence[int] = (0, 1)) -> Tensor:
    """`input` turned k times by 90 degrees, from the first towards the second of two dims."""
    first, second = dims
    if k % 4 == 2:
        return input.flip((first, second))
    if k % 2 == 0:
        return input
    return input.flip(second if k % 4 == 1 else first).transpose(first, second)


def _threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """`input` where it exceeds a threshold, and `value` elsewhere."""
    return torch.where(input > threshold, input, torch.full_like(input, value))


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The bilinear form of each output: `weight` is [out, in1, in2]."""
    rows = torch.tensordot(input1, weight, dims=([-1], [1]))  # [..., out, in2]
    y = (rows @ input2.unsqueeze(-1)).squeeze(-1)
    return y if bias is None else y + bias


def _fold(
    input: Tensor,
    output_size: int | Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    stride: int | Sequence[int] = 1,
) -> Tensor:
    """Sums of overlapping windows, [batch, channels * window, windows]: a transposed convolution with unit kernels."""
    size, kernel, dilation, padding, stride = (
        (v, v) if isinstance(v, int) else tuple(v) for v in (output_size, kernel_size, dilation, padding, stride)
    )
    reach = [s + 2 * p - d * (k - 1) - 1 for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)]
    windows = [r // step + 1 for r, step in zip(reach, stride, strict=True)]
    window = kernel[0] * kernel[1]
    batched = input if input.dim() == 3 else input.unsqueeze(0)
    channels = int(batched.shape[1]) // window
    unit = torch.from_numpy(np.tile(np.eye(window), (channels, 1)))  # a constant of the trace
    y = F.conv_transpose2d(
        batched.reshape(-1, batched.shape[1], *windows),
        unit.to(input).reshape(-1, 1, *kernel),
        None,
        stride,
        padding,
        [r % step for r, step in zip(reach, stride, strict=True)],
        channels,
        dilation,
    )
    return y if input.dim() == 3 else y.squeeze(0)


def _affine_grid(theta: Tensor, size: Sequence[Any], align_corners: bool | None = None) -> Tensor:
    """The places, [batch, ..., 2 or 3], at which affine maps [batch, 2, 3] or [batch, 3, 4] sample an image."""
    sides = as_number(size)[2:]
    axes = [np.linspace(-1, 1, n) * (1 if align_corners else (n - 1) / n) if n > 1 else np.zeros(1) for n in sides]
    x_first = np.meshgrid(*axes, indexing="ij")[::-1]
    places = torch.from_numpy(np.stack([*x_first, np.ones(sides)], -1).reshape(-1, len(sides) + 1))
    return (places.to(theta) @ theta.transpose(1, 2)).reshape(-1, *sides, len(sides))


def _hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """x min(max(x + 3, 0), 6) / 6, in the order in which torch computes it."""
    gate = (input + 3).clamp(0, 6)
    return input.mul_(gate).div_(6) if inplace else input * gate / 6


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(x + 3, 0), 6) / 6, in the order in which torch computes it."""
    return input.add_(3).clamp_(0, 6).div_(6) if inplace else (input + 3).clamp(0, 6) / 6


_GLOBAL_AVERAGES: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def _average_by(dims: int, average: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function for average pools over the last `dims` dims, which divides by `divisor_override` itself."""

    def write_out(
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        whole = (kernel_size,) * dims if isinstance(kernel_size, (int, Tensor)) else tuple(kernel_size)
        kernel_size, stride, padding = as_number(kernel_size), as_number(stride), as_number(padding)
        if divisor_override is None:
            padded = any(padding) if isinstance(padding, list) else bool(padding)  # zeros would count, or move windows
            is_whole = as_number(whole) == as_number(input.shape[-dims:]) and not padded
            if any(isinstance(k, Tensor) for k in whole) and is_whole:
                return _GLOBAL_AVERAGES[dims](input, 1)  # of any size
            return average(input, kernel_size, stride, padding, ceil_mode, count_include_pad)
        kernel, strides, pads = (
            (v,) * dims if isinstance(v, int) else tuple(v) for v in (kernel_size, stride or kernel_size, padding)
        )
        ends = []  # zeros that complete the last window
        for size, k, step, pad in zip(input.shape[-dims:], kernel, strides, pads, strict=True):
            rest = (int(size) + 2 * pad - k) % step
            starts_inside = int(size) + pad > int(size) + 2 * pad - k - rest + step  # else torch drops that window
            ends.append(pad + (step - rest if ceil_mode and rest and starts_inside else 0))
        edges = [n for pad, end in zip(reversed(pads), reversed(ends), strict=True) for n in (pad, end)]
        return average(F.pad(input, edges), kernel, strides) * (math.prod(kernel) / divisor_override)

    return write_out


def _pool_to(
    dims: int, pool: Callable[..., Tensor], reduce: Callable[..., Tensor], adaptive: Callable[..., Tensor]
) -> Callable[..., Any]:
    """A function for adaptive pools over the last `dims` dims.

    Args:
        dims: number of dims that are pooled.
        pool: the pool of fixed windows.
        reduce: the mean or maximum of one window along one dim.
        adaptive: the call itself.
    """

    def write_out(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
        sizes = [int(n) for n in input.shape[-dims:]]
        given = [output_size] * dims if isinstance(output_size, int) else list(output_size)
        wanted = [size if n is None else int(n) for n, size in zip(given, sizes, strict=True)]
        if return_indices:
            return adaptive(input, wanted, return_indices=True)
        if all(n == 1 for n in wanted):
            return adaptive(input, wanted)
        if all(size % n == 0 for n, size in zip(wanted, sizes, strict=True)):
            windows = [size // n for n, size in zip(wanted, sizes, strict=True)]
            return pool(input, windows, windows)
        for dim, n, size in zip(range(-dims, 0), wanted, sizes, strict=True):
            bounds = [(i * size // n, -(-(i + 1) * size // n)) for i in range(n)]
            parts = [reduce(input.narrow(dim, start, end - start), dim, keepdim=True) for start, end in bounds]
            input = torch.cat(parts, dim)
        return input

    return write_out


def _unpool(dims: int) -> Callable[..., Tensor]:
    """A function for max-unpooling over the last `dims` dims: zeros, with each value at the place of its maximum."""

    def write_out(
        input: Tensor, indices: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, output_size: Any = None
    ) -> Tensor:
        kernel, strides, pads = (
            (v,) * dims if isinstance(v, int) else tuple(v) for v in (kernel_size, stride or kernel_size, padding)
        )
        windows = zip(as_number(tuple(input.shape[-dims:])), kernel, strides, pads, strict=True)
        sides = [(n - 1) * step + k - 2 * pad for n, k, step, pad in windows]
        if output_size is not None:
            sides = as_number(tuple(output_size))[-dims:]
        rows = input.shape[:-dims]
        zeros = input.new_zeros(*rows, math.prod(sides))
        return zeros.scatter(-1, indices.flatten(-dims), input.flatten(-dims)).reshape(*rows, *sides)

    return write_out


_ADAPTIVE_POOLS: dict[Any, Callable[..., Any]] = {
    adaptive: _pool_to(dims, pool, reduce, adaptive)
    for dims, pool, reduce, adaptive in (
        (1, F.avg_pool1d, torch.mean, F.adaptive_avg_pool1d),
        (2, F.avg_pool2d, torch.mean, F.adaptive_avg_pool2d),
        (3, F.avg_pool3d, torch.mean, F.adaptive_avg_pool3d),
        (1, F.max_pool1d, torch.amax, F.adaptive_max_pool1d),
        (2, F.max_pool2d, torch.amax, F.adaptive_max_pool2d),
        (3, F.max_pool3d, torch.amax, F.adaptive_max_pool3d),
    )
}


def _interpolate(
    input: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *args: Any, **kwargs: Any
) -> Tensor:
    """`input` at another size: averages of areas by adaptive pools, "nearest-exact" by the indices of its pixels."""
    if mode not in ("area", "nearest-exact") or args:
        return F.interpolate(input, size, scale_factor, mode, *args, **kwargs)
    before = as_number(tuple(input.shape[2:]))
    factors = scale_factor if isinstance(scale_factor, (tuple, list)) else [scale_factor] * len(before)
    if size is None:
        wanted = [math.floor(n * float(factor)) for n, factor in zip(before, factors, strict=True)]
    else:
        wanted = as_number(size if isinstance(size, (tuple, list)) else [size] * len(before))
    if mode == "area":
        return _ADAPTIVE_POOLS[_GLOBAL_AVERAGES[len(before)]](input, wanted)
    for dim, (n, m, factor) in enumerate(zip(before, wanted, factors, strict=True), start=2):
        real = np.float64 if input.dtype is torch.float64 else np.float32
        by_sizes = factor is None or kwargs.get("recompute_scale_factor")
        step = real(n) / real(m) if by_sizes else real(1 / float(factor))
        places = np.floor(((np.arange(m) + 0.5) * step).astype(np.float32))  # as torch rounds, where two are as near
        nearest = torch.from_numpy(np.minimum(places, n - 1).astype(np.int64)).to(input.device)
        input = input.index_select(dim, nearest)
    return input


_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    **FORMULAS,
    F.interpolate: _interpolate,
    torch.unflatten: _unflatten,
    Tensor.unflatten: _unflatten,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.channel_shuffle: _channel_shuffle,
    torch.channel_shuffle: _channel_shuffle,
    Tensor.mT.__get__: _matrix_transpose,  # type: ignore[attr-defined]
    torch.rot90: _rot90,
    Tensor.rot90: _rot90,
    F.threshold: _threshold,
    torch.threshold: _threshold,
    F.bilinear: _bilinear,
    torch.bilinear: _bilinear,
    F.fold: _fold,
    F.affine_grid: _affine_grid,
    F.max_unpool1d: _unpool(1),
    F.max_unpool2d: _unpool(2),
    F.max_unpool3d: _unpool(3),
    F.hardswish: _hardswish,
    F.hardsigmoid: _hardsigmoid,
    torch.avg_pool1d: _average_by(1, torch.avg_pool1d),
    F.avg_pool2d: _average_by(2, F.avg_pool2d),
    F.avg_pool3d: _average_by(3, F.avg_pool3d),
    **_ADAPTIVE_POOLS,
}
