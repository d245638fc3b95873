"""Intervals of metrics: published values, coverage by simulation, and what is noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from made_runs import result

from jpq.results import intervals
from jpq.results.run_folder import result_record
from jpq.tasks import CLASSIFICATION
from jpq.tasks.base import Task


@pytest.mark.parametrize(
    ("right", "samples", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(right: int, samples: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3."""
    assert intervals.wilson_interval(right / samples, samples) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(
    ("first", "second", "samples", "low", "high"),
    [(3, 9, 10, 0.1705, 0.8090), (0, 10, 10, 0.6075, 1.0)],
)
def test_differences_as_published(first: int, second: int, samples: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), 873-890, table II, method 10."""
    found = intervals.difference_interval(first / samples, second / samples, samples)
    assert found == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("share", [0.1, 0.7, 0.97])
def test_nineteen_of_twenty_intervals_hold_the_truth(share: float) -> None:
    samples = 449
    counts = np.random.default_rng(0).binomial(samples, share, 2000)
    inside = [low <= share <= high for low, high in (intervals.wilson_interval(n / samples, samples) for n in counts)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)


def test_equal_models_are_within_the_noise_nineteen_times_in_twenty_or_more() -> None:
    draws = np.random.default_rng(1).binomial(300, 0.9, (500, 2)) / 300
    noise = [intervals.is_within_noise(CLASSIFICATION, a, b, 300) for a, b in draws]
    assert np.mean(noise) >= 0.93
    assert not intervals.is_within_noise(CLASSIFICATION, 0.99, 0.90, 300)


@pytest.mark.parametrize(
    ("value", "samples", "classes", "near"),
    [
        (0.10, 135, 10, True),
        (0.18, 1000, 10, True),
        (0.25, 1000, 10, False),
        (0.97, 135, 10, False),
        (0.52, 10_000, 2, True),
        (0.65, 20, 2, True),  # 13 of 20: not told from guessing
        (0.65, 2000, 2, False),
        (0.0025, 50_000, 1000, True),
        (0.05, 50_000, 1000, False),
    ],
)
def test_near_chance(value: float, samples: int, classes: int, near: bool) -> None:
    assert intervals.is_near_chance(CLASSIFICATION, value, samples, 1 / classes) == near


class Regression(Task):  # type: ignore[misc]
    """A task whose metric is no share."""

    name, metric_name = "error", "error"

    def loss(self, output, target):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    distill = metric = loss

    def chance(self, classes: int) -> float:
        return -math.inf


def test_metrics_that_are_no_share_have_none() -> None:
    task = Regression()
    assert intervals.metric_interval(task, 0.5, 100) is None
    assert not intervals.is_within_noise(task, 0.5, 0.5, 100)
    assert not intervals.is_near_chance(task, 0.5, 100, task.chance(1))
    assert intervals.metric_interval(CLASSIFICATION, math.nan, 100) is None
    assert intervals.metric_interval(CLASSIFICATION, 0.9, 0) is None


def test_result_json_holds_the_intervals(tmp_path) -> None:  # type: ignore[no-untyped-def]
    made = result(tmp_path, data={"name": "digits", "test": 449})
    found = result_record(made)["intervals"]
    assert found["compressed"] == intervals.wilson_interval(made.compressed.accuracy, 449)
    assert (found["level"], found["samples"], found["within_noise"]) == (0.95, 449, True)
    assert result_record(result(tmp_path, data={"name": "digits"}))["intervals"] == {}
