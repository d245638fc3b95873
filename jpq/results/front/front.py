"""Runs as a front: what no other run beats, as objects and as a pandas DataFrame."""

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
from jpq.results.front.points import RunPoint, read
from jpq.tasks import pick_task
from jpq.tasks.base import Task
from jpq.types import JpqError, unknown

MOST = 2  # costs beside accuracy

ALWAYS = ("number", "test_accuracy", "packed_bytes", "latency_ms", "folder")  # columns that are there though empty


@dataclass(frozen=True)
class Front:
    """Points of one task, and which of them nothing beats in held-out accuracy and in each of `costs`."""

    points: tuple[RunPoint, ...]
    costs: tuple[str, ...]  # names in COSTS; the first is what the front is ordered by
    best: tuple[int, ...]  # places in `points`, from the cheapest on
    covered: float  # hypervolume, accuracy x decades of each cost (`pareto.covered`)
    knee: int | None  # place in `points`, by accuracy and the first cost

    @property
    def line(self) -> tuple[RunPoint, ...]:
        """The non-dominated points, from the cheapest on."""
        return tuple(self.points[i] for i in self.best)

    @property
    def full(self) -> dict[str, float]:
        """Costs of the fp32 model, as far as any run knows them: one without a table of latencies leaves those out."""
        return {cost: float(amount) for p in reversed(self.points) for cost, amount in p.full.items()}

    @property
    def task(self) -> Task:
        """The task of the runs; its metric is what their accuracies are."""
        return pick_task(self.points[0].task)

    def number(self, i: int) -> int | None:
        """What a table and a picture call this point: 1 for the cheapest of the front."""
        return self.best.index(i) + 1 if i in self.best else None


def make(points: Sequence[RunPoint], costs: Sequence[str] = ("bops",)) -> Front:
    """The front of these points. Raises JpqError for unknown costs, and where no point knows one."""
    costs = tuple(dict.fromkeys(costs))
    for cost in costs:
        if cost not in COSTS:
            raise unknown("cost", cost, COSTS)
    if not 1 <= len(costs) <= MOST:
        raise JpqError(f"A front has held-out accuracy and one or two costs; {len(costs)} were named.")
    points = tuple(p for p in points if has_costs(p, costs))
    if not points:
        table = " Runs know it where they had a --latency-table." if "latency" in costs else ""
        raise JpqError(f"No run says what it costs in {' and '.join(costs)}.{table}")
    if "latency" in costs:
        require_one_table(points)
    accuracy = [p.accuracy for p in points]
    shares = [[p.share(cost) for p in points] for cost in costs]
    on = np.flatnonzero(pareto.non_dominated(pareto.frame(accuracy, *shares))).tolist()
    best = sorted(on, key=lambda i: (*(share[i] for share in shares), accuracy[i]))
    bend = pareto.knee([accuracy[i] for i in best], [shares[0][i] for i in best])
    return Front(points, costs, tuple(best), front_hypervolume(points, costs), None if bend is None else best[bend])


def has_costs(point: RunPoint, costs: Sequence[str]) -> bool:
    """Whether a run says what it costs there."""
    return all(cost in point.costs and cost in point.full for cost in costs)


def front_hypervolume(points: Sequence[RunPoint], costs: Sequence[str]) -> float:
    """Hypervolume of these points, in accuracy x decades of each cost (`pareto.covered`)."""
    shares = [[p.share(cost) for p in points] for cost in costs]
    return pareto.hypervolume_of([p.accuracy for p in points], *shares, chance=max(p.chance for p in points))


def by_method(made: Front) -> dict[str, tuple[float, int]]:
    """Hypervolume of each method's runs alone, and how many they are; the largest first."""
    groups: dict[str, list[RunPoint]] = {}
    for p in made.points:
        groups.setdefault(str(p.decisions.get("method") or "?"), []).append(p)
    found = {method: (front_hypervolume(points, made.costs), len(points)) for method, points in groups.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def require_one_table(points: Sequence[RunPoint]) -> None:
    """Raises JpqError where latencies were predicted from several tables: they cannot be compared."""
    known = [p for p in points if "latency" in p.costs and "latency" in p.full]
    for p in known[1:]:
        if not math.isclose(p.full["latency"], known[0].full["latency"], rel_tol=1e-6):
            raise JpqError(
                f"{known[0].name} and {p.name} had different tables of latencies (the fp32 model takes "
                f"{known[0].full['latency'] / NS:#.3g} and {p.full['latency'] / NS:#.3g} ms). Name runs of one table."
            )


def missing_cost_messages(points: Sequence[RunPoint], costs: Sequence[str]) -> list[str]:
    """A sentence for each run that a front of these costs leaves out."""
    return [
        f"{p.name}: it does not say what it costs in {' and '.join(costs)}." for p in points if not has_costs(p, costs)
    ]


def front(source: Any, costs: Sequence[str] = ("bops",), folder: Path | str | None = None) -> pd.DataFrame:
    """Runs as a DataFrame, a row each, the front first: accuracies, costs, every decision, and whether a run beats it.

    `frame.attrs` has the `hypervolume`, the `knee` (a run's name or None) and the `float` model's figures.

    Args:
        source: a folder (of a run, of a study, or one that holds several), several folders, or an Optuna study.
        costs: what counts beside held-out accuracy: one or two names in `jpq.costs.COSTS`.
        folder: of an Optuna study: without it rows have what its trials noted there (BOPs, size, layers, no full costs
            but BOPs); to have all of it give the folder instead of the study, or both.

    Runs that cannot be read are left out with a warning. Raises JpqError where none is left, and for runs of several
    models or data sets.
    """
    found = read(source, folder)
    made = make(found.points, costs)
    for line in (*found.skipped, *missing_cost_messages(found.points, costs)):
        warnings.warn(f"Left out: {line}", stacklevel=2)
    return frame(made)


def frame(made: Front) -> pd.DataFrame:
    """A row per point: the front from the cheapest on, then the others by cost."""
    others = sorted(set(range(len(made.points))) - set(made.best), key=lambda i: made.points[i].costs[made.costs[0]])
    table = pd.DataFrame([_row(made, i) for i in (*made.best, *others)])
    table["number"] = table["number"].astype("Int64")
    table = table.drop(columns=[c for c in table if c not in ALWAYS and table[c].isna().all()])
    table.attrs = {
        "hypervolume": made.covered,
        "knee": None if made.knee is None else made.points[made.knee].name,
        "float": {"accuracy": float_accuracy(made), **made.full},
    }
    return table


def float_accuracy(made: Front) -> float | None:
    """Held-out accuracy of the float models that the runs began with: their mean."""
    known = [p.float_accuracy for p in made.points if p.float_accuracy is not None]
    return sum(known) / len(known) if known else None


def _row(made: Front, i: int) -> dict[str, Any]:
    p = made.points[i]
    layers: dict[str, Any] = {}
    for layer in p.layers:
        for what in ("w_bits", "a_bits", "density"):
            layers[f"{layer.name}: {what}"] = getattr(layer, what)
    latency = p.costs.get("latency")
    return {
        "name": p.name,
        "number": made.number(i),
        "front": i in made.best,
        "accuracy": p.accuracy,
        "test_accuracy": p.test_accuracy,
        "float_accuracy": p.float_accuracy,
        "bops_share": p.share("bops"),
        "bops": int(p.costs["bops"]),
        "bops_structured": _whole(p.costs.get("bops-structured")),
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


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)


def write(made: Front, folder: Path) -> Path:
    """Write pareto.csv; a reader never sees half a file."""
    path = folder / "pareto.csv"
    replace_file(path, lambda part: frame(made).to_csv(part, index=False))
    return path
