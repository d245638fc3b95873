"""Ladders: the single decisions of a plan as sorted steps, which spend what a budget leaves and pay for one another.

Each decision (a width, or how many units of a site stay) is a ladder of values; a shift leads from one value to the
next. Costs grow with every step. So steps are tried in blocks: as long as blocks fit they double, and they are halved
where they do not, down to the single step that is too dear. The result is that of trying single steps one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from jpq.compression.channel_counts import rounding_point
from jpq.compression.soft_decisions import SoftDecisions
from jpq.plan import Plan

LARGEST_GAP = 2.0  # bits between the shifts of a step forward and of a step back that pays for it

Positions = list[int]  # of each ladder: index of its present value

Fits = Callable[[Plan], bool]  # whether a plan meets every target


@dataclass(frozen=True)
class Ladder:
    """The values that one decision may take, ascending, and the shifts at which rounding passes between neighbours."""

    layer: str  # whose width it is; empty for a site
    side: str  # "w" or "a"; empty for a site
    site: str  # whose number of units it is; empty for a width
    values: tuple[int, ...]
    shifts: tuple[float, ...]  # one fewer: shifts[i] leads from values[i] to values[i + 1]

    @property
    def name(self) -> str:
        """The decision in words: "conv1 w", or the site."""
        return self.site or f"{self.layer} {self.side}"


class Ladders:
    """All decisions of soft decisions as ladders, and the plans at their positions.

    Args:
        decisions: the soft values.
        nats: margin of a unit that a shift of one bit moves.
    """

    def __init__(self, decisions: SoftDecisions, nats: float):
        self.decisions = decisions
        self.all: list[Ladder] = []
        for (layer, side), width in decisions.widths.items():
            soft = width.soft()
            shifts = tuple(width.switch(small, large) - soft for small, large in pairwise(width.choices))
            self.all.append(Ladder(layer, side, "", tuple(width.choices), shifts))
        for site, margins in decisions.margins.items():
            order, counts = decisions.order[site], tuple(decisions.counts[site])
            last = [order[rounding_point(a, b) - 1] for a, b in pairwise(counts)]
            self.all.append(Ladder("", "", site, counts, tuple(-margins[unit] / nats for unit in last)))

    def positions(self, plan: Plan) -> Positions:
        """The positions of a plan that rounding made."""
        now = [
            sum(plan.kept[ladder.site]) if ladder.site else _bits(plan, ladder.layer, ladder.side)
            for ladder in self.all
        ]
        return [ladder.values.index(value) for ladder, value in zip(self.all, now, strict=True)]

    def plan(self, base: Plan, positions: Positions, changed: Sequence[int]) -> Plan:
        """The plan `base` with the decisions of the ladders `changed` at these positions."""
        layers, kept = dict(base.layers), dict(base.kept)
        for i in set(changed):
            ladder, value = self.all[i], self.all[i].values[positions[i]]
            if ladder.site:
                best = set(self.decisions.order[ladder.site][:value])
                kept[ladder.site] = tuple(unit in best for unit in range(len(kept[ladder.site])))
            else:
                before = layers[ladder.layer]
                new = replace(before, w_bits=value) if ladder.side == "w" else replace(before, a_bits=value)
                layers[ladder.layer] = new
        return replace(base, layers=layers, kept=kept)

    def steps(self, positions: Positions, forward: bool) -> tuple[np.ndarray, np.ndarray]:
        """(shift, ladder) of every single step from these positions: forward by rising shift, back by falling shift."""
        sign = 1 if forward else -1
        parts = [
            (ladder.shifts[p:] if forward else ladder.shifts[:p][::-1])
            for ladder, p in zip(self.all, positions, strict=True)
        ]
        owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        rungs = [np.maximum.accumulate(sign * np.array(part, float)) if part else np.zeros(0) for part in parts]
        key = np.concatenate(rungs) if rungs else np.zeros(0)  # a step never comes before the one that leads to it
        order = np.argsort(key, kind="stable")
        return sign * key[order], owner[order]


def spend(ladders: Ladders, plan: Plan, fits: Fits) -> Plan:
    """The plan after steps that keep more, nearest first, until no single step fits."""
    positions = ladders.positions(plan)
    _, queue = ladders.steps(positions, forward=True)
    size = 1
    while len(queue):
        block = queue[:size].tolist()
        trial = moved(positions, block, 1)
        candidate = ladders.plan(plan, trial, block)
        if fits(candidate):
            positions, plan, queue, size = trial, candidate, queue[size:], 2 * size
        elif len(block) > 1:
            size = len(block) // 2
        else:  # costs only grow: what is too dear now never fits later
            queue = queue[queue != block[0]]
    return plan


def trade(ladders: Ladders, plan: Plan, fits: Fits, is_full: Callable[[Plan], bool]) -> Plan:
    """The plan after one step forward and the steps back that pay for it, where that fills the budget; else the plan.

    The step forward is the nearest one that can be paid for. No step back lies more than `LARGEST_GAP` bits behind it:
    a width that falls from 8 bits to 4 is not worth a few percent of the budget.
    """
    positions = ladders.positions(plan)
    shifts, forward = ladders.steps(positions, forward=True)
    tried = set[int]()
    for shift, ladder in zip(shifts.tolist(), forward.tolist(), strict=True):
        if ladder in tried:
            continue  # only the first step of a decision is a single one
        tried.add(ladder)
        candidate = _paid(ladders, plan, positions, ladder, shift, fits)
        if candidate is not None:
            candidate = spend(ladders, candidate, fits)
            if is_full(candidate):
                return candidate
    return plan


def _paid(ladders: Ladders, plan: Plan, positions: Positions, step: int, shift: float, fits: Fits) -> Plan | None:
    """The plan after a step forward and as few steps back of other decisions, nearest first, as pay for it."""
    shifts, back = ladders.steps(moved(positions, [step], 1), forward=False)
    back = back[(back != step) & (shift - shifts <= LARGEST_GAP)]
    return fewest_steps_back(ladders, plan, positions, step, back.tolist(), fits)


def fewest_steps_back(
    ladders: Ladders, plan: Plan, positions: Positions, step: int, back: Sequence[int], fits: Fits
) -> Plan | None:
    """The plan after a step forward and the first few of these steps back that pay for it; None where all do not."""
    ahead = moved(positions, [step], 1)

    def after(count: int) -> Plan:
        steps = list(back[:count])
        return ladders.plan(plan, moved(ahead, steps, -1), [step, *steps])

    few, enough = 0, 1
    if fits(after(0)):
        return after(0)
    while not fits(after(enough)):
        if enough >= len(back):
            return None
        few, enough = enough, 2 * enough
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if fits(after(middle)) else (middle, enough)
    return after(enough)


def moved(positions: Positions, steps: Sequence[int], by: int) -> Positions:
    """Positions after one step of each of these ladders, in either direction."""
    after = list(positions)
    for ladder in steps:
        after[ladder] += by
    return after


def _bits(plan: Plan, layer: str, side: str) -> int:
    """The width of a layer's weight ("w") or input ("a")."""
    return plan.layers[layer].w_bits if side == "w" else plan.layers[layer].a_bits
