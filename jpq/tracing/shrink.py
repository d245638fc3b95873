"""The small model itself: a copy without the channels that were dropped."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from jpq.tracing.model_checks import unwrapped
from jpq.tracing.network import Network
from jpq.tracing.open_norms import Unaveraged
from jpq.tracing.sites import Site, channels
from jpq.types import JpqError, Labels

__all__ = ["apply_slices", "shrink", "slices"]

REASON = "the model's code has fixed sizes there, or lets them follow others"
UNTRIED = "a copy of the model could not be tried with fewer channels there"
_CLOSE = 1e-6  # relative, in float64; a wrong head size or shuffle is off by far more
Test = Callable[[nn.Module, Network, tuple[Any, ...], dict[str, Any], Sequence[Site]], bool]
# parameter, buffer or counting attribute -> dim -> kept indices, in their new order
Slices = Mapping[str, Mapping[int, list[int]]]


def shrink(model: nn.Module, network: Network, dropped: Collection[int]) -> nn.Module:
    """A deep copy of the float `model` without the channels whose label class is in `dropped`.

    It computes what `model` computes when every weight that reads a dropped channel is zero. Modules and parameters
    that are shared stay shared; DataParallel and torch.compile are taken off.
    """
    model = unwrapped(model)
    cut = slices(network, dropped)
    tensors = [t for t in [*model.parameters(), *model.buffers()] if type(t) in (nn.Parameter, Tensor)]
    borrowed = [t.detach() if type(t) is Tensor else nn.Parameter(t.detach(), t.requires_grad) for t in tensors]
    small = apply_slices(copy.deepcopy(model, dict(zip(map(id, tensors), borrowed, strict=True))), cut)
    for old, new in zip(tensors, borrowed, strict=True):
        if new.data_ptr() == old.data_ptr():  # not sliced: copied only now, so that wide weights never are
            new.data = new.data.clone()
    return small


def runs_smaller(
    model: nn.Module, network: Network, args: tuple[Any, ...], kwargs: dict[str, Any], suspects: Collection[int]
) -> Network:
    """The network with those sites frozen whose units the model's code cannot lose.

    Shapes are tried for every site, on the meta device. Sites with suspect classes (whose sizes a reshape or split
    names) are also computed, on random weights: masked and shrunk must agree, apart from averages that were opened; so
    are all sites of a model whose code asks for values, which the meta device has not.
    """
    sites = [s for s in channels(network) if s.n > 1]
    doubtful = [s for s in sites if set(s.labels.tolist()) & set(suspects)]
    reason = REASON

    def agree(test: Test, sites: Sequence[Site]) -> bool:
        return test(model, network, args, kwargs, sites)

    def passing(test: Test, sites: list[Site]) -> list[Site]:
        """All if all pass together; else those that pass alone, if they pass together; else none."""
        for _ in range(2):
            if not sites or agree(test, sites):
                return sites
            sites = [s for s in sites if agree(test, [s])]
        return sites if sites and agree(test, sites) else []

    good = passing(_numbers_agree, passing(_shapes_agree, doubtful))
    good = passing(_shapes_agree, [s for s in sites if s in good or s not in doubtful])
    if len(good) < len(sites) and not agree(_shapes_agree, ()):
        good = passing(_numbers_agree, sites)
        if len(good) < len(sites) and not agree(_numbers_agree, ()):
            reason = UNTRIED
    frozen = dict(network.frozen)
    for site in sites:
        if site not in good:
            frozen |= dict.fromkeys(site.labels.tolist(), reason)
    return replace(network, frozen=frozen)


def _dropped(sites: Sequence[Site]) -> list[int]:
    """A third of every site's units, and 0 to 3 more: sites that the code wants equally large must not stay so."""
    gone: list[int] = []
    for k, site in enumerate(sites):
        units = site.labels.tolist()
        gone += [*units[1::3], *units[2::3][: k % 4]]
    return gone


def _shapes_agree(
    model: nn.Module, network: Network, args: tuple[Any, ...], kwargs: dict[str, Any], sites: Sequence[Site]
) -> bool:
    to_meta = lambda v: v.to("meta") if isinstance(v, Tensor) else v  # noqa: E731
    small = _copy(model, lambda t: torch.empty_like(t, device="meta"))
    try:
        with torch.no_grad(), torch.device("meta"):  # where tensors that the model makes for itself belong too
            apply_slices(small, slices(network, _dropped(sites)))
            small(*tree_map(to_meta, args), **tree_map(to_meta, kwargs))
    except Exception:
        return False
    return True


def _numbers_agree(
    model: nn.Module, network: Network, args: tuple[Any, ...], kwargs: dict[str, Any], sites: Sequence[Site]
) -> bool:
    def widened(v: Any) -> Any:  # a copy, as some models write into their input
        if not isinstance(v, Tensor):
            return v
        return v.to(torch.double, copy=True) if v.is_floating_point() else v.clone()

    dropped = set(_dropped(sites))
    masked = _copy(model, lambda t: _random(t).double() if t.is_floating_point() else t.clone())
    small = copy.deepcopy(masked)
    try:
        with torch.no_grad():
            for site in sites:
                keep = torch.tensor([[float(c not in dropped) for c in site.labels.tolist()]], dtype=torch.double)
                for tap in site.taps:
                    weight = masked.get_parameter(network.layer(tap.layer).weight)
                    weight.mul_(tap.structure.expand(keep.to(weight.device), weight.shape))
            apply_slices(small, slices(network, dropped))
            with Unaveraged() if network.opened else nullcontext():
                both = [m(*tree_map(widened, args), **tree_map(widened, kwargs)) for m in (masked, small)]
            outputs = [tree_flatten(out)[0] for out in both]
    except Exception:
        return False
    pairs = [(a, b) for a, b in zip(*outputs, strict=True) if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return all(a.shape == b.shape and _close(a, b) for a, b in pairs)


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = a.double(), b.double()
    return bool((a - b).norm() <= _CLOSE * a.norm()) and bool(a.isfinite().all())


def _random(t: Tensor) -> Tensor:
    """Weights that let every channel through, zero-initialised ones too; buffers and vectors stay near theirs."""
    generator = torch.Generator(device=t.device).manual_seed(t.numel())
    noise = torch.rand(t.shape, generator=generator, device=t.device, dtype=torch.float32)
    if isinstance(t, nn.Parameter) and t.dim() > 1:
        return (noise - 0.5) * (12 / max(t[0].numel(), 1)) ** 0.5
    return t.detach() + 0.1 * noise


def _copy(model: nn.Module, change: Any) -> nn.Module:
    """A deep copy whose parameters and buffers are changed ones; what is shared stays shared."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(change(p).detach(), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = change(b)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise JpqError(
            f"{type(model).__name__} cannot be copied, and jpq works on copies: {error}. Make its "
            "attributes such that copy.deepcopy(model) works."
        ) from error


def slices(
    network: Network, dropped: Collection[int], places: Callable[[Labels], Labels] | None = None
) -> dict[str, dict[int, list[int]]]:
    """What is kept of every parameter, buffer and counting attribute that loses something or changes its order.

    A name that ends in a counting attribute ("shortcut.pad.before", "attention.heads", "norm.normalized_shape") has
    the one dim 0; the attribute becomes the number of kept entries. `places` gives the positions of an axis in their
    new order.
    """
    above = max(dropped, default=0) + 1
    gone = np.zeros(above + 2, bool)  # the last two entries stand for larger classes and for NONE
    gone[list(dropped)] = True
    out: dict[str, dict[int, list[int]]] = {}
    counted = {name: {0: labels} for name, labels in network.attributes.items()}
    for name, axes in [*network.axes.items(), *counted.items()]:
        for dim, labels in axes.items():
            lost = gone[np.minimum(labels, above)]
            if lost.all() and name in network.axes:
                raise JpqError(f"Nothing would be left of dim {dim} of '{name}'. Keep at least one of its channels.")
            natural = np.arange(len(labels))
            at = places(labels) if places else natural
            if lost.any() or (at != natural).any():
                out.setdefault(name, {})[int(dim)] = at[~lost[at]].tolist()
    return out


@torch.no_grad()
def apply_slices(model: nn.Module, slices: Slices) -> nn.Module:
    """Slice `model` in place and set its modules' sizes to match. Keys of dims may be strings, as json makes them."""
    owners: dict[str, nn.Module] = {}
    for name, axes in slices.items():
        path, _, attribute = name.rpartition(".")
        try:
            module = model.get_submodule(path)
            value = getattr(module, attribute)
            if isinstance(value, bool) or not isinstance(value, int | tuple | Tensor):
                raise AttributeError(f"{name} is a {type(value).__name__}")
        except AttributeError as e:
            raise JpqError(
                f"The plan slices '{name}', which this {type(model).__name__} has not. Load the plan "
                "into the model that it was made from."
            ) from e
        if isinstance(value, int | tuple):  # a count, or the shape of a normalisation over one dim
            count = len(axes[next(iter(axes))])
            setattr(module, attribute, count if isinstance(value, int) else (count,))
            continue
        owners[path] = module
        _slice(name, value, {int(dim): kept for dim, kept in axes.items()})
    for module in set(owners.values()):
        _resize(module)
    return model


def _slice(name: str, value: Tensor, axes: dict[int, list[int]]) -> None:
    data = value.data
    for dim, kept in axes.items():
        if not kept or dim >= data.dim():
            raise JpqError(
                f"The plan keeps {len(kept)} entries of dim {dim} of '{name}', a tensor of {data.dim()} dims."
            )
        if max(kept) >= data.shape[dim]:
            raise JpqError(
                f"The plan keeps index {max(kept)} of dim {dim} of '{name}', which has only "
                f"{data.shape[dim]}. Load the plan into the model that it was made from, once."
            )
        data = data.index_select(dim, torch.tensor(kept, dtype=torch.long, device=data.device))
    value.data = data  # in place, so parameters and modules that are shared stay shared
    value.grad = None


def _resize(module: nn.Module) -> None:
    """Bring the size attributes of a torch module in line with its sliced tensors."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd):
        n_in, n_out = weight.shape[1], weight.shape[0]
        if module.transposed:
            if module.groups == module.in_channels and module.groups > 1:
                module.groups = weight.shape[0]
            module.in_channels, module.out_channels = weight.shape[0], n_in * module.groups
        else:
            if module.groups == module.in_channels and module.groups > 1:
                module.groups = module.groups * n_out // module.out_channels
            module.in_channels, module.out_channels = n_in * module.groups, n_out
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        held = weight if weight is not None else module.running_mean
        module.num_features = held.shape[0] if held is not None else module.num_features
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]
