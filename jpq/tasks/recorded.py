"""Tasks in the records of runs: what is written of a task, and a task that is known by its record alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from jpq.tasks.base import Task
from jpq.types import JpqError

TEXT = re.compile(r"[\w .,:%@^²/()+-]{0,60}")  # of names in a record, which screens show


class RecordedTask(Task):
    """A task of the user's own as a run recorded it: it names, orders and formats metrics, and computes nothing.

    So fronts and tables of finished runs need none of the user's code.

    Args:
        name: of the task; record: what `metric_record` gave. Raises ValueError for a record that is none.
    """

    def __init__(self, name: str, record: Mapping[str, Any]) -> None:
        texts = {key: str(record[key]) for key in ("name", "unit", "decision", "sample")}
        if not all(TEXT.fullmatch(text) for text in (name, *texts.values())):
            raise ValueError(f"metric {record}")
        members: dict[str, Any] = {
            "name": name,
            "metric_name": texts["name"],
            "metric_unit": texts["unit"],
            "decision_name": texts["decision"],
            "sample_name": texts["sample"],
            "higher_is_better": bool(record["higher_is_better"]),
            "metric_bounds": (_bound(record["bounds"][0], -math.inf), _bound(record["bounds"][1], math.inf)),
        }
        for key, value in members.items():
            setattr(self, key, value)
        self._chance, self._mean = float(record["chance"]), bool(record["mean_over_samples"])

    @property
    def is_mean_over_samples(self) -> bool:
        """As it was recorded."""
        return self._mean

    def chance(self, classes: int) -> float:
        """As it was recorded."""
        return self._chance

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Raises JpqError: a record has no loss."""
        raise self._error()

    def metric(self, output: Tensor, target: Tensor) -> Tensor:
        """Raises JpqError: a record has no metric."""
        raise self._error()

    def _error(self) -> JpqError:
        return JpqError(
            f"Task '{self.name}' is known here by the record of a run alone; name its code with --task module:callable."
        )


def metric_record(task: Task, classes: int) -> dict[str, Any]:
    """What `RecordedTask` is made from: names, unit, direction, bounds and chance of a task's metric."""
    bounds = [bound if math.isfinite(bound) else None for bound in task.metric_bounds]  # JSON has no infinity
    return {
        "name": task.metric_name,
        "unit": task.metric_unit,
        "decision": task.decision_name,
        "sample": task.sample_name,
        "higher_is_better": task.higher_is_better,
        "bounds": bounds,
        "chance": task.chance(classes),
        "mean_over_samples": task.is_mean_over_samples,
    }


def _bound(value: Any, default: float) -> float:
    return default if value is None else float(value)
