"""Numbers, shares, times and metrics as people read them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the screens import this module, and start without torch
    from jpq.tasks.base import Task


def format_duration(seconds: float) -> str:
    """Seconds as text: 2.4 s, 42 s, 3 min 20 s, 2 h 05 min."""
    whole_seconds = round(seconds)
    if whole_seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole_seconds} s"
    if whole_seconds < 3600:
        return f"{whole_seconds // 60} min {whole_seconds % 60:02} s"
    return f"{whole_seconds // 3600} h {whole_seconds % 3600 // 60:02} min"


def format_ms(milliseconds: float) -> str:
    """Milliseconds with three digits."""
    return f"{milliseconds:#.3g} ms"


def shorten(name: str, length: int = 34) -> str:
    """The last characters of a long name, after an ellipsis."""
    return name if len(name) <= length else "…" + name[1 - length :]


def shorten_middle(name: str, length: int) -> str:
    """First and last part of a long dotted name around an ellipsis, or its first and last characters."""
    if len(name) <= length:
        return name
    head, _, rest = name.partition(".")
    tails = [rest[i + 1 :] for i, letter in enumerate(rest) if letter == "."]
    tail = next((t for t in tails if len(head) + 1 + len(t) <= length), "")
    if tail:
        return f"{head}…{tail}"
    front = (length - 1) // 2
    return f"{name[:front]}…{name[len(name) - (length - 1 - front) :]}"


def shorten_names(names: Sequence[str], length: int) -> list[str]:
    """Names of at most `length` characters that stay distinct: without their middle, or with the parts that differ.

    Names that neither way tells apart are left as they are.
    """
    short = [shorten_middle(name, length) for name in names]
    for way_out in (_differing_parts, lambda name, others, length: name):
        owners: dict[str, set[str]] = {}
        for name, text in zip(names, short, strict=True):
            owners.setdefault(text, set()).add(name)
        short = [
            way_out(name, owners[text], length) if len(owners[text]) > 1 else text
            for name, text in zip(names, short, strict=True)
        ]
    return short


def _differing_parts(name: str, others: Collection[str], length: int) -> str:
    """The dotted parts of a name in which others differ from it, with its last part, or its end; else all of it."""
    parts = name.split(".")
    tables = [other.split(".") for other in others]
    places = [i for i, part in enumerate(parts) if any(other[i : i + 1] != [part] for other in tables)]
    before = max(0, places[0] - (parts[places[0]].isdigit())) if places else 0
    middle = ".".join(parts[before : places[-1] + 1]) if places else name
    last = "" if not places or places[-1] == len(parts) - 1 else f"…{parts[-1]}"
    text = f"…{middle}{last}" if before else f"{middle}{last}"
    return text if len(text) <= length else name


def format_number(number: float, unit: str = "") -> str:
    """A number with three digits and a decimal prefix: 12300000 is "12.3 M", and 50100 of unit "B" is "50.1 KB"."""
    if not math.isfinite(number):
        return "-"
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= 0.9995 * scale:
            value = number / scale
            digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
            return f"{value:.{digits}f} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def format_percent(share: float) -> str:
    """A share in [0, 1] as text: 0.0098 is "0.98 %"."""
    if not math.isfinite(share):
        return "-"
    value = 100 * share
    return f"{value:.2f} %" if abs(value) >= 0.1 or value == 0 else f"{value:.2g} %"


def format_metric(task: Task, score: float) -> str:
    """A task's metric with its unit, from its score: 0.9911 of classification is "99.11 %"."""
    return format_value(task.score(score), task.metric_unit)


def format_value(value: float, unit: str) -> str:
    """A metric with its unit, where "%" means that it is a share: 0.9911 is "99.11 %"."""
    if unit == "%":
        return format_percent(value)
    return f"{value:.4g} {unit}".rstrip() if math.isfinite(value) else "-"


def format_change(task: Task, change: float) -> str:
    """The metrics' difference for one of two scores: "+0.22 points" where they are in percent, else with their unit."""
    change = task.score(change)
    if task.metric_unit == "%":
        return f"{100 * change:+.2f} points"
    return f"{change:+.3g} {task.metric_unit}".rstrip()


def metric_scale(task: Task) -> float:
    """Factor from a score to the metric that plots show: 100 where it is in percent, negative where lower is better."""
    return task.score(100.0 if task.metric_unit == "%" else 1.0)


def metric_label(task: Task) -> str:
    """Name and unit of a task's metric, for the axis of a plot: "accuracy, %"."""
    return f"{task.metric_name}, {task.metric_unit}" if task.metric_unit else task.metric_name
