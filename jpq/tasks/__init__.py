"""Data, models, and the tasks that say how good a model is: TASKS holds one instance per task, by name."""

from collections.abc import Mapping
from typing import Any

from jpq.lazy import lazy_names
from jpq.tasks.base import Task
from jpq.tasks.classification import Classification
from jpq.types import unknown

CLASSIFICATION = Classification()

TASKS: dict[str, Task] = {
    "classification": CLASSIFICATION,
}

__getattr__, __dir__ = lazy_names(__name__, {})


def pick_task(name: str) -> Task:
    """The task of this name. Raises JpqError for an unknown one."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def recorded_task(data: Mapping[str, Any]) -> Task:
    """The task that a run's record of its data names; classification where it names none."""
    return pick_task(str(data.get("task", CLASSIFICATION.name)))


def task_record(task: Task) -> dict[str, str]:
    """The entry for `recorded_task` in a run's record of its data; empty for classification."""
    return {} if task.name == CLASSIFICATION.name else {"task": task.name}
