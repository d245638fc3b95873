"""The shared finished runs are what other commands can read."""

from __future__ import annotations

from pathlib import Path

import jpq
from jpq.results import Result, read_run
from jpq.results.front import read_points


def test_a_finished_run_comes_back_from_its_folder(finished_budgets: Result) -> None:
    again = read_run(finished_budgets.folder)
    assert (again.compressed, again.layers) == (finished_budgets.compressed, finished_budgets.layers)
    assert jpq.load(finished_budgets.folder)[1].layers


def test_budgets_and_trials_are_points_of_a_front(finished_budgets: Result, finished_study: Path) -> None:
    assert len(read_points(finished_budgets.folder.parent).points) == len(finished_budgets.front) == 2
    trials = read_points(finished_study).points
    assert len(trials) == 2
    assert all(point.is_uniform for point in trials)
