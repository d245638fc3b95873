"""Data, models, and tasks (loss and metric): TASKS holds one instance per task, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from jpq.lazy import lazy_names
from jpq.tasks.base import Task
from jpq.tasks.classification import Classification, SequenceClassification, TextClassification
from jpq.tasks.detection import Detection
from jpq.tasks.multi_label import MultiLabel
from jpq.tasks.recorded import RecordedTask, metric_record
from jpq.tasks.regression import Regression
from jpq.tasks.restoration import Restoration
from jpq.tasks.segmentation import Segmentation
from jpq.types import JpqError, unknown

if TYPE_CHECKING:
    from jpq.tasks.batches import SplitBatches
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
    "Detection",
    "MultiLabel",
    "RecordedTask",
    "Regression",
    "Restoration",
    "Segmentation",
    "SequenceClassification",
    "Task",
    "TextClassification",
    "build_model",
    "load_data",
    "load_dense_model",
    "load_weights",
    "pick_task",
    "read_data",
    "recorded_task",
    "task_record",
    "with_task",
]

CLASSIFICATION = Classification()

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        CLASSIFICATION,
        MultiLabel(),
        Segmentation(),
        Regression(),
        Restoration(),
        Detection(),
        TextClassification(),
        SequenceClassification(),
    )
}

BUILT_IN = {name: type(task) for name, task in TASKS.items()}

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
    """The task of this name, or the one that the user's own `module:callable` returns: that code is imported and RUN.

    Raises JpqError for an unknown name, and for code that returns no task.
    """
    if name in TASKS:
        return TASKS[name]
    if ":" not in name:
        raise unknown("task", name, [*TASKS, "module:callable"])
    from jpq.tasks.datasets import call_user_code, import_callable

    task = call_user_code("task", name, import_callable("task", name))
    if not isinstance(task, Task):
        raise JpqError(f"Task '{name}' returned {type(task).__name__}; it must return a jpq.tasks.base.Task.")
    return task


def with_task(data: Data, name: str = "") -> Data:
    """The data with the task of this name, "" for their own. Raises JpqError where targets are not of the task."""
    from dataclasses import replace

    read_as = data.task
    if name and name not in (data.task.name, CLASSIFICATION.name if data.task is CLASSIFICATION else ""):
        data = replace(data, task=pick_task(name))
    if isinstance(data.task, Detection) and len(data.shape) == 3:  # anchors are for one size of images
        sides = dict(zip(("height", "width"), data.shape[1:], strict=True))
        data = replace(data, arguments={**data.arguments, **sides})
    if data.task is CLASSIFICATION is read_as:  # its labels were checked when they were read
        return data
    data.task.check_packages()
    for split in (data.train, data.held_out, data.test):
        _check_targets_of(split, data.task, data.classes)
    return data


def _check_targets_of(split: SplitBatches, task: Task, classes: int) -> None:
    """Check the targets of a split: the first batch, all that lie in memory, and each batch that a loader gives later.

    Raises JpqError where they are not of the task.
    """
    from jpq.tasks.batches import Batches as NumberedBatches
    from jpq.tasks.loaders import LoaderBatches

    target = next((target for _, target in split), None)
    task.check_target(target, classes)
    if isinstance(split, LoaderBatches):
        earlier = split.check_targets

        def check(target: Any) -> Any:
            target = target if earlier is None else earlier(target)
            task.check_target(target, classes)
            return target

        split.check_targets = check
        return
    labels = split.labels if isinstance(split, NumberedBatches) else None
    if not isinstance(labels, Tensor) or not isinstance(target, Tensor):
        return
    if (labels.dtype, labels.shape[1:]) == (target.dtype, target.shape[1:]):  # else targets are made of images
        task.check_target(labels, classes)


def recorded_task(data: Mapping[str, Any]) -> Task:
    """The task that a run's record of its data names; classification where it names none.

    A task that is not in TASKS is known by its record (`RecordedTask`). Raises JpqError where there is no such record.
    """
    name = str(data.get("task", CLASSIFICATION.name))
    if name in TASKS:
        return TASKS[name]
    try:
        return RecordedTask(name, data["metric"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise JpqError(
            f"Unknown task '{name}': first import the module that adds it to jpq.tasks.TASKS, as in "
            "python -c \"import MODULE; from jpq.cli.main import main; main(['pareto', 'runs'])\"."
        ) from error


def task_record(task: Task, classes: int = 1) -> dict[str, Any]:
    """The entries for `recorded_task` in a run's record of its data; empty for classification.

    A task of the user's own gets the record of its metric, with the chance level for so many outputs per sample.
    """
    if task.name == CLASSIFICATION.name:
        return {}
    own = BUILT_IN.get(task.name) is not type(task)
    return {"task": task.name, **({"metric": metric_record(task, classes)} if own else {})}
