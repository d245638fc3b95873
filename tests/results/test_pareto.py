"""Fronts, their hypervolume and their knee, against definitions worked out by brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jpq.results.front.pareto import find_knee, hypervolume, hypervolume_of, non_dominated, to_objectives
from jpq.types import JpqError

SIDE = 6  # of the grid that whole-numbered points lie on


def grids(d: int, least: int = 0) -> st.SearchStrategy[np.ndarray]:
    return st.integers(least, 7).flatmap(lambda n: arrays(np.int64, (n, d), elements=st.integers(0, SIDE + 1)))


both = st.sampled_from([2, 3]).flatmap(grids)


def beats(a: np.ndarray, b: np.ndarray) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


@given(both)
def test_nothing_on_the_front_is_dominated_and_all_else_is_by_a_point_on_it(points: np.ndarray) -> None:
    on = non_dominated(points)
    front = points[on]
    assert not any(beats(a, b) for a, b in product(points, front))
    assert all(any(beats(a, b) for a in front) for b in points[~on])
    assert on.any() or not len(points)


@given(both)
def test_hypervolume_counts_the_unit_cells_that_a_point_dominates(points: np.ndarray) -> None:
    d = points.shape[1]
    cells = sum(any((p <= cell).all() for p in points) for cell in product(range(SIDE), repeat=d))
    assert hypervolume(points, [SIDE] * d) == cells


@given(both, st.integers(0, 6))
def test_hypervolume_grows_with_points_and_needs_only_the_front(points: np.ndarray, left: int) -> None:
    edge = [SIDE] * points.shape[1]
    whole = hypervolume(points, edge)
    assert hypervolume(points[:left], edge) <= whole
    assert hypervolume(points[non_dominated(points)], edge) == whole


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(1e-4, 1), st.floats(1e-4, 1)), min_size=1, max_size=7))
def test_hypervolume_by_inclusion_and_exclusion(rows: list[tuple[float, float, float]]) -> None:
    points = to_objectives(*zip(*rows, strict=True))
    edge = np.array([-0.1, 0.0, 0.0])
    total = 0.0
    for chosen in range(1, 2 ** len(points)):
        subset = points[[i for i in range(len(points)) if chosen >> i & 1]]
        box = np.prod(np.maximum(edge - subset.max(0), 0))
        total += box if len(subset) % 2 else -box
    assert hypervolume_of(*zip(*rows, strict=True), chance=0.1) == pytest.approx(total, abs=1e-9)


def test_covered_is_accuracy_above_chance_times_decades() -> None:
    assert hypervolume_of([0.9], [0.01], chance=0.1) == pytest.approx(1.6)
    assert hypervolume_of([0.9, 0.5], [0.01, 0.001], chance=0.1) == pytest.approx(0.8 * 2 + 0.4)
    assert hypervolume_of([0.1, 0.9], [0.01, 1.5], chance=0.1) == 0  # no better than chance; dearer than the fp32 model
    assert hypervolume_of([], []) == 0


steps = st.integers(1, 10_000).map(lambda n: n / 10_000)  # shares one ulp apart have the same logarithm
fronts = st.lists(st.tuples(steps, steps), min_size=3, max_size=9, unique=True)


def distances(accuracy: np.ndarray, share: np.ndarray) -> dict[int, float]:
    """Of each point of the front to the chord, in the plane where both axes run from 0 to 1, by cross product."""
    on = [
        i
        for i in range(len(accuracy))
        if not any(
            accuracy[j] >= accuracy[i] and share[j] <= share[i] and (accuracy[j], share[j]) != (accuracy[i], share[i])
            for j in range(len(accuracy))
        )
    ]
    x, y = np.log(share[on]), accuracy[on]
    ends = np.array([[x.min(), y.min()], [x.max(), y.max()]])
    span = np.where(ends[1] > ends[0], ends[1] - ends[0], 1)
    chord = (ends[1] - ends[0]) / span
    offsets = (np.column_stack([x, y]) - ends[0]) / span
    signed = (chord[0] * offsets[:, 1] - chord[1] * offsets[:, 0]) / max(np.hypot(*chord), 1)
    return dict(zip(on, signed, strict=True))


@given(fronts)
def test_the_knee_is_the_point_farthest_above_the_chord(rows: list[tuple[float, float]]) -> None:
    accuracy, share = np.array(rows).T
    found, by_hand = find_knee(accuracy, share), distances(accuracy, share)
    if found is None:
        assert len(by_hand) < 3 or max(by_hand.values()) <= 1e-9
    else:
        assert len(by_hand) >= 3
        assert by_hand[found] == pytest.approx(max(by_hand.values()), abs=1e-9)


whole = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=3, max_size=9, unique=True)


@given(whole, st.integers(1, 5), st.integers(-40, 40), st.integers(1, 4), st.integers(-6, 6))
def test_the_knee_does_not_move_when_axes_are_rescaled(
    rows: list[tuple[int, int]], stretch: int, shift: int, decades: int, apart: int
) -> None:
    """Accuracy by a*x + b, cost by a power and a factor (affine in its logarithm)."""
    right, wide = np.array(rows, float).T
    first = find_knee(right, 2.0**wide)
    again = find_knee(stretch * right + shift, 2.0 ** (decades * wide + apart))
    by_hand = distances(right, 2.0**wide)
    assert (first is None) == (again is None)
    assert first is None or by_hand[again] == pytest.approx(by_hand[first], abs=1e-9)


def test_fronts_without_a_knee() -> None:
    assert find_knee([0.9, 0.8], [0.1, 0.01]) is None
    assert find_knee([0.9, 0.5, 0.1], [1, 0.1, 0.01]) is None  # a straight line
    assert find_knee([0.9, 0.2, 0.1], [1, 0.1, 0.01]) is None  # bends the other way
    assert find_knee([0.9, 0.85, 0.1], [1, 0.1, 0.01]) == 1
    assert find_knee([0.9, 0.85, 0.85, 0.1], [1, 0.1, 0.5, 0.01]) == 1  # the dominated point is not part of it


@pytest.mark.parametrize("bad", [[1.0, 2.0], [[]], [[float("nan"), 1.0]]])
def test_points_must_be_numbers_in_rows(bad: list[object]) -> None:
    with pytest.raises(JpqError, match="rows of one length"):
        non_dominated(bad)


def test_costs_must_be_above_zero_and_references_fit() -> None:
    with pytest.raises(JpqError, match="above 0"):
        to_objectives([0.5], [0.0])
    with pytest.raises(JpqError, match="reference"):
        hypervolume([[1.0, 2.0]], [1.0])
