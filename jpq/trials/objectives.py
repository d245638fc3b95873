"""Objectives of a study: their names, units and directions as Optuna and the screen have them."""

from __future__ import annotations

from optuna.study import StudyDirection

from jpq.results.formatting import metric_scale
from jpq.tasks.base import Task

UNITS = {  # objective -> its name with the unit, and the factor from our unit to that one
    "accuracy": ("held-out accuracy (%)", 100.0),
    "bops": ("BOPs (% of fp32)", 100.0),
    "size": ("size (KB)", 1e-3),
    "latency": ("latency (ms)", 1.0),
    "macs": ("MACs (% of fp32)", 100.0),
}


def objective_unit(name: str, task: Task) -> tuple[str, float]:
    """(name of an objective with its unit, factor from our unit to that one); "accuracy" is the task's metric."""
    if name != "accuracy":
        return UNITS[name]
    unit = f" ({task.metric_unit})" if task.metric_unit else ""
    return f"held-out {task.metric_name}{unit}", metric_scale(task)


def objective_direction(name: str, task: Task) -> StudyDirection:
    """Whether larger or smaller values of an objective are better: costs and errors are minimized."""
    return StudyDirection.MAXIMIZE if name == "accuracy" and task.higher_is_better else StudyDirection.MINIMIZE
