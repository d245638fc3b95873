"""How many units each layer keeps: from scores to one order in which the units of all layers go.

An allocator gives each unit a margin; units go in the order of their margins until a target is met, so one order
serves every target and smaller budgets keep subsets of what larger ones keep.

    uniform      the same share of every layer
    threshold    one ranking of all units; a layer's scores are divided by their l2 norm where they cannot be compared
                 (P. Molchanov et al., ICLR 2017, arXiv:1611.06440)
    greedy       units come in by gain per MAC, f(d) = sum of the d largest max(score, 0) over the sum of all: stage 1
                 of CATRO (W. Hu et al., IEEE TNNLS 2023, arXiv:2110.10921)
    reinforce    units go by a learned distribution over layers (`reinforce.py`)
    sampled      units go by their place in their layer plus an offset per layer that Optuna chooses (`sampled.py`)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jpq import costs
from jpq.allocation.ranking.rank import CompetingUnits, quantiles
from jpq.compression.model import CompressedModel
from jpq.costs.target import Target, all_met
from jpq.plan import Plan
from jpq.types import JpqError

FEWEST = 0.05  # share of a layer's units that greedy never touches

STEP = 32  # greedy adds 1 / STEP of a layer at a time

Margins = list[Tensor]  # [n] for each group, in (0, 1]: the smallest go first


@dataclass(frozen=True, eq=False)
class AllocationProblem:
    """Units that compete, and what an allocator may ask about them."""

    net: CompressedModel  # attached with `Ranked` gates; allocators do not change it
    groups: Sequence[CompetingUnits]
    everywhere: bool = False  # whether scores of different groups may be compared
    goal: Target | None = None  # what the units that stay may cost, where an allocator works towards one
    accuracy: Callable[[Plan], float] | None = None  # held-out accuracy in [0, 1] of the network under a plan
    seed: int = 0

    def plan(self, kept: Sequence[Tensor]) -> Plan:
        """The network's plan with `[n]` units of each group kept, everything else as it stands."""
        units = {
            site.name: tuple(group.of(site, keep.bool()).tolist())
            for group, keep in zip(self.groups, kept, strict=True)
            for site in group.sites
        }
        now = self.net.plan()
        return replace(now, kept={**now.kept, **units})

    def macs(self, kept: Sequence[Tensor]) -> float:
        """MACs with those units."""
        return float(costs.macs(self.net.exact_usage(self.plan(kept))))

    def enough(self, kept: Sequence[Tensor]) -> bool:
        """Whether those units meet the goal. Raises JpqError where there is none."""
        if self.goal is None:
            raise JpqError("This allocator works towards a target, and there is none.")
        return all_met([self.goal], self.net.exact_usage(self.plan(kept)))

    def measured(self, kept: Sequence[Tensor]) -> float:
        """Held-out accuracy with those units. Raises JpqError where there is nothing to measure with."""
        if self.accuracy is None:
            raise JpqError(
                "This allocator measures accuracy and needs data: use `jpq optimize`, or choose uniform, "
                "threshold or greedy."
            )
        return self.accuracy(self.plan(kept))


Allocator = Callable[[AllocationProblem], Margins]


def uniform(problem: AllocationProblem) -> Margins:
    """The same share everywhere."""
    return [quantiles(group.scores) for group in problem.groups]


def threshold(problem: AllocationProblem) -> Margins:
    """One ranking of all units."""
    scores = [group.scores.double() for group in problem.groups]
    if not problem.everywhere:
        scores = [s / s[s.isfinite()].norm().clamp_min(1e-30) for s in scores]  # dead channels may score -inf
    return list(quantiles(torch.cat(scores)).split([len(s) for s in scores])) if scores else []


def greedy(problem: AllocationProblem) -> Margins:
    """The units that bring most for their MACs come in first.

    What a step brings per MAC only falls while others come in (f is concave, MACs grow faster in wider networks), so a
    step is measured again only when it stands first (lazy greedy). What scores below 0 adds nothing.
    """
    ranks = [group.scores.argsort(descending=True, stable=True) for group in problem.groups]
    gains = [_gains(group) for group in problem.groups]
    count = [max(1, math.ceil(FEWEST * len(r))) for r in ranks]
    by = [max(1, len(r) // STEP) for r in ranks]
    kept = [torch.zeros(len(r), dtype=torch.bool) for r in ranks]
    for keep, first, n in zip(kept, ranks, count, strict=True):
        keep[first[:n]] = True
    came = [list(r[:n].tolist()) for r, n in zip(ranks, count, strict=True)]
    sequence = [(g, u) for g, units in enumerate(came) for u in units]
    now = problem.macs(kept)

    def rate(g: int) -> float:
        more = ranks[g][count[g] : count[g] + by[g]]
        kept[g][more] = True
        added = problem.macs(kept) - now
        kept[g][more] = False
        gain = float(gains[g][count[g] : count[g] + by[g]].sum())
        return gain / max(added, 1.0) if gain > 0 else len(more) / len(ranks[g]) * 1e-12 / max(added, 1.0)

    heap = [(-rate(g), g) for g in range(len(ranks)) if count[g] < len(ranks[g])]
    heapq.heapify(heap)
    while heap:
        _, g = heapq.heappop(heap)
        fresh = -rate(g)
        if heap and fresh > heap[0][0]:
            heapq.heappush(heap, (fresh, g))
            continue
        more = ranks[g][count[g] : count[g] + by[g]]
        kept[g][more] = True
        count[g] += len(more)
        sequence += [(g, int(u)) for u in more]
        now = problem.macs(kept)
        if count[g] < len(ranks[g]):
            heapq.heappush(heap, (-rate(g), g))
    return in_order(problem, sequence)


def _gains(group: CompetingUnits) -> Tensor:
    """What each unit adds to f, in descending order."""
    scores = group.scores.double().clamp_min(0).sort(descending=True).values
    return scores / scores.sum().clamp_min(1e-30)


def in_order(problem: AllocationProblem, sequence: Sequence[tuple[int, int]]) -> Margins:
    """Margins that let the units (group, unit) of a sequence stay in that order: the first stays longest."""
    margins = [torch.zeros(len(group.scores)) for group in problem.groups]
    for place, (g, u) in enumerate(sequence):
        margins[g][u] = 1 - place / len(sequence)
    return margins
