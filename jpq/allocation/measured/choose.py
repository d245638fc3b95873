"""Multiple choice under several limits, exactly: one option per group, the least total value, every cost within reach.

    min sum_g v[g, x_g]      such that      sum_g c[g, x_g, t] <= limit_t  for every target t

It is a multiple-choice knapsack with as many rows as there are targets, solved as an integer linear programme by HiGHS
(Q. Huangfu and J. Hall, 2018; `scipy.optimize.milp`), after options that another one beats everywhere are left out.
"""

from __future__ import annotations

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

SECONDS = 60.0  # of one exact solution; the best one so far is given after that


@dataclass(frozen=True, eq=False)
class Group:
    """The options of one decision."""

    values: Floats  # [options]: what is minimised, finite
    costs: Floats  # [options, targets]: non-negative


def choose(groups: Sequence[Group], limits: Sequence[float]) -> list[int] | None:
    """The option of each group whose total value is least; None where no choice meets every limit.

    Args:
        groups: each with at least one option, and costs in the units of `limits`.
        limits: one per target, positive.
    """
    if not groups:
        return [] if all(limit >= 0 for limit in limits) else None
    kept = [_undominated(group) for group in groups]
    for share in TIGHTEN:
        picked = _solve([_part(g, k) for g, k in zip(groups, kept, strict=True)], limits, 1 - share)
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
    kept = [_part(group, _undominated(group)) for group in groups]
    values, matrix, picks = _programme(kept, limits)
    result = linprog(
        values,
        A_ub=matrix,
        b_ub=np.ones(len(limits)),
        A_eq=picks,
        b_eq=np.ones(len(kept)),
        bounds=(0, 1),
        method="highs",
    )
    if result.status != 0:
        raise JpqError("No choice of bits and channels meets the targets.")
    return np.asarray(-result.ineqlin.marginals / np.asarray(limits, float))


def _part(group: Group, options: npt.NDArray[np.int64]) -> Group:
    return Group(group.values[options], group.costs[options])


def _undominated(group: Group) -> npt.NDArray[np.int64]:
    """The options that no other one beats or equals in value and in every cost."""
    table = np.column_stack([group.values, group.costs])
    order = np.lexsort(table.T[::-1])
    best: list[int] = []
    for i in order:
        if not any((table[j] <= table[i]).all() for j in best):
            best.append(int(i))
    return np.sort(np.array(best, np.int64))


def _programme(groups: Sequence[Group], limits: Sequence[float]) -> tuple[Floats, csr_array, csr_array]:
    """Values, costs as shares of the limits, and the rows that say "one option of each group"."""
    values = np.concatenate([group.values for group in groups])
    shares = np.concatenate([group.costs for group in groups]) / np.asarray(limits, float)
    owner = np.repeat(np.arange(len(groups)), [len(group.values) for group in groups])
    picks = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(groups), len(owner)))
    return values, csr_array(shares.T), picks


def _solve(groups: Sequence[Group], limits: Sequence[float], reach: float) -> list[int] | None:
    """The best option of each group whose costs stay within `reach` times the limits."""
    values, shares, picks = _programme(groups, limits)
    largest = float(np.abs(values).max()) or 1.0
    rows = vstack([shares, picks], format="csr")
    low = np.concatenate([np.full(len(limits), -np.inf), np.ones(len(groups))])
    high = np.concatenate([np.full(len(limits), reach), np.ones(len(groups))])
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
    return [int(np.argmax(result.x[a:b])) for a, b in pairwise(starts)]
