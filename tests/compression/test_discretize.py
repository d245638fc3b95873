"""Landing: under every target, at least 97 % of the tightest used, deterministic, and never above on any draw."""

from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import product

import pytest
import torch
from convnet import convnet
from gated import check_no_step_fits, scatter
from hypothesis import given, settings
from hypothesis import strategies as st

from jpq import costs
from jpq.allocation.uniform_bits import decide_uniform_bits, start_bits, uniform_plan, widest_uniform_plans
from jpq.compression import discretize, feasibility
from jpq.compression.attach import attach
from jpq.compression.soft_decisions import BOTTOM, soft_decisions
from jpq.costs.target import FULL_USE, all_met, parse_targets, used_share
from jpq.methods.gates import VIB, DeadZone, Feedback, Frozen
from jpq.methods.quantizers import Fixed, Learned, PowerOfTwo
from jpq.tasks.models import build
from jpq.tracing.sites import channels, masks
from jpq.types import JpqError


def net(width=Learned, gate=VIB, high=8):
    def widths(layer):
        make = (lambda: Fixed(high, tuple(range(2, high + 1)))) if width is Fixed else (lambda: width(high, 2, high))
        return make(), Fixed(8) if layer.reads_input else make()

    sites = channels(convnet().network) if gate is VIB else ()
    return attach(convnet().model, convnet().network, sites, gate, widths, [convnet().example], "djpq")


@cache
def shared_net():
    """The convnet with gates and learned widths; tests set its decisions."""
    return net()


@given(seed=st.integers(0, 10**6), share=st.floats(0.0005, 0.06))
@settings(max_examples=40, deadline=None)
def test_lands_under_the_target_and_uses_it(seed, share):
    scatter(shared_net(), seed)
    targets = parse_targets({"bops": f"{100 * share:.4f}%"}, shared_net().exact_usage())
    plan = discretize.discretize(shared_net(), targets)
    assert used_share(targets[0], shared_net().exact_usage(plan)) <= 1
    check_no_step_fits(shared_net(), targets, plan)
    assert discretize.discretize(shared_net(), targets) == plan
    assert all(any(units) for units in plan.kept.values())


@given(seed=st.integers(0, 10**6), share=st.floats(0.0005, 0.06))
@settings(max_examples=25, deadline=None)
def test_no_unit_opens_below_one_that_stays_closed(seed, share):
    """Whatever single steps and trades opened or closed: of a site, the units of largest margin are kept."""
    scatter(shared_net(), seed)
    margins = soft_decisions(shared_net()).margins
    targets = parse_targets({"bops": f"{100 * share:.4f}%"}, shared_net().exact_usage())
    plan = discretize.discretize(shared_net(), targets)
    for site, units in plan.kept.items():
        kept = [m for m, stays in zip(margins[site], units, strict=True) if stays]
        closed = [m for m, stays in zip(margins[site], units, strict=True) if not stays]
        assert not closed or min(kept) >= max(closed)


@given(seed=st.integers(0, 10**6), share=st.floats(0.003, 0.02))
@settings(max_examples=10, deadline=None)
def test_no_weight_of_a_mask_opens_below_one_that_stays_closed(seed, share):
    network = zero_bins()
    torch.manual_seed(seed)
    for p in network.decisions()["gates"]:
        p.data.uniform_(0.1, 3)
    soft = soft_decisions(network)
    targets = parse_targets({"bops": f"{100 * share:.4f}%"}, network.exact_usage())
    plan = discretize.discretize(network, targets)
    for layer, margins in soft.masks.items():
        keep = plan.masks[layer].units()
        assert keep.all() or float(margins[keep].min()) >= float(margins[~keep].max())


@cache
def zero_bins():
    """The convnet with a dead zone on every weight and learned widths; tests set its decisions."""
    model, example, network = convnet()
    bits = lambda _: (Learned(4, 2, 8), Learned(4, 2, 8))  # noqa: E731
    return attach(model, network, masks(network, "elementwise"), DeadZone, bits, [example], "codeq")


def test_uses_97_percent_at_the_budgets_that_people_ask_for():
    for seed in range(5):
        scatter(shared_net(), seed)
        for text in ("2%", "1%", "0.5%", "0.25%"):
            targets = parse_targets({"bops": text}, shared_net().exact_usage())
            plan = discretize.discretize(shared_net(), targets)
            assert FULL_USE <= used_share(targets[0], shared_net().exact_usage(plan)) <= 1
            assert feasibility.underuse_note(targets, shared_net(), plan) is None
    loose = parse_targets({"bops": "50%"}, shared_net().exact_usage())
    assert str(feasibility.underuse_note(loose, shared_net(), plan)).startswith("0.5 % of --target-bops 50% is used: ")


def test_the_reason_for_what_is_left_of_a_budget_is_true():
    """Units that are closed, and widths that are narrower, though the target has room for them, are so by choice."""
    scatter(shared_net(), 0)
    full = soft_decisions(shared_net()).plan_at(BOTTOM)
    uses = shared_net().exact_usage(full)
    loose = parse_targets({"bops": str(4 * costs.bops(uses))}, uses)
    site, units = max(full.kept.items(), key=lambda entry: len(entry[1]))
    all_units = sum(len(kept) for kept in full.kept.values())
    pruned = replace(full, kept={**full.kept, site: (False, False, *units[2:])})
    note = feasibility.underuse_note(loose, shared_net(), pruned)
    assert str(note).endswith(f" is used: 2 of {all_units} units were closed by choice, not for the target.")
    name = list(full.layers)[1]
    narrow = replace(full, layers={**full.layers, name: replace(full.layers[name], w_bits=3)})
    note = feasibility.underuse_note(loose, shared_net(), narrow)
    assert str(note).endswith(
        f" is used: wider bits for the weight of {name} alone would fit, and were left out by choice."
    )
    assert "every decision is at its largest" in str(feasibility.underuse_note(loose, shared_net(), full))


def test_changes_nothing_where_the_decisions_already_fit():
    scatter(shared_net(), 3)
    now = shared_net().plan()
    cost = costs.bops(shared_net().exact_usage(now))
    soft = soft_decisions(shared_net())
    assert costs.bops(shared_net().exact_usage(soft.plan_at(0.0))) == cost


def test_several_targets_hold_together():
    scatter(shared_net(), 1)
    targets = parse_targets({"bops": "1%", "size": "6%", "macs": "60%"}, shared_net().exact_usage())
    uses = shared_net().exact_usage(discretize.discretize(shared_net(), targets))
    assert all(used_share(g, uses) <= 1 for g in targets)
    assert max(used_share(g, uses) for g in targets) >= FULL_USE


def test_impossible_targets_name_the_smallest_possible():
    targets = parse_targets({"bops": "0.0001%"}, shared_net().exact_usage())
    least = int(costs.bops(shared_net().exact_usage(feasibility.cheapest_plan(shared_net()))))
    assert {(x.w_bits, x.a_bits) for x in feasibility.cheapest_plan(shared_net()).layers.values()} == {(2, 2), (2, 8)}
    assert all(sum(units) == 1 for units in feasibility.cheapest_plan(shared_net()).kept.values())
    with pytest.raises(JpqError, match=f"{least:,}"):
        feasibility.check_reachable(shared_net(), targets)


def test_gates_that_count_are_judged_by_what_will_stay():
    """Dense at two bits this costs 0.39 %; with a tenth of the weights 0.3 % is possible."""
    masked = masks(convnet().network, "elementwise")
    make = lambda rows, n: Feedback(rows, n, density=0.1)  # noqa: E731
    network = attach(
        convnet().model,
        convnet().network,
        masked,
        make,
        lambda _: (Learned(4, 2, 8), Learned(4, 2, 8)),
        [convnet().example],
        "dpf",
    )
    targets = parse_targets({"bops": "0.3%"}, network.exact_usage())
    feasibility.check_reachable(network, targets)
    with pytest.raises(JpqError, match="until the search ends"):
        discretize.discretize(network, targets)
    for step in range(20):
        network.after_step(step / 19)
    assert FULL_USE <= used_share(targets[0], network.exact_usage(discretize.discretize(network, targets))) <= 1
    with pytest.raises(JpqError, match=r"units that density leaves. Keep less, allow fewer bits"):
        feasibility.check_reachable(network, parse_targets({"bops": "0.001%"}, network.exact_usage()))


@pytest.mark.parametrize("seed", range(8))
def test_a_step_back_pays_for_a_step_forward_where_single_steps_are_too_coarse(seed, monkeypatch):
    """Found by CI: masks that landing may not choose leave eight widths, and one bit can be 4 % of all."""
    torch.manual_seed(seed)
    model = build("convnet", 10, 1)
    make = lambda rows, n: Feedback(rows, n, density=0.1)  # noqa: E731
    bits = lambda _: (Learned(4, 2, 8), Learned(4, 2, 8))  # noqa: E731
    network = attach(
        model, convnet().network, masks(convnet().network, "elementwise"), make, bits, [convnet().example], "dpf"
    )
    for step in range(20):
        network.after_step(step / 19)
    targets = parse_targets({"bops": "0.3%"}, network.exact_usage())
    plan = discretize.discretize(network, targets)
    assert FULL_USE <= used_share(targets[0], network.exact_usage(plan)) <= 1
    assert feasibility.underuse_note(targets, network, plan) is None
    monkeypatch.setattr(discretize, "trade_steps", lambda net, decisions, plan, *_: plan)
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
    full = soft_decisions(network).plan_at(BOTTOM)
    loose = parse_targets({"bops": str(4 * costs.bops(network.exact_usage(full)))}, network.exact_usage())
    assert "(the next wider bits somewhere, or one more unit)" in str(feasibility.underuse_note(loose, network, full))


def test_uniform_takes_the_dearest_balanced_pair_that_fits():
    network = net(Fixed, Frozen.all)
    targets = parse_targets({"bops": "1.6%"}, network.exact_usage())
    plan = decide_uniform_bits(network, targets, range(2, 9), range(2, 9))
    assert {(x.w_bits, x.a_bits) for n, x in plan.layers.items() if n != convnet().network.layers[0].name} == {(4, 4)}
    assert plan.layers[convnet().network.layers[0].name].a_bits == 8
    with pytest.raises(JpqError, match="smallest possible"):
        decide_uniform_bits(network, parse_targets({"bops": "0.1%"}, network.exact_usage()), range(2, 9), range(2, 9))


@pytest.mark.parametrize("share", ["0.7%", "1%", "1.3%", "2%", "3%", "90%"])
def test_neither_width_of_the_widest_uniform_plans_can_be_larger(share):
    network, widths = net(Fixed, Frozen.all), range(2, 9)
    targets = parse_targets({"bops": share}, network.exact_usage())
    plans = widest_uniform_plans(network, targets, widths, widths)
    assert plans[0] == decide_uniform_bits(network, targets, widths, widths)
    inner = list(plans[0].layers)[-1]  # not of the image
    pairs = [(plan.layers[inner].w_bits, plan.layers[inner].a_bits) for plan in plans]
    fitting = {
        (w, a)
        for w, a in product(widths, widths)
        if abs(w - a) <= 1 and all_met(targets, network.exact_usage(uniform_plan(network, w, a)))
    }
    assert set(pairs) == {x for x in fitting if not any(y != x and y[0] >= x[0] and y[1] >= x[1] for y in fitting)}
    assert len(set(pairs)) == len(pairs)


def test_search_starts_above_the_budget_within_the_bounds():
    targets = parse_targets({"bops": "1%"}, shared_net().exact_usage())
    w, a = start_bits(convnet().network, targets, (2, 8), (2, 8), 8)
    assert w == a
    assert 3.5 < w < 3.6  # W3.53A3.53 costs about 1.25 times 1 %
    assert start_bits(
        convnet().network, parse_targets({"bops": "0.1%"}, shared_net().exact_usage()), (2, 8), (2, 8), 8
    ) == (3.0, 3.0)
    assert start_bits(
        convnet().network, parse_targets({"bops": "90%"}, shared_net().exact_usage()), (2, 8), (2, 6), 8
    ) == (8.0, 6.0)


@pytest.mark.parametrize(("alone", "with_macs"), [({}, (8.0, 6.0)), ({"bops": "1%"}, None), ({"size": "12%"}, None)])
def test_a_target_for_macs_leaves_a_search_the_bits_that_it_starts_from(alone, with_macs):
    uses, bounds = shared_net().exact_usage(), ((2, 8), (2, 6), 8)
    expected = with_macs or start_bits(convnet().network, parse_targets(alone, uses), *bounds)
    both = parse_targets({**alone, "macs": "20%"}, uses)
    assert start_bits(convnet().network, both, *bounds) == expected
    assert min(expected) > 3


def test_exact_costs_are_whole_numbers():
    scatter(shared_net(), 7)
    assert Fraction(costs.bops(shared_net().exact_usage())).denominator == 1
