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
            raise JpqError(f"{flag} '{text}' is not {article} {task.metric_name}. Write it like 91% or 0.91.")
        return task.score(float(share))
    try:
        number = float(text.strip().removesuffix(task.metric_unit))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        example = f"{task.chance(1) + 0.5:.3g}{task.metric_unit}" if math.isfinite(task.chance(1)) else "0.5"
        raise JpqError(f"{flag} '{text}' is not a number of {task.metric_name}. Write it like {example}.")
    return task.score(number)
