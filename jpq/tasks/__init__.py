"""Data, models, and tasks (loss and metric): TASKS holds one instance per task, by name."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jpq.lazy import lazy_names
from jpq.tasks.base import Task
from jpq.tasks.classification import Classification
from jpq.types import JpqError, unknown

if TYPE_CHECKING:
    from jpq.tasks.data import PREPROCESSING, Batches, Data
    from jpq.tasks.data import load as load_data
    from jpq.tasks.load import load_dense_model, read_data
    from jpq.tasks.models import build as build_model
    from jpq.tasks.weights import load_weights

__all__ = [
    "CLASSIFICATION",
    "PREPROCESSING",
    "TASKS",
    "Batches",
    "Classification",
    "Data",
    "Task",
    "build_model",
    "load_data",
    "load_dense_model",
    "load_weights",
    "pick_task",
    "read_data",
    "recorded_task",
    "task_record",
]

CLASSIFICATION = Classification()

TASKS: dict[str, Task] = {
    "classification": CLASSIFICATION,
}

_HOMES = {
    "Batches": "data",
    "Data": "data",
    "PREPROCESSING": "data",
    "build_model": "models:build",
    "load_data": "data:load",
    "load_dense_model": "load",
    "load_weights": "weights",
    "read_data": "load",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)


def pick_task(name: str) -> Task:
    """The task of this name. Raises JpqError for an unknown one."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def recorded_task(data: Mapping[str, Any]) -> Task:
    """The task that a run's record of its data names; classification where it names none.

    Raises JpqError for a task that is not in TASKS, which says how to make it known.
    """
    name = str(data.get("task", CLASSIFICATION.name))
    if name not in TASKS:
        raise JpqError(
            f"Unknown task '{name}': first import the module that adds it to jpq.tasks.TASKS, as in "
            "python -c \"import MODULE; from jpq.cli.main import main; main(['pareto', 'runs'])\"."
        )
    return TASKS[name]


def task_record(task: Task) -> dict[str, str]:
    """The entry for `recorded_task` in a run's record of its data; empty for classification."""
    return {} if task.name == CLASSIFICATION.name else {"task": task.name}
