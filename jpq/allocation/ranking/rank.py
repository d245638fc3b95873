"""Which units go first: a score's ranking, written into the margins of `Ranked` gates for landing to cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jpq.allocation.ranking.evidence import Batches, Loss, collect, of_units
from jpq.compression.model import CompressedModel
from jpq.methods.gates import Ranked
from jpq.methods.scores import Chain, Evidence, Score, SiteView
from jpq.tracing.forward import eval_mode
from jpq.tracing.sites import Site
from jpq.types import JpqError

Member = tuple[int, Site, Ranked]  # place among the network's sites, site, gate

Groups = dict[str, list[Member]]


@torch.no_grad()
def rank(
    net: CompressedModel, score: Score, batches: Batches = (), share: float = 1.0, loss: Loss = F.cross_entropy
) -> None:
    """Set the margin of every unit to the share of units that stand no higher.

    Sites of one reader compete with each other, coupled sites each for themselves: landing then takes the same share
    everywhere. Where the score may be compared between layers, all units of the network compete. Units that are closed
    already stand below all others, in the order that they had.

    Args:
        net: attached with `Ranked` gates; the score sees it as it stands, in evaluation mode.
        score: larger is more important.
        batches: (inputs, labels or None) pairs of training data, as far as the score wants them; iterated once.
        share: of the units of each site, how many are about to stay: for scores that look for a set, or at what the
            layers before lose.
        loss: for scores that need gradients, (output, labels) -> mean loss.

    Raises JpqError where the units are not channels, and where the evidence cannot be had.
    """
    groups = scored(net, score, batches, share, loss)
    former = [_former(members) for members in _groups(net).values()]
    if score.everywhere and score.order == "together" and groups:
        flat = quantiles(torch.cat([g.scores for g in groups]), torch.cat(former))
        margins = list(flat.split([len(g.scores) for g in groups]))
    else:
        margins = [quantiles(g.scores, f) for g, f in zip(groups, former, strict=True)]
    order(net, groups, margins)


@dataclass(frozen=True, eq=False)
class CompetingUnits:
    """Units that compete with each other: those of one reader, or those of one coupled site."""

    name: str
    sites: tuple[Site, ...]
    scores: Tensor  # [n], on the CPU: larger is more important; of closed units minus infinity

    def of(self, site: Site, values: Tensor) -> Tensor:
        """The part of `[n]` values that belongs to one of its sites."""
        return values.split([s.n for s in self.sites])[self.sites.index(site)]


@torch.no_grad()
def scored(
    net: CompressedModel, score: Score, batches: Batches = (), share: float = 1.0, loss: Loss = F.cross_entropy
) -> list[CompetingUnits]:
    """The groups of a network and the scores of their units; arguments and errors as `rank` has them."""
    require_channels(net)
    if not net.sites:
        return []
    with eval_mode(net):
        for draw in net.draws:
            draw.resample()
        if score.order == "together":
            found = collect(net, score.needs, batches, score.batches, loss)
            scores = {name: _score(net, score, name, g, found, share) for name, g in _groups(net).items()}
        else:
            scores = _in_order(net, score, list(islice(batches, score.batches)), share, loss)
    return [CompetingUnits(name, tuple(site for _, site, _ in g), scores[name]) for name, g in _groups(net).items()]


@torch.no_grad()
def order(net: CompressedModel, groups: Sequence[CompetingUnits], margins: Sequence[Tensor]) -> None:
    """Write margins, `[n]` for each group, into the network's `Ranked` gates: the smallest go first."""
    gates = {site.name: gate for site, gate in zip(net.sites, net.gates, strict=True)}
    for group, values in zip(groups, margins, strict=True):
        for site in group.sites:
            gates[site.name].margins.copy_(group.of(site, values)[None])


@torch.no_grad()
def scores(
    net: CompressedModel, score: Score, batches: Batches = (), loss: Loss = F.cross_entropy
) -> dict[str, Tensor]:
    """Site -> `[n]`, the scores themselves, where nothing is about to go; of closed units minus infinity."""
    groups = scored(net, score, batches, loss=loss)
    found = {site.name: group.of(site, group.scores) for group in groups for site in group.sites}
    return {site.name: found[site.name] for site in net.sites}


def require_channels(net: CompressedModel) -> None:
    """Raise JpqError where a site is a mask inside a layer: scores rank channels."""
    if any(site.is_mask for site in net.sites):
        raise JpqError("Scores rank whole channels: leave --structure out, or choose a --method that learns its gates.")


def _groups(net: CompressedModel) -> Groups:
    """Sites whose units compete."""
    groups: Groups = defaultdict(list)
    for i, (site, gate) in enumerate(zip(net.sites, net.gates, strict=True)):
        groups[site.taps[0].layer if len(site.taps) == 1 else f"{site.name} (coupled)"].append((i, site, gate))
    return groups


def _in_order(net: CompressedModel, score: Score, batches: Batches, share: float, loss: Loss) -> dict[str, Tensor]:
    """`[n]` scores, group by group along the network, each on what the groups before it leave."""
    at = {layer.name: i for i, layer in enumerate(net.network.layers)}
    places = {name: max(at.get(m, -1) for _, site, _ in g for m in site.makers) for name, g in _groups(net).items()}
    scores = {}
    for name in sorted(places, key=places.__getitem__, reverse=score.order == "backward"):
        members = _groups(net)[name]
        evidence = collect(net, score.needs, batches, score.batches, loss)
        scores[name] = _score(net, score, name, members, evidence, share)
        margins = quantiles(scores[name], _former(members))
        for (i, _, gate), part in zip(members, margins.split([g.n for _, _, g in members]), strict=True):
            net.draws[i].z = (part > 1 - share + 1e-6).to(gate.margins)[None]
    for draw in net.draws:
        draw.resample()
    return scores


def _score(
    net: CompressedModel, score: Score, name: str, members: Sequence[Member], evidence: Sequence[Evidence], share: float
) -> Tensor:
    """`[n]` of one group's units; of closed ones, which compete no more, minus infinity."""
    open_ = _former(members) > 0
    rows = _joined([_rows(net, site) for _, site, _ in members], 0, 1)
    stay = max(1, min(round(share * len(open_)), int(open_.sum())))
    view = SiteView(name, rows[open_.to(rows.device)], max(len(site.taps) for _, site, _ in members), stay)
    found = score(view, _of(_joint([evidence[i] for i, _, _ in members]), open_))[0].double().cpu()
    if bool(found.isnan().any()):
        raise JpqError(f"The score of '{name}' is not a number: the network's weights or outputs are not finite.")
    return torch.full_like(open_, -torch.inf, dtype=torch.float64).masked_scatter(open_, found)


def _former(members: Sequence[Member]) -> Tensor:
    """`[n]`: the margins that one group's units have now; above 0 they are open."""
    return torch.cat([gate.margins[0] for _, _, gate in members]).cpu()


def _joint(parts: Sequence[Evidence]) -> Evidence:
    """The evidence of several sites, their units side by side."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    maps = [p.activations for p in parts if p.activations is not None]
    means = [p.means for p in parts if p.means is not None]
    scales = [p.scales for p in parts if p.scales is not None]
    chains = [p.chain for p in parts if p.chain is not None]
    fields = ("own", "reached", "after")
    return replace(
        first,
        activations=_joined(maps, 1, 2) if maps else None,
        means=torch.cat(means, 2) if means else None,
        gradients=tuple(torch.cat(g, 1) for g in zip(*(p.gradients for p in parts), strict=True)),
        curvature=tuple(torch.cat(h) for h in zip(*(p.curvature for p in parts), strict=True)),
        scales=torch.cat(scales) if len(scales) == len(parts) else None,
        chain=Chain(*(_joined([getattr(c, f).T for c in chains], 0, 1).T for f in fields)) if chains else None,
    )


def _of(evidence: Evidence, units: Tensor) -> Evidence:
    """The evidence of some of the units."""
    if bool(units.all()):
        return evidence
    e, c, at = evidence, evidence.chain, units
    return replace(
        e,
        activations=None if e.activations is None else e.activations[:, at.to(e.activations.device)],
        means=None if e.means is None else e.means[:, :, at.to(e.means.device)],
        gradients=tuple(g[:, at.to(g.device)] for g in e.gradients),
        curvature=tuple(h[at.to(h.device)] for h in e.curvature),
        scales=None if e.scales is None else e.scales[at],
        chain=None if c is None else Chain(c.own[:, at], c.reached[:, at], c.after[:, at]),
    )


def quantiles(scores: Tensor, former: Tensor | None = None) -> Tensor:
    """Share of entries that stand no higher, in (0, 1]; of equals the first stands lower.

    What is closed (`former` at or below 0) stands below all others, in its former order.
    """
    out = torch.empty(len(scores))
    former = torch.ones(len(scores)) if former is None else former
    order = scores.argsort(stable=True)
    shut = former[order] <= 0
    closed = order[shut]
    order = torch.cat([closed[former[closed].argsort(stable=True)], order[~shut]])
    out[order] = torch.arange(1, len(scores) + 1) / len(scores)
    return out


def _rows(net: CompressedModel, site: Site) -> Tensor:
    """[n, rest]: the weights that read each unit, over all taps, masked and quantized."""
    parts = []
    for tap in site.taps:
        axis: Any = tap.structure
        weight = net.used_weight(net.network.layer(tap.layer)).detach().movedim(axis.dim, 0).flatten(1)
        parts.append(of_units(weight, axis.index, site.n).flatten(1))
    return torch.cat(parts, 1)


def _joined(parts: list[Tensor], along: int, pad: int) -> Tensor:
    """Parts side by side, zeros appended on the dims from `pad` on to the largest."""
    rank = parts[0].dim()
    sizes = [max(p.shape[d] for p in parts) if d >= pad else 0 for d in range(rank)]
    grown = []
    for p in parts:
        missing = [n - p.shape[d] if d >= pad else 0 for d, n in enumerate(sizes)]
        grown.append(nn.functional.pad(p, [m for after in reversed(missing) for m in (0, after)]))
    return torch.cat(grown, along)
