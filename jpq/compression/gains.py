"""Discretization by gain per cost: of single steps that fit, that of largest predicted fall in divergence for its cost.

The prediction is a sum of measured divergences of single changes, one entry for the value of each decision: a width,
or how many units of a site stay. Units whose absence costs nothing (dead ones) come last, after every width that may
grow. Rates are kept in a heap and computed anew when they reach its top, since a step's cost depends on what was
decided before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from heapq import heapify, heappop, heappush
from typing import Any, Protocol

import numpy as np

from jpq.compression.ladders import LARGEST_GAP, Fits, Ladders, Positions, fewest_steps_back, moved
from jpq.plan import Plan

NO_GAIN = 1e-4  # share of a decision's largest divergence below which a step gains nothing
LEAST_COST = 1e-15  # of a step, as a share of the targets

Rank = tuple[int, float, int]  # (0: gains, 1: a width or an unknown decision, 2: units without a gain; order; ladder)


class Divergences(Protocol):
    """Measured divergences of single changes, such as a sensitivity table holds."""

    @property
    def bits(self) -> Mapping[Any, Mapping[int, float]]:
        """(layer, "w" | "a") -> width -> divergence."""

    @property
    def units(self) -> Mapping[str, Mapping[int, float]]:
        """Site -> number of units kept -> divergence."""


class Gains:
    """What single steps of the decisions gain and cost.

    Args:
        ladders: the decisions.
        divergences: of single changes; values between two measured ones are interpolated.
        cost: of a plan, larger where it keeps more.
    """

    def __init__(self, ladders: Ladders, divergences: Divergences, cost: Callable[[Plan], float]):
        self.ladders, self.cost = ladders, cost
        self.values: list[list[float] | None] = []  # of each ladder: divergence at each of its values
        for ladder in ladders.all:
            row = (
                divergences.units.get(ladder.site) if ladder.site else divergences.bits.get((ladder.layer, ladder.side))
            )
            known = sorted(row or {})
            found = np.interp(ladder.values, known, [row[k] for k in known]).tolist() if row else None
            self.values.append(found)

    def fall(self, ladder: int, position: int) -> float:
        """The predicted fall of the divergence from one position to the next; 0 where it is not known or too small."""
        values = self.values[ladder]
        if values is None:
            return 0.0
        fall = values[position] - values[position + 1]
        return fall if fall > NO_GAIN * max(map(abs, values)) else 0.0

    def predicted(self, positions: Positions) -> float:
        """The sum of the divergences of all decisions that are known."""
        return sum(v[p] for v, p in zip(self.values, positions, strict=True) if v is not None)

    def rank(self, ladder: int, positions: Positions, added: float) -> Rank:
        """The place of a step forward among all of them, the least first; `added`: its cost."""
        position = positions[ladder]
        fall = self.fall(ladder, position)
        if fall > 0:
            return 0, -fall / max(added, LEAST_COST), ladder
        dead = bool(self.ladders.all[ladder].site) and self.values[ladder] is not None
        return 2 if dead else 1, self.ladders.all[ladder].shifts[position], ladder


def spend_by_gain(gains: Gains, plan: Plan, fits: Fits) -> Plan:
    """The plan after steps that keep more, the largest gain per cost first, until no single step fits."""
    ladders = gains.ladders
    positions = ladders.positions(plan)

    def step(ladder: int) -> tuple[Rank, Plan] | None:
        """(rank, plan) of the next step of a decision from here; None where there is none, or it is too dear."""
        if positions[ladder] + 1 >= len(ladders.all[ladder].values):
            return None
        candidate = ladders.plan(plan, moved(positions, [ladder], 1), [ladder])
        if not fits(candidate):
            return None
        return gains.rank(ladder, positions, gains.cost(candidate) - gains.cost(plan)), candidate

    first = (step(ladder) for ladder in range(len(ladders.all)))
    queue = [found[0] for found in first if found is not None]
    heapify(queue)
    while queue:
        ladder = heappop(queue)[2]
        found = step(ladder)
        if found is None:
            continue  # costs only grow: what is too dear now never fits later
        rank, candidate = found
        if queue and rank > queue[0]:
            heappush(queue, rank)
            continue
        plan, positions = candidate, moved(positions, [ladder], 1)
        after = step(ladder)
        if after is not None:
            heappush(queue, after[0])
    return plan


def trade_by_gain(gains: Gains, plan: Plan, fits: Fits, is_full: Callable[[Plan], bool]) -> Plan:
    """The plan after one step forward and the steps back that pay for it, where that fills the budget; else the plan.

    Steps forward are tried by falling gain per cost; those of least loss per cost pay. A plan whose predicted
    divergence is larger is never taken: then some of the budget stays unused.
    """
    ladders = gains.ladders
    positions = ladders.positions(plan)
    forward = []
    for i, ladder in enumerate(ladders.all):
        if positions[i] + 1 < len(ladder.values) and gains.fall(i, positions[i]) > 0:
            candidate = ladders.plan(plan, moved(positions, [i], 1), [i])
            forward.append(gains.rank(i, positions, gains.cost(candidate) - gains.cost(plan)))
    payments = _payments(gains, plan, positions) if forward else []
    for _, _, step in sorted(forward):
        shift = ladders.all[step].shifts[positions[step]]
        back = [i for _, i, behind in payments if i != step and shift - behind <= LARGEST_GAP]
        paid = fewest_steps_back(ladders, plan, positions, step, back, fits)
        if paid is not None:
            paid = spend_by_gain(gains, paid, fits)
            if is_full(paid) and gains.predicted(ladders.positions(paid)) < gains.predicted(positions):
                return paid
    return plan


def _payments(gains: Gains, plan: Plan, positions: Positions) -> list[tuple[float, int, float]]:
    """(loss per saved cost, ladder, shift) of every step back, the least loss first, those of a decision in order."""
    ladders = gains.ladders
    full = gains.cost(plan)
    payments = []
    for i, ladder in enumerate(ladders.all):
        rate, before = -np.inf, full
        for position in range(positions[i] - 1, -1, -1):
            lower = list(positions)
            lower[i] = position
            cost = gains.cost(ladders.plan(plan, lower, [i]))
            rate = max(rate, gains.fall(i, position) / max(before - cost, LEAST_COST))
            payments.append((rate, i, ladder.shifts[position]))
            before = cost
    return sorted(payments, key=lambda payment: payment[:2])
