"""Allocation of channels to layers: from scores to one order in which the units of all layers are removed.

An allocator gives each unit a margin; units are removed in the order of their margins until a target is met, so one
order serves every target, and a smaller budget keeps a subset of the units that a larger one keeps.

    uniform      the same share of every layer
    threshold    one ranking of all units; a layer's scores are divided by their l2 norm where they cannot be compared
                 (P. Molchanov et al., ICLR 2017, arXiv:1611.06440)
    greedy       units are added by gain per MAC, f(d) = sum of the d largest max(score, 0) over the sum of all: stage 1
                 of CATRO (W. Hu et al., IEEE TNNLS 2023, arXiv:2110.10921), from 5 % of each layer on
    reinforce    units are removed by a learned distribution over layers (`reinforce.py`)
    sampled      units are removed by their rank in their layer plus an offset per layer, chosen by Optuna
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

ALWAYS_KEPT = 0.05  # share of a layer's units that greedy starts with

STEPS_PER_LAYER = 32  # greedy adds 1 / 32 of a layer at a time

NEEDS_DATA = "measures accuracy and needs data: use `jpq optimize`, or choose uniform, threshold or greedy."

Margins = list[Tensor]  # [n] for each group, in (0, 1]: units with the smallest are removed first


@dataclass(frozen=True, eq=False)
class AllocationProblem:
    """Groups of competing units, and the costs and the accuracy of keeping some of them."""

    net: CompressedModel  # attached with `Ranked` gates; allocators do not change it
    groups: Sequence[CompetingUnits]
    everywhere: bool = False  # whether scores of different groups may be compared
    target: Target | None = None  # limit of the cost of the units that stay, for allocators that work towards one
    accuracy: Callable[[Plan], float] | None = None  # held-out accuracy in [0, 1] of the network under a plan
    seed: int = 0

    def plan(self, kept: Sequence[Tensor]) -> Plan:
        """The network's plan with these units kept, all else as it stands; kept: `[n]` for each group, 0 or 1."""
        units = {
            site.name: tuple(group.of(site, keep.bool()).tolist())
            for group, keep in zip(self.groups, kept, strict=True)
            for site in group.sites
        }
        current = self.net.plan()
        return replace(current, kept={**current.kept, **units})

    def macs(self, kept: Sequence[Tensor]) -> float:
        """MACs of the network with these units kept."""
        return float(costs.macs(self.net.exact_usage(self.plan(kept))))

    def meets_target(self, kept: Sequence[Tensor]) -> bool:
        """Whether the target is met with these units kept. Raises JpqError where there is none."""
        if self.target is None:
            raise JpqError("This allocator works towards a target, and there is none.")
        return all_met([self.target], self.net.exact_usage(self.plan(kept)))

    def measure(self, kept: Sequence[Tensor]) -> float:
        """Held-out accuracy with these units kept. Raises JpqError where nothing measures it."""
        if self.accuracy is None:
            raise JpqError(f"This allocator {NEEDS_DATA}")
        return self.accuracy(self.plan(kept))


Allocator = Callable[[AllocationProblem], Margins]


def uniform(problem: AllocationProblem) -> Margins:
    """Keep the same share of every group."""
    return [quantiles(group.scores) for group in problem.groups]


def threshold(problem: AllocationProblem) -> Margins:
    """Rank all units of the network in one order."""
    scores = [group.scores.double() for group in problem.groups]
    if not problem.everywhere:
        scores = [s / s[s.isfinite()].norm().clamp_min(1e-30) for s in scores]  # closed channels score -inf
    return list(quantiles(torch.cat(scores)).split([len(s) for s in scores])) if scores else []


def greedy(problem: AllocationProblem) -> Margins:
    """Add first the units with the largest gain per MAC (lazy greedy).

    The gain of a step per MAC only falls while others are added (f is concave, MACs grow faster in wider networks), so
    a step is measured again only when it is the best. Units with scores below 0 add nothing.
    """
    orders = [group.scores.argsort(descending=True, stable=True) for group in problem.groups]
    gains = [_gains(group) for group in problem.groups]
    count = [max(1, math.ceil(ALWAYS_KEPT * len(r))) for r in orders]
    step = [max(1, len(r) // STEPS_PER_LAYER) for r in orders]
    kept = [torch.zeros(len(r), dtype=torch.bool) for r in orders]
    for keep, ranked_units, n in zip(kept, orders, count, strict=True):
        keep[ranked_units[:n]] = True
    sequence = [(g, int(u)) for g, (r, n) in enumerate(zip(orders, count, strict=True)) for u in r[:n]]
    macs = problem.macs(kept)

    def gain_per_mac(g: int) -> float:
        units = orders[g][count[g] : count[g] + step[g]]
        kept[g][units] = True
        added = problem.macs(kept) - macs
        kept[g][units] = False
        gain = float(gains[g][count[g] : count[g] + step[g]].sum())
        return gain / max(added, 1.0) if gain > 0 else len(units) / len(orders[g]) * 1e-12 / max(added, 1.0)

    heap = [(-gain_per_mac(g), g) for g in range(len(orders)) if count[g] < len(orders[g])]
    heapq.heapify(heap)
    while heap:
        _, g = heapq.heappop(heap)
        current = -gain_per_mac(g)
        if heap and current > heap[0][0]:
            heapq.heappush(heap, (current, g))
            continue
        units = orders[g][count[g] : count[g] + step[g]]
        kept[g][units] = True
        count[g] += len(units)
        sequence += [(g, int(u)) for u in units]
        macs = problem.macs(kept)
        if count[g] < len(orders[g]):
            heapq.heappush(heap, (-gain_per_mac(g), g))
    return margins_of_sequence(problem, sequence)


def _gains(group: CompetingUnits) -> Tensor:
    """`[n]`: the amount that each unit adds to f, in descending order."""
    scores = group.scores.double().clamp_min(0).sort(descending=True).values
    return scores / scores.sum().clamp_min(1e-30)


def margins_of_sequence(problem: AllocationProblem, sequence: Sequence[tuple[int, int]]) -> Margins:
    """Margins that keep the units (group, unit) of a sequence in that order: its first unit is removed last."""
    margins = [torch.zeros(len(group.scores)) for group in problem.groups]
    for place, (g, u) in enumerate(sequence):
        margins[g][u] = 1 - place / len(sequence)
    return margins
