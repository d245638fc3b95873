"""Multiple choice under limits: against brute force, several targets, infeasible ones, prices."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpq.allocation.measured.choose import Group, choose, prices, total_costs


def random_groups(seed: int, count: int, options: int, targets: int) -> list[Group]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, options + 1, count)
    return [Group(rng.random(n), rng.integers(1, 50, (n, targets)).astype(float)) for n in sizes]


def brute_force(groups: list[Group], limits: list[float]) -> float | None:
    best = None
    for choice in product(*(range(len(g.values)) for g in groups)):
        if all(c <= limit for c, limit in zip(total_costs(groups, choice), limits, strict=True)):
            value = sum(float(g.values[i]) for g, i in zip(groups, choice, strict=True))
            best = value if best is None else min(best, value)
    return best


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.floats(0.1, 1.2))
@settings(max_examples=60, deadline=None)
def test_choice_is_the_best_of_all(seed: int, count: int, options: int, targets: int, share: float) -> None:
    groups = random_groups(seed, count, options, targets)
    limits = [max(1.0, float(np.floor(share * sum(g.costs[:, t].max() for g in groups)))) for t in range(targets)]
    expected, choice = brute_force(groups, limits), choose(groups, limits)
    assert (choice is None) == (expected is None)
    if choice is not None and expected is not None:
        assert all(c <= limit for c, limit in zip(total_costs(groups, choice), limits, strict=True))
        assert sum(float(g.values[i]) for g, i in zip(groups, choice, strict=True)) == pytest.approx(expected)


def test_a_limit_that_is_met_to_the_last_unit_counts_as_met() -> None:
    groups = [Group(np.array([1.0, 0.0]), np.array([[1.0], [3 * 2.0**53]])) for _ in range(3)]
    choice = choose(groups, [6 * 2.0**53 + 1.0])
    assert choice is not None
    assert sorted(choice) == [0, 1, 1]


def test_more_budget_never_costs_value() -> None:
    groups = random_groups(7, 8, 6, 1)
    smallest = sum(g.costs.min() for g in groups)
    values = []
    for limit in np.linspace(smallest, 8 * 50, 12):
        choice = choose(groups, [float(limit)])
        assert choice is not None
        values.append(sum(float(g.values[i]) for g, i in zip(groups, choice, strict=True)))
    assert values == sorted(values, reverse=True)


def test_price_is_what_a_little_more_budget_gains() -> None:
    steps = np.linspace(0, 1, 201)  # value (1 - x)^2 at cost 100 x: nearly continuous
    groups = [Group(k * (1 - steps) ** 2, (100 * steps)[:, None]) for k in (1.0, 3.0)]
    limit = 120.0
    less, more = (choose(groups, [limit + d]) for d in (-2.0, 2.0))
    assert less is not None
    assert more is not None
    gain = sum(float(g.values[a] - g.values[b]) for g, a, b in zip(groups, less, more, strict=True)) / 4
    assert prices(groups, [limit])[0] == pytest.approx(gain, rel=0.02)
    assert prices(groups, [1e6])[0] == pytest.approx(0)
