"""Channels inside the average of LayerNorm, RMSNorm or GroupNorm that `--open-norms` frees for pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from jpq.tracing.network import Network
from jpq.tracing.sites import Site
from jpq.types import JpqError

WARNING = "the rebuilt model is not the masked one, and fine-tuning must repair it"

_PLACES = {  # function -> positions of weight and bias among its arguments
    F.layer_norm: (2, 3),
    torch.layer_norm: (2, 3),
    F.rms_norm: (2, None),
    torch.rms_norm: (2, None),
    F.group_norm: (2, 3),
    torch.group_norm: (2, 3),
}


_AVERAGES = (torch.mean, Tensor.mean, torch.var, Tensor.var, torch.std, Tensor.std, torch.var_mean, torch.std_mean)


def opened_units(network: Network, sites: Sequence[Site]) -> int:
    """The number of units that only `--open-norms` frees; where there is one, rebuilding is not exact."""
    return sum(int(c) in network.opened for site in sites for c in site.labels)


def check_open_norms(network: Network, prunes: bool) -> None:
    """Raise JpqError where `--open-norms` has no effect: the method prunes nothing, or no channel is freed by it."""
    if not prunes:
        raise JpqError("--open-norms lets more channels be pruned, and this method prunes none. Leave it out.")
    if not network.opened:
        raise JpqError(
            "--open-norms opens nothing here: no channel that could go lies inside the average of a LayerNorm, RMSNorm "
            "or GroupNorm (`jpq inspect` says why the rest stays). Leave it out."
        )


class NormsWithoutStatistics(TorchFunctionMode):
    """A mode in which LayerNorm, RMSNorm and GroupNorm scale and shift but do not normalise: x * weight + bias.

    Averages over one dim that is kept, as norms written by hand have them, are 1.

    In this mode masked and rebuilt model agree for opened norms, too, which shows that weights are sliced at the right
    places. For checks only.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _AVERAGES:
            return _without_numbers(func(*args, **kwargs), args, kwargs)
        if func not in _PLACES:
            return func(*args, **kwargs)
        x: Tensor = kwargs.get("input", args[0] if args else None)
        sizes = kwargs.get("num_groups", kwargs.get("normalized_shape", args[1] if len(args) > 1 else None))
        shape = _affine_shape(x, sizes)
        if shape is None:
            raise RuntimeError(f"{func.__name__} of {sizes} does not fit an input of shape {list(x.shape)}")
        for name, place in zip(("weight", "bias"), _PLACES[func], strict=True):
            parameter = kwargs.get(name, args[place] if place is not None and len(args) > place else None)
            if isinstance(parameter, Tensor):
                x = x * parameter.reshape(shape) if name == "weight" else x + parameter.reshape(shape)
        return x


def _without_numbers(statistic: Any, args: Any, kwargs: Any) -> Any:
    """Ones in place of the average over one dim that is kept at size 1; any other result as it is."""
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    keeps = kwargs.get("keepdim") or any(value is True for value in args[2:])
    if not keeps or len(dims) != 1 or dims[0] is None:
        return statistic
    return tree_map(torch.ones_like, statistic)


def _affine_shape(x: Tensor, sizes: Any) -> list[int] | None:
    """The shape in which a norm's weight broadcasts to `x`, by its groups or normalized shape; None if it does not."""
    shape = [1] * x.dim()
    if isinstance(sizes, int):  # groups of channels on dim 1
        shape[1] = x.shape[1]
        return shape if x.shape[1] % sizes == 0 else None
    shape[-len(sizes) :] = sizes
    return shape if list(x.shape[-len(sizes) :]) == list(sizes) else None
