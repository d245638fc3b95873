"""Pareto dominance, hypervolume and knee of a set of points.

Points are `[n, d]`, smaller is better in every column: callers negate accuracy and take logarithms of costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jpq.types import JpqError

Points = npt.NDArray[np.float64]  # [n, d]


def to_objectives(accuracy: Sequence[float], *shares: Sequence[float]) -> Points:
    """Points `[n, 1 + costs]` to minimise: negated accuracy, and the decimal logarithm of each cost.

    Costs are shares of the fp32 model's. Budgets differ by factors, so a decade counts the same wherever it lies.
    Raises JpqError where a cost is not above 0.
    """
    costs = np.array(shares, float).reshape(len(shares), len(accuracy))
    if (costs <= 0).any() or not np.isfinite(costs).all() or not np.isfinite(np.array(accuracy, float)).all():
        raise JpqError("A front needs finite accuracies, and costs above 0.")
    return np.column_stack([-np.array(accuracy, float), *np.log10(costs)])


def non_dominated(points: Any) -> npt.NDArray[np.bool_]:
    """Mask `[n]` of the points that no other dominates: as good in every column and better in one.

    Of equal points all or none are dominated.

    Source: Pareto dominance as in Zitzler et al., "Performance assessment of multiobjective optimizers", IEEE TEC 2003.
    """
    p = _points(points)
    no_worse = np.all(p[:, None] <= p[None], axis=2)
    better = np.any(p[:, None] < p[None], axis=2)
    return np.asarray(~np.any(no_worse & better, axis=0))


def hypervolume(points: Any, reference: Sequence[float]) -> float:
    """Exact area (two columns) or volume (three) that the points dominate up to `reference`.

    Points beyond the reference add nothing. A volume is the sum of areas, slab by slab along the last column.
    Source: Zitzler & Thiele, "Multiobjective optimization using evolutionary algorithms", PPSN 1998.
    """
    p, edge = _points(points), np.array(reference, float)
    if p.shape[1] != len(edge) or len(edge) not in (2, 3):
        raise JpqError(f"The reference has {len(edge)} coordinates, the points {p.shape[1]}; both need 2 or 3.")
    inside = p[(p < edge).all(1)]
    inside = inside[np.argsort(inside[:, -1], kind="stable")]
    if len(edge) == 2:
        return _dominated_area(inside, edge)
    thickness = np.diff(np.append(inside[:, 2], edge[2]))
    return float(sum(h * _dominated_area(inside[: i + 1, :2], edge[:2]) for i, h in enumerate(thickness) if h > 0))


def _dominated_area(points: Points, edge: npt.NDArray[np.float64]) -> float:
    """Area under a staircase: `[n, 2]` points inside the corner `edge`."""
    ordered = points[np.argsort(points[:, 1], kind="stable")]
    best = np.minimum.accumulate(ordered[:, 0])
    return float(((edge[0] - best) * np.diff(np.append(ordered[:, 1], edge[1]))).sum())


def hypervolume_of(accuracy: Sequence[float], *shares: Sequence[float], chance: float = 0.0) -> float:
    """Hypervolume in accuracy x decades of each cost, from chance level and the fp32 model's costs.

    0.9 at a hundredth of the fp32 cost alone covers (0.9 - chance) * 2. The reference does not depend on the points, so
    fronts of the same model and data may be compared; what is no better than chance, or dearer than the fp32 model,
    counts nothing. Neither corner is any run's own result.
    """
    return hypervolume(to_objectives(accuracy, *shares), [-chance, *(0.0,) * len(shares)])


def find_knee(accuracy: Sequence[float], share: Sequence[float]) -> int | None:
    """Index of the knee: the point farthest above the chord from the cheapest to the most accurate one.

    Cost is taken in logs, and both axes are scaled to [0, 1] over the front, so the distance is to the line y = x. None
    where fewer than three points are non-dominated, or none lies above the chord.
    Source: Das, "On characterizing the 'knee' of the Pareto curve", Structural Optimization 1999; Satopää et al.,
    "Finding a 'kneedle' in a haystack", ICDCSW 2011 (the largest difference of the normalised curve and the diagonal).
    """
    p = to_objectives(accuracy, share)
    index = np.flatnonzero(non_dominated(p))
    front = p[index]
    low, high = front.min(0), front.max(0)
    if len(np.unique(front, axis=0)) < 3:
        return None
    quality, cost = ((front - low) / (high - low)).T
    above = (1 - quality) - cost
    farthest = int(above.argmax())
    return int(index[farthest]) if above[farthest] > 1e-12 else None


def _points(points: Any) -> Points:
    p = np.asarray(points, float)
    if p.ndim != 2 or not p.shape[1] or np.isnan(p).any():
        raise JpqError(f"Points are numbers in rows of one length; these have shape {p.shape}.")
    return p
