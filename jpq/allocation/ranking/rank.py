"""The ranking of units by a score, written into the margins of `Ranked` gates, from which discretization cuts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jpq.allocation.ranking.evidence import Batches, Loss, collect_evidence, group_by_unit
from jpq.compression.model import CompressedModel
from jpq.methods.gates import Ranked
from jpq.methods.scores import Chain, Evidence, Score, SiteView
from jpq.tracing.forward import eval_mode
from jpq.tracing.sites import Site
from jpq.types import JpqError

Member = tuple[int, Site, Ranked]  # index among the network's sites, site, its gate

QUANTILE_ERROR = 1e-6  # rounding of quantiles, which are single precision

Groups = dict[str, list[Member]]  # name -> sites whose units compete


@torch.no_grad()
def rank_units(
    net: CompressedModel, score: Score, batches: Batches = (), share: float = 1.0, loss: Loss = F.cross_entropy
) -> None:
    """Rank units by a score: each unit's margin becomes the share of competing units with no higher score.

    Sites of one consumer compete with each other, the units of a coupled site among themselves: discretization then
    takes the same share everywhere. Where scores may be compared between layers, all units of the network compete.
    Units that are closed already rank below all others, in the order that they had.

    Args:
        net: attached with `Ranked` gates; the score sees it as it stands, in evaluation mode.
        score: larger is more important.
        batches: (inputs, labels or None) pairs of training data, for scores that need any; iterated once.
        share: share of each site's units that is about to stay, for scores of sets of units and scores that see the
            layers before them pruned.
        loss: for scores that need gradients: (output, labels) -> mean loss.

    Raises JpqError where the units are not channels, and where the evidence cannot be collected.
    """
    groups = score_units(net, score, batches, share, loss)
    former = [_current_margins(members) for members in _groups(net).values()]
    if score.everywhere and score.order == "together" and groups:
        flat = quantiles(torch.cat([g.scores for g in groups]), torch.cat(former))
        margins = list(flat.split([len(g.scores) for g in groups]))
    else:
        margins = [quantiles(g.scores, f) for g, f in zip(groups, former, strict=True)]
    write_margins(net, groups, margins)


def quantiles(scores: Tensor, former: Tensor | None = None) -> Tensor:
    """Rank of each entry as the share of entries that are no higher, in (0, 1]; of equal entries the earlier is lower.

    Closed units (`former` at or below 0) rank below all others, in their former order.
    """
    ranks = torch.empty(len(scores))
    former = torch.ones(len(scores)) if former is None else former
    order = scores.argsort(stable=True)
    shut = former[order] <= 0
    closed = order[shut]
    order = torch.cat([closed[former[closed].argsort(stable=True)], order[~shut]])
    ranks[order] = torch.arange(1, len(scores) + 1) / len(scores)
    return ranks


@dataclass(frozen=True, eq=False)
class CompetingUnits:
    """Units that compete with each other, of one consumer or of one coupled site, and their scores."""

    name: str
    sites: tuple[Site, ...]
    scores: Tensor  # [n], on the CPU: larger is more important; minus infinity for closed units

    def of(self, site: Site, values: Tensor) -> Tensor:
        """The slice of `[n]` values of the group that belongs to one of its sites."""
        return values.split([s.n for s in self.sites])[self.sites.index(site)]


@torch.no_grad()
def score_units(
    net: CompressedModel, score: Score, batches: Batches = (), share: float = 1.0, loss: Loss = F.cross_entropy
) -> list[CompetingUnits]:
    """Score the units of every group of the network; arguments and errors as for `rank_units`."""
    check_channels(net)
    if not net.sites:
        return []
    with eval_mode(net):
        for draw in net.draws:
            draw.resample()
        if score.order == "together":
            evidence = collect_evidence(net, score.needs, batches, score.batches, loss)
            scores = {name: _score_group(net, score, name, g, evidence, share) for name, g in _groups(net).items()}
        else:
            scores = _score_in_order(net, score, list(islice(batches, score.batches)), share, loss)
    return [CompetingUnits(name, tuple(site for _, site, _ in g), scores[name]) for name, g in _groups(net).items()]


@torch.no_grad()
def write_margins(net: CompressedModel, groups: Sequence[CompetingUnits], margins: Sequence[Tensor]) -> None:
    """Write margins, `[n]` for each group, into the network's `Ranked` gates: the smallest are removed first."""
    gates = {site.name: gate for site, gate in zip(net.sites, net.gates, strict=True)}
    for group, values in zip(groups, margins, strict=True):
        for site in group.sites:
            gates[site.name].margins.copy_(group.of(site, values)[None])


@torch.no_grad()
def site_scores(
    net: CompressedModel, score: Score, batches: Batches = (), loss: Loss = F.cross_entropy
) -> dict[str, Tensor]:
    """Score the units of every site, with none about to be removed: site -> `[n]`, minus infinity for closed units."""
    groups = score_units(net, score, batches, loss=loss)
    by_site = {site.name: group.of(site, group.scores) for group in groups for site in group.sites}
    return {site.name: by_site[site.name] for site in net.sites}


def check_channels(net: CompressedModel) -> None:
    """Raise JpqError where a site is a mask inside a layer: scores rank channels."""
    if any(site.is_mask for site in net.sites):
        raise JpqError("Scores rank whole channels: leave --structure out, or choose a --method that learns its gates.")


def _groups(net: CompressedModel) -> Groups:
    """Group sites whose units compete: the sites of one consumer, or one coupled site."""
    groups: Groups = defaultdict(list)
    for i, (site, gate) in enumerate(zip(net.sites, net.gates, strict=True)):
        groups[site.taps[0].layer if len(site.taps) == 1 else f"{site.name} (coupled)"].append((i, site, gate))
    return groups


def _score_in_order(
    net: CompressedModel, score: Score, batches: Batches, share: float, loss: Loss
) -> dict[str, Tensor]:
    """Score group by group along the network, each with the groups before it pruned to `share`; group -> `[n]`."""
    position = {layer.name: i for i, layer in enumerate(net.network.layers)}
    places = {
        name: max(position.get(m, -1) for _, site, _ in g for m in site.producers) for name, g in _groups(net).items()
    }
    scores = {}
    for name in sorted(places, key=places.__getitem__, reverse=score.order == "backward"):
        members = _groups(net)[name]
        evidence = collect_evidence(net, score.needs, batches, score.batches, loss)
        scores[name] = _score_group(net, score, name, members, evidence, share)
        margins = quantiles(scores[name], _current_margins(members))
        for (i, _, gate), part in zip(members, margins.split([g.n for _, _, g in members]), strict=True):
            net.draws[i].z = (part > 1 - share + QUANTILE_ERROR).to(gate.margins)[None]
    for draw in net.draws:
        draw.resample()
    return scores


def _score_group(
    net: CompressedModel, score: Score, name: str, members: Sequence[Member], evidence: Sequence[Evidence], share: float
) -> Tensor:
    """`[n]`: scores of one group's units; minus infinity for closed ones, which no longer compete."""
    open_ = _current_margins(members) > 0
    rows = _concatenate([_consumer_rows(net, site) for _, site, _ in members], 0, 1)
    kept_count = max(1, min(_count_above(1 - share, len(open_)), int(open_.sum())))
    view = SiteView(name, rows[open_.to(rows.device)], max(len(site.taps) for _, site, _ in members), kept_count)
    values = score(view, _select_units(_join_evidence([evidence[i] for i, _, _ in members]), open_))[0].double().cpu()
    if bool(values.isnan().any()):
        raise JpqError(f"The score of '{name}' is not a number: the network's weights or outputs are not finite.")
    return torch.full_like(open_, -torch.inf, dtype=torch.float64).masked_scatter(open_, values)


def _count_above(threshold: float, n: int) -> int:
    """Number of n ranked units whose quantile exceeds a threshold: those that a cut there leaves."""
    return int((torch.arange(1, n + 1) / n > threshold + QUANTILE_ERROR).sum())


def _current_margins(members: Sequence[Member]) -> Tensor:
    """`[n]`: the margins of one group's units; units with a margin above 0 are open."""
    return torch.cat([gate.margins[0] for _, _, gate in members]).cpu()


def _join_evidence(parts: Sequence[Evidence]) -> Evidence:
    """Join the evidence of several sites, units side by side."""
    if len(parts) == 1:
        return parts[0]
    maps = [p.activations for p in parts if p.activations is not None]
    means = [p.means for p in parts if p.means is not None]
    scales = [p.scales for p in parts if p.scales is not None]
    chains = [p.chain for p in parts if p.chain is not None]
    fields = ("filter_norms", "producer_norms", "consumer_norms")
    return replace(
        parts[0],
        activations=_concatenate(maps, 1, 2) if maps else None,
        means=torch.cat(means, 2) if means else None,
        gradients=tuple(torch.cat(g, 1) for g in zip(*(p.gradients for p in parts), strict=True)),
        curvature=tuple(torch.cat(h) for h in zip(*(p.curvature for p in parts), strict=True)),
        scales=torch.cat(scales) if len(scales) == len(parts) else None,
        chain=Chain(*(_concatenate([getattr(c, f).T for c in chains], 0, 1).T for f in fields)) if chains else None,
    )


def _select_units(evidence: Evidence, units: Tensor) -> Evidence:
    """The evidence of some units; units: [n], whether each is selected."""
    if bool(units.all()):
        return evidence
    e, c, mask = evidence, evidence.chain, units
    return replace(
        e,
        activations=None if e.activations is None else e.activations[:, mask.to(e.activations.device)],
        means=None if e.means is None else e.means[:, :, mask.to(e.means.device)],
        gradients=tuple(g[:, mask.to(g.device)] for g in e.gradients),
        curvature=tuple(h[mask.to(h.device)] for h in e.curvature),
        scales=None if e.scales is None else e.scales[mask],
        chain=None
        if c is None
        else Chain(c.filter_norms[:, mask], c.producer_norms[:, mask], c.consumer_norms[:, mask]),
    )


def _consumer_rows(net: CompressedModel, site: Site) -> Tensor:
    """`[n, rest]`: the weights that consume each unit, over all taps, masked and quantized."""
    parts = []
    for tap in site.taps:
        axis: Any = tap.structure
        weight = net.used_weight(net.network.layer(tap.layer)).detach().movedim(axis.dim, 0).flatten(1)
        parts.append(group_by_unit(weight, axis.index, site.n).flatten(1))
    return torch.cat(parts, 1)


def _concatenate(parts: list[Tensor], along: int, pad: int) -> Tensor:
    """Concatenate along one dim; dims from `pad` on are zero-padded to the largest size among the parts."""
    dims = parts[0].dim()
    sizes = [max(p.shape[d] for p in parts) if d >= pad else 0 for d in range(dims)]
    padded = []
    for p in parts:
        missing = [n - p.shape[d] if d >= pad else 0 for d, n in enumerate(sizes)]
        padded.append(nn.functional.pad(p, [m for after in reversed(missing) for m in (0, after)]))
    return torch.cat(padded, along)
