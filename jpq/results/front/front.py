"""`Front`: the non-dominated runs of one task, as objects, as a pandas DataFrame and as pareto.csv."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jpq.costs import COSTS
from jpq.costs.latency import NS
from jpq.files.atomic import replace_file
from jpq.results.front import pareto
from jpq.results.front.points import RunPoint, read_points
from jpq.tasks.base import Task
from jpq.types import JpqError, unknown

MAX_COSTS = 2  # largest number of costs of a front, beside the metric

KEPT_COLUMNS = ("number", "test_accuracy", "packed_bytes", "latency_ms", "folder")  # kept even where empty


@dataclass(frozen=True)
class Front:
    """Runs of one task, and those that no other dominates in held-out metric and each of `costs`."""

    points: tuple[RunPoint, ...]
    costs: tuple[str, ...]  # names in COSTS; the front is ordered by the first
    front_indices: tuple[int, ...]  # of the non-dominated points, from the cheapest on
    hypervolume: float  # metric x decades of each cost (`pareto.hypervolume_of`)
    knee: int | None  # index of a point, by metric and the first cost

    @property
    def front_points(self) -> tuple[RunPoint, ...]:
        """The non-dominated points, from the cheapest on."""
        return tuple(self.points[i] for i in self.front_indices)

    @property
    def full_costs(self) -> dict[str, float]:
        """Costs of the fp32 model that some run knows; latency is known to runs with a table of measured layers."""
        return {cost: float(amount) for p in reversed(self.points) for cost, amount in p.full_costs.items()}

    @property
    def task(self) -> Task:
        """The task of the runs; its score stands in their `accuracy`."""
        return self.points[0].metric

    def number(self, i: int) -> int | None:
        """Number of a point in tables and pictures: 1 for the cheapest of the front, None off the front."""
        return self.front_indices.index(i) + 1 if i in self.front_indices else None


def build_front(points: Sequence[RunPoint], costs: Sequence[str] = ("bops",)) -> Front:
    """The front of some runs. Raises JpqError for unknown costs, and where no run knows them."""
    costs = tuple(dict.fromkeys(costs))
    for cost in costs:
        if cost not in COSTS:
            raise unknown("cost", cost, COSTS)
    if not 1 <= len(costs) <= MAX_COSTS:
        raise JpqError(f"A front has held-out accuracy and one or two costs; {len(costs)} were named.")
    points = tuple(p for p in points if has_costs(p, costs))
    if not points:
        table = " Runs know it where they had a --latency-table." if "latency" in costs else ""
        raise JpqError(f"No run says what it costs in {' and '.join(costs)}.{table}")
    if "latency" in costs:
        check_one_table(points)
    metric = [p.accuracy for p in points]
    shares = [[p.share(cost) for p in points] for cost in costs]
    indices = np.flatnonzero(pareto.non_dominated(pareto.to_objectives(metric, *shares))).tolist()
    indices.sort(key=lambda i: (*(share[i] for share in shares), metric[i]))
    bend = pareto.find_knee([metric[i] for i in indices], [shares[0][i] for i in indices])
    knee = None if bend is None else indices[bend]
    return Front(points, costs, tuple(indices), front_hypervolume(points, costs), knee)


def has_costs(point: RunPoint, costs: Sequence[str]) -> bool:
    """Whether a run knows these costs of its model and of the fp32 model."""
    return all(cost in point.costs and cost in point.full_costs for cost in costs)


def front_hypervolume(points: Sequence[RunPoint], costs: Sequence[str]) -> float:
    """Hypervolume of some runs, in metric x decades of each cost (`pareto.hypervolume_of`)."""
    shares = [[p.share(cost) for p in points] for cost in costs]
    return pareto.hypervolume_of([p.accuracy for p in points], *shares, chance=max(p.chance for p in points))


def hypervolume_by_method(front: Front) -> dict[str, tuple[float, int]]:
    """Method -> (hypervolume of its runs alone, their number), the largest first."""
    groups: dict[str, list[RunPoint]] = {}
    for p in front.points:
        groups.setdefault(str(p.decisions.get("method") or "?"), []).append(p)
    volumes = {method: (front_hypervolume(points, front.costs), len(points)) for method, points in groups.items()}
    return dict(sorted(volumes.items(), key=lambda item: -item[1][0]))


def check_one_table(points: Sequence[RunPoint]) -> None:
    """Raises JpqError where latencies were predicted from several tables: they cannot be compared."""
    known = [p for p in points if "latency" in p.costs and "latency" in p.full_costs]
    for p in known[1:]:
        if not math.isclose(p.full_costs["latency"], known[0].full_costs["latency"], rel_tol=1e-6):
            raise JpqError(
                f"{known[0].name} and {p.name} had different tables of latencies (the fp32 model takes "
                f"{known[0].full_costs['latency'] / NS:#.3g} and {p.full_costs['latency'] / NS:#.3g} ms). "
                "Name runs of one table."
            )


def missing_cost_messages(points: Sequence[RunPoint], costs: Sequence[str]) -> list[str]:
    """A sentence for each run that a front of these costs leaves out."""
    return [
        f"{p.name}: it does not say what it costs in {' and '.join(costs)}." for p in points if not has_costs(p, costs)
    ]


def front(source: Any, costs: Sequence[str] = ("bops",), folder: Path | str | None = None) -> pd.DataFrame:
    """Runs as a DataFrame, a row each, the front first: metrics, costs, decisions, and whether a run is on the front.

    `frame.attrs` has the `hypervolume`, the `knee` (a run's name or None) and the `float` model's figures.

    Args:
        source: a folder (of a run, of a study, or one that holds several), several folders, or an Optuna study.
        costs: what counts beside held-out accuracy: one or two names in `jpq.costs.COSTS`.
        folder: of an Optuna study: without it rows have what its trials noted there (BOPs, size, layers, no full costs
            but BOPs); to have all of it give the folder instead of the study, or both.

    Runs that cannot be read are left out with a warning. Raises JpqError where none is left, and for runs of several
    models or data sets.
    """
    collection = read_points(source, folder)
    for message in (*collection.skipped, *missing_cost_messages(collection.points, costs)):
        warnings.warn(f"Left out: {message}", stacklevel=2)
    return to_dataframe(build_front(collection.points, costs))


def to_dataframe(front: Front) -> pd.DataFrame:
    """A row per run: the front from the cheapest on, then the dominated runs by cost."""
    dominated = set(range(len(front.points))) - set(front.front_indices)
    dominated_indices = sorted(dominated, key=lambda i: front.points[i].costs[front.costs[0]])
    frame = pd.DataFrame([_row(front, i) for i in (*front.front_indices, *dominated_indices)])
    frame["number"] = frame["number"].astype("Int64")
    frame = frame.drop(columns=[c for c in frame if c not in KEPT_COLUMNS and frame[c].isna().all()])
    frame.attrs = {
        "hypervolume": front.hypervolume,
        "knee": None if front.knee is None else front.points[front.knee].name,
        "float": {"accuracy": float_accuracy(front), **front.full_costs},
    }
    return frame


def float_accuracy(front: Front) -> float | None:
    """Held-out accuracy of the float models that the runs began with: their mean."""
    known = [p.float_accuracy for p in front.points if p.float_accuracy is not None]
    return sum(known) / len(known) if known else None


def _row(front: Front, i: int) -> dict[str, Any]:
    """Cells of one run, by column."""
    p = front.points[i]
    layers: dict[str, Any] = {}
    for layer in p.layers:
        for what in ("w_bits", "a_bits", "density"):
            layers[f"{layer.name}: {what}"] = getattr(layer, what)
    latency = p.costs.get("latency")
    return {
        "name": p.name,
        "number": front.number(i),
        "front": i in front.front_indices,
        "accuracy": p.accuracy,
        "test_accuracy": p.test_accuracy,
        "float_accuracy": p.float_accuracy,
        "bops_share": p.share("bops"),
        "bops": int(p.costs["bops"]),
        "bops_structured": _as_int(p.costs.get("bops-structured")),
        "macs": int(p.costs["macs"]),
        "size_bytes": int(p.costs["size"]),
        "packed_bytes": p.packed_bytes,
        "latency_ms": None if latency is None else latency / NS,
        "model": p.model,
        "data": p.data,
        **p.decisions,
        **layers,
        "final": p.final,
        "folder": None if p.folder is None else str(p.folder),
    }


def _as_int(number: float | None) -> int | None:
    return None if number is None else int(number)


def write_table(front: Front, folder: Path) -> Path:
    """Write pareto.csv, atomically."""
    path = folder / "pareto.csv"
    replace_file(path, lambda part: to_dataframe(front).to_csv(part, index=False))
    return path
