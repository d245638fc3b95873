"""Metrics as users write them behind flags: "91%", "30 dB", "0.9"."""

from __future__ import annotations

import math

from jpq.costs.target import parse_share
from jpq.tasks.base import Task
from jpq.types import JpqError


def parse_score(task: Task, text: str, flag: str) -> float:
    """The score of a metric that a flag's text gives, in percent or as a share, or with the metric's unit or none.

    Raises JpqError for a text of another form, with an example.
    """
    if task.metric_unit == "%":
        share = parse_share(text)
        if share is None:
            article = "an" if task.metric_name[0] in "aeiou" else "a"
            example = "91% or 0.91" if task.higher_is_better else "9% or 0.09"
            raise JpqError(f"{flag} '{text}' is not {article} {task.metric_name}. Write it like {example}.")
        return task.score(float(share))
    try:
        number = float(text.strip().removesuffix(task.metric_unit))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise JpqError(f"{flag} '{text}' is not a number of {task.metric_name}. Write it like {example_metric(task)}.")
    return task.score(number)


def metric_flag(task: Task) -> str:
    """The flag that asks for a metric at least: it has a name of its own for the accuracy."""
    return "--min-accuracy" if task.metric_name == "accuracy" else "--min-metric"


def example_metric(task: Task) -> str:
    """A metric that is better than chance, as text behind `metric_flag`: "91%", "11.3dB"."""
    if task.metric_unit == "%":
        return "91%" if task.higher_is_better else "9%"
    chance = task.chance(1)
    if not math.isfinite(chance):
        return "0.5"
    if task.higher_is_better:
        return f"{chance + 0.5:.3g}{task.metric_unit}"
    better = chance / 2 if chance > 0 else abs(chance - 0.5)  # an error of 0 by chance is an unknown one
    return f"{better:.3g}{task.metric_unit}"
