"""Prune first, then quantize: everything planned at the start, two phases of training, a budget that is used up."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from convnet import EXAMPLE, ranked
from runs import QUICK, Stop, config, outcome, resumed, shortened
from thinned import thinned

import jpq
from jpq import costs
from jpq.allocation import two_stage
from jpq.costs.target import FULL_USE, parse_targets, used_share
from jpq.tasks.models import build
from jpq.training import epochs
from jpq.types import JpqError


def pair(net, plan):
    """(weight bits, activation bits), the same in every layer; the image keeps its own."""
    image = {layer.name for layer in net.network.layers if layer.reads_input}
    (w,) = {x.w_bits for x in plan.layers.values()}
    (a,) = {x.a_bits for name, x in plan.layers.items() if name not in image}
    assert {x.a_bits for name, x in plan.layers.items() if name in image} == {8}
    return w, a


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    asked = shortened(config(tmp_path_factory.mktemp("runs"), "two-stage"), epochs=4, float_epochs=3)
    return asked, jpq.optimize(asked)


def test_two_phases_and_a_budget_that_is_used_up(finished):
    _, result = finished
    assert [(r.phase, r.epoch) for r in result.history] == [
        *(("float", e) for e in (1, 2, 3)),
        *(("search", e) for e in (1, 2)),
        *(("fine-tune", e) for e in (1, 2)),
    ]
    first, last = (next(r for r in result.history if r.phase == name) for name in ("search", "fine-tune"))
    assert first.kept == last.kept < 1  # the same channels in both
    assert first.w_bits == 8 > last.w_bits
    assert 0.97 <= result.targets["bops"]["used"] <= 1
    assert all("near chance" in note for note in result.notes)  # trained for three epochs
    assert len({x.w_bits for x in result.layers}) == 1
    assert result.verified["masked_vs_rebuilt_float64"] <= 1e-10
    small, plan = jpq.load(result.folder)
    assert plan.method == "two-stage"
    assert jpq.measure(small, torch.rand(1, 1, 8, 8))["bops"] == result.compressed.bops


@pytest.mark.slow  # as test_resume.py, which resumes another method in the fast suite
@pytest.mark.parametrize("phase", ["search", "fine-tune"])
def test_resuming_gives_the_same_bits_as_never_stopping(phase, finished, tmp_path):
    asked, whole = finished
    assert outcome(resumed(asked, tmp_path, phase, final=False)) == outcome(whole, tested=False)


SHARES, DENSITIES = ["0.3%", "1%", "2.5%"], [0.1, 0.3, 0.5, 0.8, 1.0]


# fast: each density, and each share about twice
@pytest.mark.parametrize(("share", "density"), thinned(product(SHARES, DENSITIES), lambda i, _: i % 3 == 0))
def test_the_plan_meets_the_budget_at_the_widest_bits_that_the_density_allows(density, share):
    net = ranked()
    targets = parse_targets({"bops": share}, net.exact_usage())
    plan = two_stage.decide_two_stage(net, targets, (2, 8), (2, 8), density)
    used = used_share(targets[0], net.exact_usage(plan))
    whole = pair(net, plan) == (8, 8) and all(all(units) for units in plan.kept.values())
    assert FULL_USE <= used <= 1 or whole
    w, a = pair(net, plan)
    assert abs(w - a) <= 1
    full = costs.baseline(net.exact_usage())["macs"]
    if (w, a) not in ((2, 2), (8, 8)):  # one more step of bits would not fit at the density
        assert costs.macs(net.exact_usage(plan)) < min(full, 2 * density * full) or used >= FULL_USE
    assert plan == two_stage.decide_two_stage(net, targets, (2, 8), (2, 8), density)


def test_a_smaller_density_buys_wider_bits():
    net = ranked()
    targets = parse_targets({"bops": "0.8%"}, net.exact_usage())
    bits = [
        sum(pair(net, two_stage.decide_two_stage(net, targets, (2, 8), (2, 8), density)))
        for density in (1.0, 0.5, 0.25, 0.1)
    ]
    assert bits == sorted(bits)
    assert bits[0] < bits[-1]


def test_channels_go_in_the_order_of_their_ranks():
    net = ranked()
    plan = two_stage.decide_two_stage(net, parse_targets({"bops": "0.7%"}, net.exact_usage()), (2, 8), (2, 8), 0.4)
    for site, gate in zip(net.sites, net.gates, strict=True):
        kept = torch.tensor(plan.kept[site.name])
        assert gate.margins[0, kept].min() > gate.margins[0, ~kept].max()


def test_a_budget_below_the_smallest_bits_at_the_density_closes_more_channels():
    net = ranked()
    targets = parse_targets({"bops": "0.05%"}, net.exact_usage())
    plan = two_stage.decide_two_stage(net, targets, (4, 8), (4, 8), 1.0)
    assert pair(net, plan) == (4, 4)
    assert FULL_USE <= used_share(targets[0], net.exact_usage(plan)) <= 1


def test_several_targets_hold_together():
    net = ranked()
    targets = parse_targets({"bops": "2%", "macs": "30%", "size": "20KB"}, net.exact_usage())
    uses = net.exact_usage(two_stage.decide_two_stage(net, targets, (2, 8), (2, 8), 0.5))
    assert all(used_share(goal, uses) <= 1 for goal in targets)
    assert max(used_share(goal, uses) for goal in targets) >= FULL_USE


@pytest.mark.parametrize(
    ("bops", "decide", "says"),
    [
        ("0.0001%", {}, "smallest possible"),
        ("1%", {"density": 1e-6}, r"density=1e-06 cannot be met.*of the MACs stay"),
        ("1%", {"density": 0.0}, "density=0"),
        ("1%", {"score": "l3"}, "l1"),
        ("1%", {"structure": "elementwise"}, "structure"),
    ],
)
def test_what_cannot_be_ends_before_training(bops, decide, says, tmp_path):
    asked = config(tmp_path, "two-stage", target_bops=bops)
    watch = Stop("float", 1)
    with pytest.raises(JpqError, match=says):
        jpq.optimize(replace(asked, decide=replace(asked.decide, **decide)), watch)
    assert not hasattr(watch, "next")


def test_in_a_loop_of_ones_own_landing_quantizes():
    torch.manual_seed(0)
    net = jpq.compress(build("convnet", 10, 1).eval(), EXAMPLE, method="two-stage", bops="1%", density=0.6)
    before = net.net.plan()
    assert pair(net.net, before) == (8, 8)
    assert float(net.pressure()) == 0
    after = net.discretize()
    assert after.kept == before.kept
    assert 0.97 <= net.share() / 0.01 <= 1
    assert net.discretize() == after
    small = net.finalize()
    assert jpq.measure(small, EXAMPLE)["bops"] == costs.bops(net.net.exact_usage())


def test_ranges_of_stage_two_are_fitted_to_what_the_pruned_network_reads():
    net = ranked()
    plan = two_stage.decide_two_stage(net, parse_targets({"bops": "0.5%"}, net.exact_usage()), (2, 8), (2, 8), 0.3)
    net.freeze(two_stage.first_stage_plan(net, plan))
    for p in net.weights()["decayed"]:
        p.data.mul_(3)
    last = net.network.layers[-1].name
    seen = net.calibration_samples[last].clone()
    two_stage.start_second_stage(net, plan, [EXAMPLE])
    assert net.calibration_samples[last].abs().max() != seen.abs().max()
    assert net.plan().layers == plan.layers


def test_epochs_are_as_many_as_every_other_method_has(tmp_path):
    asked = config(tmp_path, "two-stage", replace(QUICK, epochs=10, search=0.3))
    for method in ("djpq", "two-stage"):
        assert epochs.split_epochs(asked, jpq.METHODS[method]) == (3, 7)


def test_bits_that_cost_nothing_of_the_target_stay_wide():
    """Bytes are paid by weights: activations must not end at 2 bits where channels had to pay."""
    net = ranked(2)
    targets = parse_targets({"size": "3%"}, net.exact_usage())
    plan = two_stage.decide_two_stage(net, targets, (2, 8), (2, 8), 0.5)
    w, a = pair(net, plan)
    assert w == 2
    assert a > 2
    assert used_share(targets[0], net.exact_usage(plan)) <= 1
