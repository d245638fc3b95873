"""How good a model must be: the limits that `--max-drop` and `--min-accuracy` set on a held-out metric.

All numbers here are scores, of which larger ones are better (`Task.score` turns errors round).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jpq.results.formatting import format_metric
from jpq.results.intervals import Interval, difference_interval, metric_interval
from jpq.tasks import CLASSIFICATION, TASKS
from jpq.tasks.data import PREPROCESSING
from jpq.tasks.metric_text import metric_flag, parse_score
from jpq.types import JpqError

if TYPE_CHECKING:
    from jpq.config import Budget, Config
    from jpq.tasks.base import Task


NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)  # at the start of a limit


@dataclass(frozen=True)
class AccuracyLimit:
    """The least score of a model, or the largest drop below the float model's."""

    flag: str  # with its text, such as "--max-drop 1%"
    task: Task
    amount: float  # the least score, or the drop
    is_drop: bool
    is_share: bool = False  # the drop is a share of the float model's metric

    def least(self, float_score: float, chance: float | None = None) -> float:
        """The least score beside a float model of this one.

        Raises JpqError where the float model is below it, and where `chance`, the score of a model that knows nothing,
        is not.
        """
        if self.is_drop:
            least = float_score - self.amount * (abs(float_score) if self.is_share else 1.0)
            if chance is not None and least <= chance:
                raise JpqError(
                    f"{self.flag} allows a model that knows nothing: the float one has a held-out "
                    f"{self.task.metric_name} of {format_metric(self.task, float_score)}, guessing has "
                    f"{format_metric(self.task, chance)}. Give a smaller drop, or train the float model longer "
                    "(--float-epochs, where no --weights are given)."
                )
            return least
        if float_score < self.amount:
            easier = "lower" if self.task.higher_is_better else "higher"
            raise JpqError(
                f"{self.flag}: the float model itself has a held-out {self.task.metric_name} of "
                f"{format_metric(self.task, float_score)}. Ask for a {easier} one, or train it "
                "longer (--float-epochs, where no --weights are given)."
            )
        return self.amount


def check_limit(config: Config) -> None:
    """Raise JpqError for a limit that is wrong whatever the data are; they are not read."""
    b, task = config.budget, config.task
    if task.task in TASKS or (not task.task and task.data in PREPROCESSING):
        read_limit(b, TASKS.get(task.task, CLASSIFICATION))
        return
    name, text = ("drop", b.max_drop) if b.max_drop else ("metric", b.min_metric or "")
    flag = f"--{'max-drop' if b.max_drop else 'min-metric'} {text}"
    found = NUMBER.match(text)
    if found is None:
        example = "1%, or 0.2dB in the metric's unit" if b.max_drop else "91%, or 29dB in the metric's unit"
        raise JpqError(f"{flag} is no {name}: it does not begin with a number. Write it like {example}.")
    if b.max_drop:
        _check_above_zero(flag, float(found[0]))


def read_limit(budget: Budget, task: Task) -> AccuracyLimit:
    """The limit that `--max-drop` or `--min-accuracy` names, for a task's metric.

    Raises JpqError for texts that are no amount of that metric, and for drops of nothing and of everything.
    """
    if budget.max_drop:
        return _read_drop(budget.max_drop, task)
    flag = metric_flag(task)
    least = parse_score(task, budget.min_metric or "", flag)
    return AccuracyLimit(f"{flag} {budget.min_metric}", task, least, is_drop=False)


def _read_drop(text: str, task: Task) -> AccuracyLimit:
    in_percent = task.metric_unit == "%"
    unit = "" if in_percent else task.metric_unit
    flag, (number, percent) = f"--max-drop {text}", _number(text.strip().removesuffix(unit))
    if number is None or (in_percent and not percent):
        example = f"1%, one point of {task.metric_name}" if in_percent else f"0.2{unit}, or 1% of the float model's"
        raise JpqError(f"{flag} is not a drop of {task.metric_name}. Write it like {example}.")
    _check_above_zero(flag, number)
    if percent and number >= 100 and task.higher_is_better:
        raise JpqError(f"{flag} allows a model that knows nothing. Give a drop below 100 %, as 1%.")
    amount = number / 100 if percent else number
    return AccuracyLimit(flag, task, amount, is_drop=True, is_share=percent and not in_percent)


def _check_above_zero(flag: str, drop: float) -> None:
    if drop <= 0:
        raise JpqError(f"{flag} allows no difference at all, which noise alone exceeds. Give a drop above 0, as 0.5%.")


def _number(text: str) -> tuple[float | None, bool]:
    """(the number in a text, whether it is in percent); None for other texts."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        return None, False
    return (value if abs(value) < float("inf") else None), text.endswith("%")  # NaN is not below infinity


def drop_interval(task: Task, float_score: float, score: float, samples: int) -> Interval | None:
    """95 % interval of the drop from the float model's score, in scores; None for metrics that have none."""
    if metric_interval(task, float_score, samples) is None or metric_interval(task, score, samples) is None:
        return None
    low, high = difference_interval(task.score(float_score), task.score(score), samples)
    return (-high, -low) if task.higher_is_better else (low, high)
