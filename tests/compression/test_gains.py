"""Landing by gain per cost: what a table says is raised first, dead units last, and nothing changes without a table."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from convnet import convnet
from gated import check_no_step_fits, scatter

from jpq.compression import discretize
from jpq.compression.attach import attach
from jpq.compression.soft_decisions import soft_decisions
from jpq.costs.target import parse_targets, used_share
from jpq.methods.gates import VIB
from jpq.methods.quantizers import Fixed, Learned
from jpq.tracing.sites import channels


@dataclass
class Divergences:
    bits: dict = field(default_factory=dict)
    units: dict = field(default_factory=dict)


def net():
    def widths(layer):
        return Learned(4, 2, 8), Fixed(8) if layer.reads_input else Learned(4, 2, 8)

    return attach(
        convnet().model, convnet().network, channels(convnet().network), VIB, widths, [convnet().example], "djpq"
    )


def flat_but(network, key, fall=1.0):
    """Divergences that only the width of one tensor lowers."""
    rows = {k: dict.fromkeys(range(2, 9), 0.0) for k in soft_decisions(network).widths}
    rows[key] = {b: fall * (8 - b) for b in range(2, 9)}
    return Divergences(rows, {s.name: dict.fromkeys(range(1, s.n + 1), 0.0) for s in network.sites})


def landed(network, plan, factor, divergences):
    """The plan after `factor` times its cost is spent."""
    uses = network.exact_usage(plan)
    share = f"{100 * factor * float(used_share(parse_targets({'bops': '100%'}, uses)[0], uses)):.5f}%"
    targets = parse_targets({"bops": share}, uses)
    after = discretize.spend_slack(network, soft_decisions(network), plan, targets, divergences)
    assert all(used_share(t, network.exact_usage(after)) <= 1 for t in targets)
    return after, targets


@pytest.mark.parametrize("side", ["w", "a"])
def test_the_slack_goes_to_the_tensor_whose_bits_gain(side):
    network = net()
    plan = soft_decisions(network).plan_at(0.0)
    names = [name for name in plan.layers if not network.network.layer(name).reads_input]
    for name in names:
        after, targets = landed(network, plan, 1.8, flat_but(network, (name, side)))
        bits = {n: x.w_bits if side == "w" else x.a_bits for n, x in after.layers.items() if n in names}
        assert bits[name] == max(bits.values()) > 4
        check_no_step_fits(network, targets, after)


def test_dead_units_stay_closed_while_bits_can_grow():
    network = net()
    decisions = soft_decisions(network)
    plan = decisions.plan_at(0.0)
    site = max(network.sites, key=lambda s: s.n)
    alive = set(decisions.order[site.name][: site.n - 1])
    plan = replace(plan, kept={**plan.kept, site.name: tuple(u in alive for u in range(site.n))})
    rising = Divergences(
        {k: {b: float(2.0**-b) for b in range(2, 9)} for k in decisions.widths},
        {s.name: dict.fromkeys(range(1, s.n + 1), 0.0) for s in network.sites},
    )
    after, _ = landed(network, plan, 1.6, rising)
    assert after.kept == plan.kept
    assert sum(x.w_bits + x.a_bits for x in after.layers.values()) > sum(
        x.w_bits + x.a_bits for x in plan.layers.values()
    )
    needed = Divergences(rising.bits, {site.name: {1: 100.0, site.n - 1: 50.0, site.n: 0.0}})
    after, _ = landed(network, plan, 1.6, needed)
    assert all(after.kept[site.name])


@pytest.mark.parametrize("seed", range(6))
def test_landing_by_gain_meets_the_target_and_never_predicts_more_than_without(seed):
    network = net()
    scatter(network, seed)
    keys = soft_decisions(network).widths
    table = Divergences(
        {k: {b: (1 + i % 5) * 4.0**-b for b in range(2, 9)} for i, k in enumerate(keys)},
        {s.name: {k: (s.n - k) / s.n for k in range(1, s.n + 1)} for s in network.sites},
    )
    targets = parse_targets({"bops": "0.8%"}, network.exact_usage())
    by_gain = discretize.discretize(network, targets, divergences=table)
    assert used_share(targets[0], network.exact_usage(by_gain)) <= 1
    assert by_gain == discretize.discretize(network, targets, divergences=table)
    check_no_step_fits(network, targets, by_gain)


def test_steps_follow_falling_gain_per_cost():
    """Spent in small portions, each portion's gain per cost is at most the one's before it (for convex rows)."""
    network = net()
    decisions = soft_decisions(network)
    plan = decisions.plan_at(-1.0)
    table = Divergences({k: {b: 4.0**-b for b in range(2, 9)} for k in decisions.widths}, {})

    def predicted(plan):
        return sum(4.0**-x.w_bits + 4.0**-x.a_bits for x in plan.layers.values())

    def cost(plan):
        uses = network.exact_usage(plan)
        return float(used_share(parse_targets({"bops": "100%"}, uses)[0], uses))

    plans = [plan] + [landed(network, plan, 1 + 0.5 * i, table)[0] for i in range(1, 4)]
    falls = [predicted(a) - predicted(b) for a, b in pairwise(plans)]
    costs = [cost(p) for p in plans]
    assert all(f > 0 for f in falls)
    assert costs == sorted(costs)
