"""95 % intervals of metrics that were measured on a finite number of samples, and of their differences.

A metric in percent is the mean of one value in [0, 1] per sample: of hits and misses for accuracy. Its interval is
Wilson's (E. B. Wilson, Journal of the American Statistical Association 22, 1927); for values between 0 and 1 it is
wider than needed. A difference gets Newcombe's interval (R. G. Newcombe, Statistics in Medicine 17, 1998, method 10),
as if both models had been measured on samples of their own, which on the same samples is wider than needed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jpq.results.formatting import format_percent

if TYPE_CHECKING:  # the screens import this module, and start without torch
    from jpq.tasks.base import Task

LEVEL = 0.95  # of every interval
Z = 1.959963984540054  # of a normal variable: within +-Z with probability LEVEL

Interval = tuple[float, float]  # smallest and largest value, in [0, 1]


def wilson_interval(share: float, samples: int) -> Interval:
    """Interval of a share in [0, 1] that was measured on so many samples; all of [0, 1] without samples."""
    if samples < 1:
        return 0.0, 1.0
    weight = Z**2 / samples
    middle = (share + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * math.sqrt(share * (1 - share) / samples + weight / (4 * samples))
    return max(0.0, middle - half), min(1.0, middle + half)


def metric_interval(task: Task, score: float, samples: int) -> Interval | None:
    """Interval of a task's metric, from its score; None where it is no mean share, was not measured, or on nothing.

    mIoU and average precision are in percent and no means over samples: they have no interval.
    """
    value = task.score(score)
    if task.metric_unit != "%" or not task.is_mean_over_samples or not 0 <= value <= 1 or samples < 1:
        return None
    return wilson_interval(value, samples)


def difference_interval(first: float, second: float, samples: int) -> Interval:
    """Interval of `second - first`, two shares that were measured on so many samples."""
    (low_1, high_1), (low_2, high_2) = (wilson_interval(share, samples) for share in (first, second))
    change = second - first
    return (
        change - math.hypot(second - low_2, high_1 - first),
        change + math.hypot(high_2 - second, first - low_1),
    )


def is_within_noise(task: Task, first: float, second: float, samples: int) -> bool:
    """Whether the difference of two scores is too small to be told from none with so few samples."""
    if metric_interval(task, first, samples) is None or metric_interval(task, second, samples) is None:
        return False
    low, high = difference_interval(task.score(first), task.score(second), samples)
    return low <= 0 <= high


def is_near_chance(task: Task, score: float, samples: int, chance: float) -> bool:
    """Whether a score is hardly better than that of guessing: by less than a tenth of the way, or not measurably.

    One that is no share of samples (`metric_interval`) is near chance where it is not above it.
    """
    interval = metric_interval(task, score, samples)
    if interval is None or not task.higher_is_better or not 0 <= chance < 1:
        return math.isfinite(chance) and score <= chance
    return score < min(chance + 0.1 * (1 - chance), 3 * chance) or interval[0] <= chance


def format_interval(interval: Interval, between: str = " to ") -> str:
    """An interval of shares as text: "97.4 to 99.5 %"."""
    low, high = (f"{100 * end:.1f}" for end in interval)
    return f"{low}{between}{high} %" if low != high else format_percent(interval[0])
