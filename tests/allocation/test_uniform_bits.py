"""Uniform bits, and those with wider ends: what is found beside every plan of its kind, one by one."""

from itertools import product

import pytest
import torch

import jpq
from jpq.allocation.prepare import prepare
from jpq.allocation.uniform_bits import uniform_plan, widest_plans_with_wider_ends, widest_uniform_plans
from jpq.compression.build import network_targets
from jpq.config import Budget, Config, Decide
from jpq.costs import bops
from jpq.costs.target import all_met
from jpq.tasks import build_model
from jpq.types import JpqError

FIRST, LAST = "conv1", "linear"
WIDTHS = range(2, 9)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = build_model("resnet8", 10).eval()
    x = torch.randn(2, 3, 32, 32)
    return prepare(model, x, Decide(method="uniform"), Budget(target_bops="1%")).attach(model, [x])


def targets_of(net, share):
    return network_targets(net.network, Budget(target_bops=share))


def ends(width, a_width=8):
    return {(FIRST, "w"): width, (LAST, "w"): width, (LAST, "a"): a_width}


def cost(net, plan):
    return float(bops(net.exact_usage(plan)))


def widths_of(plan):
    """(weights of the body, its inputs, weights of the first layer, of the last, what the last reads)."""
    body = next(layer for name, layer in plan.layers.items() if name not in (FIRST, LAST))
    return (
        body.w_bits,
        body.a_bits,
        plan.layers[FIRST].w_bits,
        plan.layers[LAST].w_bits,
        plan.layers[LAST].a_bits,
    )


def maximal(plans):
    """The plans that no other one exceeds in its widths."""
    widths = {widths_of(plan) for plan in plans}

    def exceeds(x, y):
        return x != y and all(a >= b for a, b in zip(x, y, strict=True))

    return {w for w in widths if not any(exceeds(other, w) for other in widths)}


@pytest.mark.parametrize("share", ["0.5%", "0.7%", "1%", "2%", "5%", "20%"])
def test_wider_ends_are_the_widest_of_all_balanced_plans_that_fit(net, share):
    targets = targets_of(net, share)
    every = [
        uniform_plan(net, w, a, pinned=ends(end))
        for w, a, end in product(WIDTHS, WIDTHS, range(4, 9))
        if abs(w - a) <= 1 and w <= end
    ]
    fit = [plan for plan in every if all_met(targets, net.exact_usage(plan))]
    found = widest_plans_with_wider_ends(net, targets, WIDTHS, WIDTHS)
    assert {widths_of(plan) for plan in found} == maximal(fit)
    assert cost(net, found[0]) == max(cost(net, plan) for plan in fit)


@pytest.mark.parametrize("share", ["0.7%", "1%", "2%", "5%"])
def test_uniform_bits_are_the_widest_of_all_balanced_pairs_that_fit(net, share):
    targets = targets_of(net, share)
    pairs = [uniform_plan(net, w, a) for w, a in product(WIDTHS, WIDTHS) if abs(w - a) <= 1]
    fit = [plan for plan in pairs if all_met(targets, net.exact_usage(plan))]
    found = widest_uniform_plans(net, targets, WIDTHS, WIDTHS)
    assert {widths_of(plan) for plan in found} == maximal(fit)
    assert cost(net, found[0]) == max(cost(net, plan) for plan in fit)


def test_an_unbalanced_pair_is_taken_only_where_no_balanced_one_fits(net):
    targets = targets_of(net, "1.2%")
    (plan,) = widest_uniform_plans(net, targets, [2, 3], [5])
    assert widths_of(plan)[:2] == (2, 5)


def test_wider_ends_use_the_widths_that_are_allowed_and_keep_pinned_ones(net):
    targets = targets_of(net, "2%")
    for plan in widest_plans_with_wider_ends(net, targets, (2, 4, 8), (2, 4), {("layer1.0.conv1", "w"): 8}):
        assert plan.layers["layer1.0.conv1"].w_bits == 8
        assert {layer.w_bits for layer in plan.layers.values()} <= {2, 4, 8}
        assert plan.layers[LAST].a_bits == 4
    for plan in widest_plans_with_wider_ends(net, targets, (2, 3), (2, 3)):
        assert {layer.w_bits for layer in plan.layers.values()} <= {2, 3}


def test_a_budget_that_no_wider_ends_meet_names_the_smallest(net):
    with pytest.raises(JpqError, match=r"smallest possible: 61,362,176, at 2 and 2 bits\..* leave wider_ends out"):
        widest_plans_with_wider_ends(net, targets_of(net, "0.45%"), WIDTHS, WIDTHS)


def test_the_uniform_method_takes_wider_ends_when_asked():
    torch.manual_seed(0)
    model, x = build_model("resnet8", 10).eval(), torch.randn(8, 3, 32, 32)
    plain = jpq.compress(model, x, method="uniform", bops="0.5%")
    wider = jpq.compress(model, x, method="uniform", bops="0.5%", wider_ends=True)
    for session in (plain, wider):
        session.discretize()
    assert widths_of(plain.net.plan())[2:4] == (2, 2)
    assert widths_of(wider.net.plan()) == (2, 2, 4, 4, 8)


@pytest.mark.parametrize("settings", [{"method": "djpq"}, {"bits": "4/4"}])
def test_wider_ends_of_another_method_are_refused(settings):
    with pytest.raises(JpqError, match=r"wider_ends is for method uniform, not for (djpq|by-hand)"):
        Config(budget=Budget(target_bops="1%"), decide=Decide(wider_ends=True, **settings)).check()
