"""Multiple choice under several limits, exactly: one option per group, the least total value, every cost within reach.

    min sum_g v[g, x_g]      such that      sum_g c[g, x_g, t] <= limit_t  for every target t

It is a multiple-choice knapsack with as many rows as there are targets. Groups are added one by one to partial choices,
of which those are dropped that another one beats, that cannot meet the limits any more, or whose Lagrangian bound (at
the prices of the linear relaxation) exceeds the value of a choice that is known: what is left is the best of all (H.
Kellerer, U. Pferschy, D. Pisinger, "Knapsack Problems", 2004, chapter 11). Where too many partial choices are left, it
is solved as an integer linear programme by HiGHS (Q. Huangfu and J. Hall, 2018; `scipy.optimize.milp`).
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

SMALL_SET = 1500  # partial choices up to which every pair is compared, with several targets

BISECTIONS = 60  # of the price of a single target

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
    """The price of a single target, by bisection: the least at which the best options at that price meet it."""
    values, costs = (np.full((len(groups), max(len(g.values) for g in groups)), np.inf) for _ in range(2))
    for i, group in enumerate(groups):
        values[i, : len(group.values)], costs[i, : len(group.values)] = group.values, group.costs[:, 0]
    finite = np.where(np.isfinite(costs), costs, 0.0)
    rows = np.arange(len(groups))

    def cost_at(price: float) -> float:
        return float(costs[rows, (values + price * finite).argmin(1)].sum())

    if float(costs.min(1).sum()) > limit:
        return None
    if cost_at(0.0) <= limit:
        return np.zeros(1)
    spread = float(np.where(np.isfinite(values), values, -np.inf).max() - values.min())
    steps = np.diff(np.unique(finite))
    low, high = 0.0, 2 * spread / float(steps.min()) if len(steps) else 0.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost_at(middle) <= limit else (middle, high)
    return np.array([high])


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
    greedy = _greedy(groups, limits, price)
    known = below if greedy is None else min(below, greedy[0])
    try:
        better = _best_below(groups, limits, price, known)
    except _TooManyStatesError:
        return _by_integer_programme(groups, limits, below)
    if better is not None:
        return better
    return greedy[1] if greedy is not None and greedy[0] < below else None


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


def _best_below(groups: Sequence[Group], limits: Floats, price: Floats, known: float) -> list[int] | None:
    """The best choice of a value less than `known`, by partial choices with bounds; None where there is none.

    Raises _TooManyStatesError.
    """
    least_cost = np.array([group.costs.min(0) for group in groups])
    least_priced = np.array([(group.values + group.costs @ price).min() for group in groups])
    rest_cost = np.vstack([np.cumsum(least_cost[::-1], 0)[::-1][1:], np.zeros(len(limits))])
    rest_priced = np.append(np.cumsum(least_priced[::-1])[::-1][1:], 0.0)
    worth = float(price @ limits)
    values, costs = np.zeros(1), np.zeros((1, len(limits)))
    history: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []  # (state before, option) of every state
    for g, group in enumerate(groups):
        new_values = (values[:, None] + group.values).ravel()
        new_costs = (costs[:, None] + group.costs).reshape(-1, len(limits))
        bound = new_values + new_costs @ price + rest_priced[g] - worth
        slack = 1e-12 * (abs(known) + worth) if math.isfinite(known) else 0.0
        alive = np.flatnonzero((bound < known + slack) & (new_costs + rest_cost[g] <= limits).all(1))
        if not len(alive):
            return None
        alive = alive[_unbeaten(new_values[alive], new_costs[alive])]
        if len(alive) > MOST_STATES:
            raise _TooManyStatesError
        history.append((alive // len(group.values), alive % len(group.values)))
        values, costs = new_values[alive], new_costs[alive]
    state = int(values.argmin())
    if values[state] >= known:
        return None
    picks = []
    for before, option in reversed(history):
        picks.append(int(option[state]))
        state = int(before[state])
    return picks[::-1]


def _unbeaten(values: Floats, costs: Floats) -> npt.NDArray[np.int64]:
    """The states that none with lower costs beats in value; with several targets, of those of equal order only."""
    order = np.lexsort((values, *costs.T[::-1]))
    if costs.shape[1] == 1:
        best = np.minimum.accumulate(values[order])
        first = np.r_[True, values[order][1:] < best[:-1]]
        return np.sort(order[first])
    if len(order) > SMALL_SET:
        return np.sort(order)
    table = np.column_stack([values, costs])[order]
    beaten = np.triu((table[:, None] <= table[None]).all(2), 1).any(0)
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
