"""Multiple choice under limits: against brute force, several targets, infeasible ones, prices."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from jpq.allocation.measured import choose as choose_module
from jpq.allocation.measured.choose import Group, choose, prices, total_costs
from jpq.types import JpqError


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


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.floats(0.1, 1.2))
@settings(max_examples=25, deadline=None)
def test_the_integer_programme_gives_the_best_of_all(
    seed: int, count: int, options: int, targets: int, share: float
) -> None:
    groups = random_groups(seed, count, options, targets)
    limits = [max(1.0, float(np.floor(share * sum(g.costs[:, t].max() for g in groups)))) for t in range(targets)]
    expected = brute_force(groups, limits)
    choice = choose_module._by_integer_programme(groups, np.array(limits), np.inf)
    assert (choice is None) == (expected is None)
    if choice is not None and expected is not None:
        assert all(c <= limit for c, limit in zip(total_costs(groups, choice), limits, strict=True))
        assert sum(float(g.values[i]) for g, i in zip(groups, choice, strict=True)) == pytest.approx(expected)


@pytest.mark.parametrize("most_states", [0, choose_module.MOST_STATES])  # 0: by an integer programme
def test_only_choices_below_the_given_value_are_of_interest(most_states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_module, "MOST_STATES", most_states)
    for seed in range(8):
        groups = random_groups(seed, 4, 4, 1 + seed % 2)
        limits = [1.1 * cost for cost in total_costs(groups, [0] * 4)]
        best = brute_force(groups, limits)
        assert best is not None
        assert choose(groups, limits, best * (1 - 1e-9)) is None
        choice = choose(groups, limits, best * (1 + 1e-9))
        assert choice is not None
        assert sum(float(g.values[i]) for g, i in zip(groups, choice, strict=True)) == pytest.approx(best)


def test_a_choice_that_is_known_is_given_where_the_integer_programme_runs_out_of_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choose_module, "MOST_STATES", 10)
    monkeypatch.setattr(choose_module, "SECONDS", 0.0)
    groups = random_groups(0, 30, 6, 2)
    limits = [0.5 * sum(float(g.costs[:, t].max()) for g in groups) for t in range(2)]
    assert choose_module._by_integer_programme(groups, np.array(limits), np.inf) is None
    choice = choose(groups, limits)
    assert choice is not None
    assert all(c <= limit for c, limit in zip(total_costs(groups, choice), limits, strict=True))


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


def realistic_groups(seed: int, count: int) -> list[Group]:
    """Layers of very different size and divergence, 49 pairs of widths each, as networks have them."""
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(count):
        macs = 10.0 ** rng.uniform(5, 8)
        w, a = (10 ** rng.uniform(-4, -1) * rng.uniform(2.5, 4.5) ** -np.arange(7.0) for _ in range(2))
        bits = np.arange(2.0, 9.0)
        groups.append(Group((w[:, None] + a).ravel(), (macs * bits[:, None] * bits).ravel()[:, None]))
    return groups


@pytest.mark.parametrize("seed", range(4))
def test_price_of_one_target_is_that_of_the_linear_programme(seed: int) -> None:
    groups = realistic_groups(seed, 60)
    least, most = (sum(float(pick(g.costs)) for g in groups) for pick in (np.min, np.max))
    for share in (0.05, 0.2, 0.6):
        limit = least + share * (most - least)
        values = np.concatenate([g.values for g in groups])
        owner = np.repeat(np.arange(60), 49)
        result = linprog(
            values,
            A_ub=np.concatenate([g.costs[:, 0] for g in groups])[None] / limit,
            b_ub=[1.0],
            A_eq=(owner == np.arange(60)[:, None]).astype(float),
            b_eq=np.ones(60),
        )
        assert prices(groups, [limit])[0] == pytest.approx(-result.ineqlin.marginals[0] / limit, rel=1e-9)
    assert prices(groups, [most])[0] == 0.0
    with pytest.raises(JpqError):
        prices(groups, [least * 0.99])


@pytest.mark.parametrize("targets", [1, 2])
def test_two_hundred_layers_are_solved_without_an_integer_programme(
    targets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = realistic_groups(3, 200)
    if targets == 2:  # bit-operations and bytes
        rng = np.random.default_rng(5)
        bits = np.repeat(np.arange(2.0, 9.0), 7)
        groups = [Group(g.values, np.column_stack([g.costs[:, 0], rng.uniform(1e3, 1e6) * bits])) for g in groups]
    limits = [0.25 * sum(float(g.costs[:, t].max()) for g in groups) for t in range(targets)]
    by_programme = choose_module._by_integer_programme(groups, np.array(limits), np.inf)
    assert by_programme is not None

    def refuse(*_: object) -> None:
        raise AssertionError("too many partial choices")

    monkeypatch.setattr(choose_module, "_by_integer_programme", refuse)
    choice = choose(groups, limits)
    assert choice is not None
    assert all(c <= limit for c, limit in zip(total_costs(groups, choice), limits, strict=True))
    ours, theirs = (sum(float(g.values[i]) for g, i in zip(groups, p, strict=True)) for p in (choice, by_programme))
    assert ours <= theirs * (1 + 1e-6)


@pytest.mark.parametrize("limits", [[2.0], [2.0, 3.0]])
def test_no_choice_at_all_has_no_price(limits: list[float]) -> None:
    assert prices([], limits).tolist() == [0.0] * len(limits)
    with pytest.raises(JpqError, match="No choice of bits and channels meets the targets"):
        prices([], [*limits[1:], -1.0])
