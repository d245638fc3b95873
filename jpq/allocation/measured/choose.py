"""Multiple choice under several limits, exactly: one option per group, the least total value, every cost within reach.

    min sum_g v[g, x_g]      such that      sum_g c[g, x_g, t] <= limit_t  for every target t

It is a multiple-choice knapsack with as many rows as there are targets. Groups are added one by one to partial choices,
of which those are dropped that another one beats, that cannot meet the limits any more, or whose Lagrangian bound (at
the prices of the linear relaxation) exceeds the value of a choice that is known: what is left is the best of all (H.
Kellerer, U. Pferschy, D. Pisinger, "Knapsack Problems", 2004, chapter 11). Good choices become known by following a few
partial ones only, at first. Where too many partial choices are left, it is solved as an integer linear programme by
HiGHS (Q. Huangfu and J. Hall, 2018; `scipy.optimize.milp`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, vstack

from jpq.types import JpqError

Floats = npt.NDArray[np.float64]

TIGHTEN = (0.0, 1e-12, 1e-9, 1e-6)  # shares taken from the limits until no cost exceeds one by rounding

MOST_STATES = 20_000  # partial choices, beyond which an integer programme is solved instead

BEAMS = (300, 3000, None)  # partial choices that are followed; None: all

NEAREST = 16  # partial choices that one is compared with, where there are several targets

SECONDS = 60.0  # of one exact solution; the best one so far is given after that


@dataclass(frozen=True, eq=False)
class Group:
    """The options of one decision."""

    values: Floats  # [options]: what is minimised, finite
    costs: Floats  # [options, targets]: non-negative


def choose(groups: Sequence[Group], limits: Sequence[float], below: float = math.inf) -> list[int] | None:
    """The option of each group whose total value is least; None where no choice meets every limit.

    Args:
        groups: each with at least one option, and costs in the units of `limits`.
        limits: one per target, positive.
        below: only choices of a smaller total value are of interest; None where there are none.
    """
    if not groups:
        return [] if all(limit >= 0 for limit in limits) and below > 0 else None
    kept = [undominated(group) for group in groups]
    parts = [_part(g, k) for g, k in zip(groups, kept, strict=True)]
    for share in TIGHTEN:
        picked = _solve(parts, np.asarray(limits, float) * (1 - share), below)
        if picked is None:
            return None
        choice = [int(k[p]) for k, p in zip(kept, picked, strict=True)]
        if all(total <= limit for total, limit in zip(total_costs(groups, choice), limits, strict=True)):
            return choice
    return None


def total_costs(groups: Sequence[Group], choice: Sequence[int]) -> list[float]:
    """The cost of a choice, per target."""
    rows = [group.costs[i] for group, i in zip(groups, choice, strict=True)]
    return [float(total) for total in np.sum(rows, axis=0)]


def prices(groups: Sequence[Group], limits: Sequence[float]) -> Floats:
    """The value that one unit of each limit is worth, [targets], from the linear relaxation; 0 where a limit is slack.

    Raises JpqError where not even fractions of options meet the limits.
    """
    if len(limits) > 1:  # for the programme; options that others beat change no single price
        groups = [_part(group, undominated(group)) for group in groups]
    found = _prices(groups, np.asarray(limits, float))
    if found is None:
        raise JpqError("No choice of bits and channels meets the targets.")
    return found


def _prices(groups: Sequence[Group], limits: Floats) -> Floats | None:
    """The prices of options that no other one beats; None where the linear relaxation has no solution."""
    if not groups:
        return np.zeros(len(limits)) if (limits >= 0).all() else None
    if len(limits) == 1:
        return _single_price(groups, float(limits[0]))
    values, matrix, picks = _programme(groups, limits)
    result = linprog(
        values,
        A_ub=matrix,
        b_ub=np.ones(len(limits)),
        A_eq=picks,
        b_eq=np.ones(len(groups)),
        bounds=(0, 1),
        method="highs",
    )
    return np.maximum(0.0, -result.ineqlin.marginals / limits) if result.status == 0 else None


def _single_price(groups: Sequence[Group], limit: float) -> Floats | None:
    """The price of a single target: the gain per cost of the step that meets the limit, all larger gains taken before.

    Steps lie along each group's lower convex hull of values over costs, as in Kellerer, Pferschy and Pisinger, 11.2.1.
    """
    gains, steps, least = [], [], 0.0
    for group in groups:
        hull = _lower_hull(group.costs[:, 0], group.values)
        costs, values = group.costs[hull, 0], group.values[hull]
        least += float(costs[0])
        steps.append(np.diff(costs))
        gains.append(-np.diff(values) / steps[-1])
    if least > limit:
        return None
    gain, step = np.concatenate(gains), np.concatenate(steps)
    order = np.argsort(-gain, kind="stable")
    too_much = np.flatnonzero(least + np.cumsum(step[order]) > limit)
    return gain[order[too_much[:1]]] if len(too_much) else np.zeros(1)


def _lower_hull(costs: Floats, values: Floats) -> list[int]:
    """The corners of the lower convex hull of values over costs, from the least cost to the least value."""
    hull: list[int] = []
    for i in np.lexsort((values, costs)).tolist():
        if hull and values[i] >= values[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            if (values[a] - values[b]) * (costs[i] - costs[b]) > (values[b] - values[i]) * (costs[b] - costs[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def _part(group: Group, options: npt.NDArray[np.int64]) -> Group:
    return Group(group.values[options], group.costs[options])


def undominated(group: Group) -> npt.NDArray[np.int64]:
    """The options that no other one beats or equals in value and in every cost, ascending."""
    table = np.column_stack([group.values, group.costs])
    order = np.lexsort(table.T[::-1])
    table = table[order]
    beats = (table[:, None] <= table[None]).all(2)  # [by, of]
    beaten = np.triu(beats, 1).any(0)
    return np.sort(order[~beaten])


def _programme(groups: Sequence[Group], limits: Sequence[float] | Floats) -> tuple[Floats, csr_array, csr_array]:
    """Values, costs as shares of the limits, and the rows that say "one option of each group"."""
    values = np.concatenate([group.values for group in groups])
    shares = np.concatenate([group.costs for group in groups]) / np.asarray(limits, float)
    owner = np.repeat(np.arange(len(groups)), [len(group.values) for group in groups])
    picks = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(groups), len(owner)))
    return values, csr_array(shares.T), picks


def _solve(groups: Sequence[Group], limits: Floats, below: float) -> list[int] | None:
    """The best option of each group within the limits, of total value less than `below`."""
    price = _prices(groups, limits)
    if price is None:
        return None
    found = _greedy(groups, limits, price)
    value = below if found is None else min(below, found[0])
    for width in BEAMS:  # a better known choice leaves fewer partial ones
        try:
            better, complete = _best_below(groups, limits, price, value, width)
        except _TooManyStatesError:
            better_picks = _by_integer_programme(groups, limits, value)
            if better_picks is not None:
                return better_picks
            break
        if better is not None:
            value, found = better[0], better
        if complete:
            break
    return found[1] if found is not None and found[0] < below else None


class _TooManyStatesError(Exception):
    """More partial choices are left than memory should hold."""


def _greedy(groups: Sequence[Group], limits: Floats, price: Floats) -> tuple[float, list[int]] | None:
    """(value, options) of a good choice: the best at these prices, cheaper where that is too dear, then filled up."""
    priced = [group.values + group.costs @ price for group in groups]
    picks = [int(p.argmin()) for p in priced]
    used = np.sum([group.costs[i] for group, i in zip(groups, picks, strict=True)], axis=0)
    while (used > limits).any():
        over = used > limits
        moves = [
            (float(priced[g][j] - priced[g][picks[g]]), g, j)
            for g, group in enumerate(groups)
            for j in range(len(group.values))
            if (group.costs[j] <= group.costs[picks[g]]).all() and (group.costs[j] < group.costs[picks[g]])[over].any()
        ]
        if not moves:
            return None
        _, g, j = min(moves)
        used, picks[g] = used + groups[g].costs[j] - groups[g].costs[picks[g]], j
    while True:
        moves = [
            (float(group.values[j] - group.values[picks[g]]), g, j)
            for g, group in enumerate(groups)
            for j in range(len(group.values))
            if group.values[j] < group.values[picks[g]]
            and (used + group.costs[j] - group.costs[picks[g]] <= limits).all()
        ]
        if not moves:
            break
        _, g, j = min(moves)
        used, picks[g] = used + groups[g].costs[j] - groups[g].costs[picks[g]], j
    return float(sum(group.values[i] for group, i in zip(groups, picks, strict=True))), picks


def _best_below(
    groups: Sequence[Group], limits: Floats, price: Floats, known: float, width: int | None
) -> tuple[tuple[float, list[int]] | None, bool]:
    """The best choice of a value less than `known`, by partial choices with bounds; and whether all were followed.

    With `width` only so many partial choices are followed, those of the lowest bound: a good choice, soon. Without, all
    are; raises _TooManyStatesError. The choice is (value, options), None where there is none.
    """
    worth = float(price @ limits)
    slack = 1e-12 * (abs(known) + worth) if math.isfinite(known) else 0.0
    regrets = []  # of each option over the best one of its group, at these prices
    for group in groups:
        priced = group.values + group.costs @ price
        regrets.append(priced - priced.min())
    room = known + slack - float(sum((g.values + g.costs @ price).min() for g in groups)) + worth
    options = [np.flatnonzero(regret < room) for regret in regrets]
    if not all(map(len, options)):
        return None, True
    complete = True
    least_cost = np.array([group.costs[o].min(0) for group, o in zip(groups, options, strict=True)])
    rest_cost = np.vstack([np.cumsum(least_cost[::-1], 0)[::-1][1:], np.zeros(len(limits))])
    values, costs, lost = np.zeros(1), np.zeros((1, len(limits))), np.zeros(1)
    history: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []  # (state before, option) of every state
    for g, (group, few, regret) in enumerate(zip(groups, options, regrets, strict=True)):
        new_lost = (lost[:, None] + regret[few]).ravel()
        new_costs = (costs[:, None] + group.costs[few]).reshape(-1, len(limits))
        alive = np.flatnonzero((new_lost < room) & (new_costs + rest_cost[g] <= limits).all(1))
        if not len(alive):
            return None, complete
        new_values = (values[:, None] + group.values[few]).ravel()
        alive = alive[_unbeaten(new_values[alive], new_costs[alive])]
        if width is not None and len(alive) > width:
            alive = np.sort(alive[np.argpartition(new_lost[alive], width)[:width]])
            complete = False
        if len(alive) > MOST_STATES:
            raise _TooManyStatesError
        history.append((alive // len(few), few[alive % len(few)]))
        values, costs, lost = new_values[alive], new_costs[alive], new_lost[alive]
    state = int(values.argmin())
    value = float(values[state])
    if value >= known:
        return None, complete
    picks = []
    for before, option in reversed(history):
        picks.append(int(option[state]))
        state = int(before[state])
    return (value, picks[::-1]), complete


def _unbeaten(values: Floats, costs: Floats) -> npt.NDArray[np.int64]:
    """The states that none with lower costs beats in value; with several targets, none of the nearest ones."""
    order = np.lexsort((values, *costs.T[::-1]))
    if costs.shape[1] == 1:
        best = np.minimum.accumulate(values[order])
        first = np.r_[True, values[order][1:] < best[:-1]]
        return np.sort(order[first])
    columns = [values[order], *costs[order].T]
    beaten = np.zeros(len(order), bool)
    for step in range(1, min(NEAREST, len(order) - 1) + 1):
        beaten[step:] |= np.logical_and.reduce([column[:-step] <= column[step:] for column in columns])
    return np.sort(order[~beaten])


def _by_integer_programme(groups: Sequence[Group], limits: Floats, below: float) -> list[int] | None:
    """The best option of each group within the limits, by HiGHS."""
    values, shares, picks = _programme(groups, limits)
    largest = float(np.abs(values).max()) or 1.0
    rows = vstack([shares, picks], format="csr")
    low = np.concatenate([np.full(len(limits), -np.inf), np.ones(len(groups))])
    high = np.ones(len(limits) + len(groups))
    result = milp(
        values / largest,
        integrality=np.ones(len(values)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(rows, low, high),
        options={"mip_rel_gap": 0.0, "time_limit": SECONDS, "presolve": False},
    )
    if result.x is None:
        return None
    starts = np.cumsum([0, *(len(group.values) for group in groups)])
    chosen = [int(np.argmax(result.x[a:b])) for a, b in pairwise(starts)]
    value = sum(float(group.values[i]) for group, i in zip(groups, chosen, strict=True))
    return chosen if value < below else None
