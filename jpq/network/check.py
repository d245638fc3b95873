"""Whether a model's own code works with fewer channels: found by running a smaller copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from jpq.network.norms import Unaveraged
from jpq.network.record import Network
from jpq.network.resize import apply_slices, slices
from jpq.network.sites import Site, channels
from jpq.types import JpqError

REASON = "the model's code has fixed sizes there, or lets them follow others"
UNTRIED = "a copy of the model could not be tried with fewer channels there"
_CLOSE = 1e-6  # relative, in float64; a wrong head size or shuffle is off by far more


Test = Callable[[nn.Module, Network, tuple[Any, ...], dict[str, Any], Sequence[Site]], bool]


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
        raise JpqError(f"{type(model).__name__} cannot be copied, and jpq works on copies: {error}. Make its "
                       "attributes such that copy.deepcopy(model) works.") from error  # fmt: skip
