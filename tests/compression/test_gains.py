"""Landing by gain per cost: what a table says is raised first, dead units last, and nothing changes without a table."""

import math
import random
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from convnet import convnet
from gated import check_no_step_fits, scatter

from jpq.compression import discretize
from jpq.compression.attach import attach
from jpq.compression.gains import Gains, _payments, spend_by_gain, trade_by_gain
from jpq.compression.ladders import Ladder
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


class Table:
    """Ladders of a toy whose plans are tuples of positions."""

    def __init__(self, *ladders):
        self.all = list(ladders)

    def positions(self, plan):
        return list(plan)

    def plan(self, base, positions, changed):
        return tuple(positions)


def toy(widths, units, prices, shifts=(0.5, 1.5)):
    """Gains of widths of 2 to 4 bits and sites of 1 to 3 units with these rows; a step of ladder i costs prices[i]."""
    ladders = [Ladder(f"layer{i}", "w", "", (2, 3, 4), shifts) for i in range(len(widths))]
    ladders += [Ladder("", "", f"site{i}", (1, 2, 3), shifts) for i in range(len(units))]
    bits = {(f"layer{i}", "w"): row for i, row in enumerate(widths) if row}
    table = Divergences(bits, {f"site{i}": row for i, row in enumerate(units)})
    return Gains(Table(*ladders), table, lambda plan: sum(p * x for p, x in zip(prices, plan, strict=True)))


def test_steps_that_gain_come_first_and_units_that_nothing_misses_last():
    gains = toy([{2: 1.0, 3: 0.99995, 4: 0.0}, {}], [{1: 1.0, 3: 0.0}, {1: 0.3, 3: 0.3}], [1.0] * 4)
    gains.ladders.all[3] = replace(gains.ladders.all[3], shifts=(-3.0, -2.0))  # the search had nearly opened them
    assert gains.fall(0, 0) == 0.0  # 0.005 % of the tensor's largest divergence: noise
    assert gains.fall(0, 1) == pytest.approx(0.99995)
    assert gains.fall(1, 0) == 0.0  # not measured
    assert gains.fall(2, 0) == gains.fall(2, 1) == pytest.approx(0.5)  # between the counts that were measured
    ranked = sorted(range(4), key=lambda i: gains.rank(i, [1, 0, 0, 0], 1.0))
    assert ranked == [0, 2, 1, 3]
    assert gains.rank(2, [0] * 4, 1.0) < gains.rank(0, [1, 0, 0, 0], 4.0)  # half the gain at a quarter of the cost


def test_steps_back_of_a_decision_come_in_order_whatever_its_row():
    gains = toy([{2: 1.02, 3: 1.0, 4: 0.0}, {2: 0.5, 3: 0.25, 4: 0.0}], [], [1.0, 1.0])
    payments = _payments(gains, (2, 2), [2, 2])
    assert [place for _, place, _ in payments] == [1, 1, 0, 0]  # the least loss first
    assert [shift for _, place, shift in payments if place == 0] == [1.5, 0.5]  # the dear step leads to the cheap one


def test_a_step_back_saves_what_it_saves_beyond_the_steps_before_it():
    """Rows by hand: 4 to 3 bits loses 1 for a cost of 2, 3 to 2 bits loses 6 for 2; a unit loses 2 for 8."""
    gains = toy([{2: 7.0, 3: 1.0, 4: 0.0}], [{1: 2.0, 2: 0.0, 3: 0.0}], [2.0, 8.0])
    payments = _payments(gains, (2, 2), [2, 2])
    assert [(place, shift) for _, place, shift in payments] == [(1, 1.5), (1, 0.5), (0, 1.5), (0, 0.5)]
    assert [rate for rate, _, _ in payments] == pytest.approx([0.0, 2 / 8, 1 / 2, 6 / 2])
    assert _payments(gains, (0, 0), [0, 0]) == []


def test_steps_that_cost_nothing_come_first_and_are_taken():
    gains = toy([{2: 0.2, 3: 0.1, 4: 0.0}, {2: 90.0, 3: 1.0, 4: 0.0}], [], [0.0, 1.0])
    assert gains.rank(0, [0, 0], 0.0) < gains.rank(1, [0, 0], 1.0)
    assert spend_by_gain(gains, (0, 0), within(gains, 1)[0]) == (2, 1)


@pytest.mark.parametrize(("behind", "after"), [(-1.0, (1, 0)), (-5.0, (0, 1))])
def test_nothing_that_lies_far_behind_pays_for_a_step(behind, after):
    gains = toy([{2: 1.0, 3: 0.0}, {2: 0.1, 3: 0.0}], [], [1.0, 1.0])
    rows = zip(gains.ladders.all, [(0.5,), (behind,)], strict=True)
    gains.ladders.all = [replace(ladder, values=(2, 3), shifts=shifts) for ladder, shifts in rows]
    gains.values = [[1.0, 0.0], [0.1, 0.0]]
    assert trade_by_gain(gains, (0, 1), *within(gains, 1)) == after


def test_each_step_is_the_best_one_at_the_costs_that_the_steps_before_left():
    """Costs are products, as those of bit-operations are: what one step costs depends on all others."""
    rng = random.Random(1)
    for _ in range(60):
        rows = [sorted((rng.random() for _ in range(3)), reverse=True) for _ in range(4)]
        gains = toy([dict(zip((2, 3, 4), row, strict=True)) for row in rows], [], [0.0] * 4)
        prices = [rng.uniform(0.2, 3.0) for _ in range(4)]
        gains.cost = lambda plan, prices=prices: math.prod(1 + p * x for p, x in zip(prices, plan, strict=True))
        fits, _ = within(gains, rng.uniform(2, 60))
        plan = (0,) * 4
        while True:
            more = [tuple(p + (k == i) for k, p in enumerate(plan)) for i in range(4)]
            open_ = [i for i in range(4) if plan[i] < 2 and fits(more[i])]
            if not open_:
                break

            def rate(i, plan=plan, more=more, gains=gains, rows=rows):
                return (rows[i][plan[i]] - rows[i][plan[i] + 1]) / (gains.cost(more[i]) - gains.cost(plan))

            plan = more[max(open_, key=rate)]
        assert spend_by_gain(gains, (0,) * 4, fits) == plan


def within(gains, limit):
    """(whether a plan keeps to a limit, whether it uses 97 % of it)."""
    return (lambda plan: gains.cost(plan) <= limit), (lambda plan: gains.cost(plan) >= 0.97 * limit)


def test_a_trade_fills_the_budget_and_predicts_less_or_changes_nothing():
    """Toys of random rows and prices: spending leaves room for no step, and no trade makes the prediction worse."""
    rng, traded = random.Random(0), 0
    for _ in range(300):
        rows = [sorted((rng.random() ** 3 for _ in range(3)), reverse=True) for _ in range(4)]
        gains = toy(
            [dict(zip((2, 3, 4), row, strict=True)) for row in rows[:2]],
            [dict(zip((1, 2, 3), row, strict=True)) for row in rows[2:]],
            [rng.randint(1, 9) for _ in range(4)],
        )
        fits, is_full = within(gains, rng.randint(5, 40))
        spent = spend_by_gain(gains, (0,) * 4, fits)
        assert fits(spent)
        for i in range(4):
            more = tuple(p + (k == i) for k, p in enumerate(spent))
            assert spent[i] == 2 or not fits(more)
        if is_full(spent):
            continue
        after = trade_by_gain(gains, spent, fits, is_full)
        assert fits(after)
        if after != spent:
            traded += 1
            assert is_full(after)
            assert sum(rows[i][p] for i, p in enumerate(after)) < sum(rows[i][p] for i, p in enumerate(spent))
    assert traded > 10
