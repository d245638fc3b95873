"""Landing: under every target, at least 97 % of the tightest used, deterministic, and never above on any draw."""

from fractions import Fraction

import pytest
import torch
from gated import scatter
from hypothesis import given, settings
from hypothesis import strategies as st

from jpq import costs
from jpq.allocation.uniform_bits import decide_uniform_bits, start_bits
from jpq.compression import discretize
from jpq.compression.attach import attach
from jpq.costs.target import FULL_USE, parse_targets, used_share
from jpq.methods.gates import VIB, Feedback, Frozen
from jpq.methods.quantizers import Fixed, Learned, PowerOfTwo
from jpq.tasks.models import build
from jpq.tracing.sites import channels, masks
from jpq.tracing.trace import trace
from jpq.types import JpqError

torch.manual_seed(0)
MODEL = build("convnet", 10, 1)
EXAMPLE = torch.randn(4, 1, 8, 8)
NETWORK = trace(MODEL, EXAMPLE)


def net(width=Learned, gate=VIB, high=8):
    def widths(layer):
        make = (lambda: Fixed(high, tuple(range(2, high + 1)))) if width is Fixed else (lambda: width(high, 2, high))
        return make(), Fixed(8) if layer.reads_input else make()

    sites = channels(NETWORK) if gate is VIB else ()
    return attach(MODEL, NETWORK, sites, gate, widths, [EXAMPLE], "djpq")


NET = net()


@given(seed=st.integers(0, 10**6), share=st.floats(0.0005, 0.06))
@settings(max_examples=40, deadline=None)
def test_lands_under_the_target_and_uses_it(seed, share):
    scatter(NET, seed)
    targets = parse_targets({"bops": f"{100 * share:.4f}%"}, NET.exact_usage())
    plan = discretize.discretize(NET, targets)
    used = used_share(targets[0], NET.exact_usage(plan))
    assert used <= 1
    assert used >= FULL_USE or discretize.underuse_note(targets, NET, plan)
    assert discretize.discretize(NET, targets) == plan
    assert all(any(units) for units in plan.kept.values())


def test_uses_97_percent_at_the_budgets_that_people_ask_for():
    for seed in range(5):
        scatter(NET, seed)
        for text in ("2%", "1%", "0.5%", "0.25%"):
            targets = parse_targets({"bops": text}, NET.exact_usage())
            assert FULL_USE <= used_share(targets[0], NET.exact_usage(discretize.discretize(NET, targets))) <= 1


def test_changes_nothing_where_the_decisions_already_fit():
    scatter(NET, 3)
    now = NET.plan()
    cost = costs.bops(NET.exact_usage(now))
    soft = discretize.soft_decisions(NET)
    assert costs.bops(NET.exact_usage(soft.plan_at(0.0))) == cost


def test_several_targets_hold_together():
    scatter(NET, 1)
    targets = parse_targets({"bops": "1%", "size": "6%", "macs": "60%"}, NET.exact_usage())
    uses = NET.exact_usage(discretize.discretize(NET, targets))
    assert all(used_share(g, uses) <= 1 for g in targets)
    assert max(used_share(g, uses) for g in targets) >= FULL_USE


def test_impossible_targets_name_the_smallest_possible():
    targets = parse_targets({"bops": "0.0001%"}, NET.exact_usage())
    least = int(costs.bops(NET.exact_usage(discretize.cheapest_plan(NET))))
    assert {(x.w_bits, x.a_bits) for x in discretize.cheapest_plan(NET).layers.values()} == {(2, 2), (2, 8)}
    assert all(sum(units) == 1 for units in discretize.cheapest_plan(NET).kept.values())
    with pytest.raises(JpqError, match=f"{least:,}"):
        discretize.check_reachable(NET, targets)


def test_gates_that_count_are_judged_by_what_will_stay():
    """Dense at two bits this costs 0.39 %; with a tenth of the weights 0.3 % is possible."""
    masked = masks(NETWORK, "elementwise")
    make = lambda rows, n: Feedback(rows, n, density=0.1)  # noqa: E731
    network = attach(MODEL, NETWORK, masked, make, lambda _: (Learned(4, 2, 8), Learned(4, 2, 8)), [EXAMPLE], "dpf")
    targets = parse_targets({"bops": "0.3%"}, network.exact_usage())
    discretize.check_reachable(network, targets)
    with pytest.raises(JpqError, match="until the search ends"):
        discretize.discretize(network, targets)
    for step in range(20):
        network.after_step(step / 19)
    assert FULL_USE <= used_share(targets[0], network.exact_usage(discretize.discretize(network, targets))) <= 1
    with pytest.raises(JpqError, match=r"units that --density leaves. Keep less, allow fewer bits"):
        discretize.check_reachable(network, parse_targets({"bops": "0.001%"}, network.exact_usage()))


@pytest.mark.parametrize("seed", range(8))
def test_a_step_back_pays_for_a_step_forward_where_single_steps_are_too_coarse(seed, monkeypatch):
    """Found by CI: masks that landing may not choose leave eight widths, and one bit can be 4 % of all."""
    torch.manual_seed(seed)
    model = build("convnet", 10, 1)
    make = lambda rows, n: Feedback(rows, n, density=0.1)  # noqa: E731
    bits = lambda _: (Learned(4, 2, 8), Learned(4, 2, 8))  # noqa: E731
    network = attach(model, NETWORK, masks(NETWORK, "elementwise"), make, bits, [EXAMPLE], "dpf")
    for step in range(20):
        network.after_step(step / 19)
    targets = parse_targets({"bops": "0.3%"}, network.exact_usage())
    plan = discretize.discretize(network, targets)
    assert FULL_USE <= used_share(targets[0], network.exact_usage(plan)) <= 1
    assert discretize.underuse_note(targets, network, plan) is None
    monkeypatch.setattr(discretize, "trade_steps", lambda net, decisions, plan, targets: plan)
    single = discretize.discretize(network, targets)
    assert (
        plan == single or used_share(targets[0], network.exact_usage(single)) < FULL_USE
    )  # exchanged only where it must be


def test_powers_of_two_land_on_powers_of_two_and_say_what_they_leave():
    network = net(PowerOfTwo)
    scatter(network, 0)
    targets = parse_targets({"bops": "1%"}, network.exact_usage())
    plan = discretize.discretize(network, targets)
    assert {x.w_bits for x in plan.layers.values()} | {x.a_bits for x in plan.layers.values()} <= {2, 4, 8}
    assert used_share(targets[0], network.exact_usage(plan)) <= 1


def test_uniform_takes_the_dearest_balanced_pair_that_fits():
    network = net(Fixed, Frozen.all)
    targets = parse_targets({"bops": "1.6%"}, network.exact_usage())
    plan = decide_uniform_bits(network, targets, range(2, 9), range(2, 9))
    assert {(x.w_bits, x.a_bits) for n, x in plan.layers.items() if n != NETWORK.layers[0].name} == {(4, 4)}
    assert plan.layers[NETWORK.layers[0].name].a_bits == 8
    with pytest.raises(JpqError, match="smallest possible"):
        decide_uniform_bits(network, parse_targets({"bops": "0.1%"}, network.exact_usage()), range(2, 9), range(2, 9))


def test_search_starts_above_the_budget_within_the_bounds():
    targets = parse_targets({"bops": "1%"}, NET.exact_usage())
    w, a = start_bits(NETWORK, targets, (2, 8), (2, 8), 8)
    assert w == a
    assert 3.5 < w < 3.6  # W3.53A3.53 costs about 1.25 times 1 %
    assert start_bits(NETWORK, parse_targets({"bops": "0.1%"}, NET.exact_usage()), (2, 8), (2, 8), 8) == (3.0, 3.0)
    assert start_bits(NETWORK, parse_targets({"bops": "90%"}, NET.exact_usage()), (2, 8), (2, 6), 8) == (8.0, 6.0)


def test_exact_costs_are_whole_numbers():
    scatter(NET, 7)
    assert Fraction(costs.bops(NET.exact_usage())).denominator == 1
