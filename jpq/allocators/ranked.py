"""Which units go first: a score's ranking, written into the margins of `Ranked` gates for landing to cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jpq.network.compressed import Compressed
from jpq.network.read import call, evaluating, heard
from jpq.network.sites import Site
from jpq.network.taps import original
from jpq.scores import Evidence, Score, SiteView
from jpq.types import JpqError


@torch.no_grad()
def rank(net: Compressed, score: Score, batch: Any) -> None:
    """Set the margin of every unit to the share of units that score no higher.

    Sites of one reader compete with each other, coupled sites each for themselves: landing then takes the same share
    everywhere. Where the score may be compared between layers, all units of the network compete.

    Args:
        net: attached with `Ranked` gates.
        score: larger is more important.
        batch: inputs of the model, for scores that need activations.

    Raises JpqError where the units are not channels.
    """
    groups = scored(net, score, batch)
    if score.everywhere and groups:
        margins = list(quantiles(torch.cat([g.scores for g in groups])).split([len(g.scores) for g in groups]))
    else:
        margins = [quantiles(g.scores) for g in groups]
    order(net, groups, margins)


@dataclass(frozen=True, eq=False)
class Group:
    """Units that compete with each other: those of one reader, or those of one coupled site."""

    name: str
    sites: tuple[Site, ...]
    scores: Tensor  # [n], on the CPU: larger is more important

    def of(self, site: Site, values: Tensor) -> Tensor:
        """The part of `[n]` values that belongs to one of its sites."""
        parts = values.split([s.n for s in self.sites])
        return parts[self.sites.index(site)]


@torch.no_grad()
def scored(net: Compressed, score: Score, batch: Any) -> list[Group]:
    """The groups of a network and the scores of their units. Raises JpqError where the units are not channels."""
    require_channels(net)
    members: dict[str, list[Site]] = defaultdict(list)
    for site in net.sites:
        members[site.taps[0].layer if len(site.taps) == 1 else f"{site.name} (coupled)"].append(site)
    wants = "activations" in score.needs
    seen = _inputs(net, {tap.layer for site in net.sites for tap in site.taps}, batch) if wants else {}
    groups = []
    for name, sites in members.items():
        view = SiteView(name, _joined([_rows(net, site) for site in sites], 0, 1))
        maps = _joined([_maps(site, seen) for site in sites], 1, 2) if wants else None
        groups.append(Group(name, tuple(sites), score(view, Evidence(maps))[0].cpu()))
    return groups


@torch.no_grad()
def order(net: Compressed, groups: Sequence[Group], margins: Sequence[Tensor]) -> None:
    """Write margins, `[n]` for each group, into the network's `Ranked` gates: the smallest go first."""
    gates = {site.name: gate for site, gate in zip(net.sites, net.gates, strict=True)}
    for group, values in zip(groups, margins, strict=True):
        for site in group.sites:
            gates[site.name].margins.copy_(group.of(site, values)[None])


def require_channels(net: Compressed) -> None:
    """Raise JpqError where a site is a mask inside a layer: scores rank channels."""
    if any(site.is_mask for site in net.sites):
        raise JpqError("Scores rank whole channels: leave --structure out, or choose a --method that learns its gates.")


def quantiles(scores: Tensor) -> Tensor:
    """Share of entries that stand no higher, in (0, 1]; of equals the first stands lower."""
    out = torch.empty(len(scores))
    out[scores.argsort(stable=True)] = torch.arange(1, len(scores) + 1) / len(scores)
    return out


def _rows(net: Compressed, site: Site) -> Tensor:
    """[n, rest]: the weights that read each unit, over all taps."""
    parts = []
    for tap in site.taps:
        axis: Any = tap.structure
        owner, _, name = net.network.layer(tap.layer).weight.rpartition(".")
        weight = original(net.model.get_submodule(owner), name).detach().movedim(axis.dim, 0).flatten(1)
        parts.append(_of_units(weight, axis.index, site.n).flatten(1))
    return torch.cat(parts, 1)


def _maps(site: Site, seen: dict[str, Tensor]) -> Tensor:
    """[batch, n, height, width]: the units as the first tap reads them; a flattened unit is one row."""
    tap = site.taps[0]
    axis: Any = tap.structure
    x = seen[tap.layer]  # [batch, positions, height, width]
    return _of_units(x.transpose(0, 1), axis.index, site.n).permute(2, 0, 1, 3, 4).flatten(2, 3)


def _of_units(x: Tensor, index: np.ndarray, n: int) -> Tensor:
    """[positions, ...] -> [n, most positions of a unit, ...], zeros where a unit has fewer."""
    held = [np.flatnonzero(index == u) for u in range(n)]
    at = np.full((n, max(map(len, held))), len(x))
    for u, places in enumerate(held):
        at[u, : len(places)] = places
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[torch.as_tensor(at, device=x.device)]


def _joined(parts: list[Tensor], along: int, pad: int) -> Tensor:
    """Parts side by side, zeros appended on the dims from `pad` on to the largest."""
    rank = parts[0].dim()
    sizes = [max(p.shape[d] for p in parts) if d >= pad else 0 for d in range(rank)]
    grown = []
    for p in parts:
        missing = [n - p.shape[d] if d >= pad else 0 for d, n in enumerate(sizes)]
        grown.append(nn.functional.pad(p, [m for after in reversed(missing) for m in (0, after)]))
    return torch.cat(grown, along)


def _inputs(net: Compressed, names: set[str], batch: Any) -> dict[str, Tensor]:
    """What each layer reads, [batch, channels, height, width]; several calls of one layer: the last."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, layer: Any, x: Any, _: Any) -> None:
        x = x.detach().movedim(-1 if layer.weight.dim() == 2 else 1, 1)
        seen[name] = x.reshape(*x.shape, *[1] * (4 - x.dim())).flatten(3)

    layers = {name: layer for name in names if (layer := net.layer(name)) is not None}
    with evaluating(net), heard(layers, keep):
        call(net, batch)
    lost = names - seen.keys()
    if lost:
        raise JpqError(f"This score needs what layer '{min(lost)}' reads, which no module of its own computes. "
                       "Choose another --score, or exclude the layers before it with --skip.")  # fmt: skip
    return seen
