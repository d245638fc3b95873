"""Ladders: blocks of steps give the plan of single steps one by one, in far fewer evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
from gated import compressed, scatter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import jpq
from jpq.compression import discretize, ladders
from jpq.compression.channel_counts import rounding_point
from jpq.compression.ladders import LARGEST_GAP, Ladders
from jpq.compression.model import CompressedModel
from jpq.compression.soft_decisions import BOTTOM, NATS, SoftDecisions, soft_decisions
from jpq.costs.target import FULL_USE, Target, all_met, parse_targets, used_share
from jpq.plan import Plan


class Step(NamedTuple):
    shift: float
    name: str
    plan: Plan


def single_steps(decisions: SoftDecisions, plan: Plan, forward: bool) -> Iterator[Step]:
    """Every single step from a plan, from the widths and margins themselves."""
    for (name, side), width in decisions.widths.items():
        layer = plan.layers[name]
        bits = layer.w_bits if side == "w" else layer.a_bits
        others = [c for c in width.choices if (c > bits if forward else c < bits)]
        if others:
            new = others[0] if forward else others[-1]
            changed = replace(layer, w_bits=new) if side == "w" else replace(layer, a_bits=new)
            shift = width.switch(min(bits, new), max(bits, new)) - width.soft()
            yield Step(shift, f"{name} {side}", replace(plan, layers={**plan.layers, name: changed}))
    for site, margins in decisions.margins.items():
        order, now = decisions.order[site], sum(plan.kept[site])
        others = [c for c in decisions.counts[site] if (c > now if forward else c < now)]
        if others:
            new = others[0] if forward else others[-1]
            turning = order[rounding_point(min(now, new), max(now, new)) - 1]
            kept = tuple(unit in order[:new] for unit in range(len(margins)))
            yield Step(-margins[turning] / NATS, site, replace(plan, kept={**plan.kept, site: kept}))


def spend_one_by_one(net: CompressedModel, decisions: SoftDecisions, plan: Plan, targets: list[Target]) -> Plan:
    too_dear: set[str] = set()
    while True:
        steps = sorted(single_steps(decisions, plan, True), key=lambda s: s.shift)
        for step in (s for s in steps if s.name not in too_dear):
            if all_met(targets, net.exact_usage(step.plan)):
                plan = step.plan
                break
            too_dear.add(step.name)
        else:
            return plan


def trade_one_by_one(net: CompressedModel, decisions: SoftDecisions, plan: Plan, targets: list[Target]) -> Plan:
    for more in sorted(single_steps(decisions, plan, True), key=lambda s: s.shift):
        candidate: Plan | None = more.plan
        while candidate is not None and not all_met(targets, net.exact_usage(candidate)):
            back = sorted(single_steps(decisions, candidate, False), key=lambda s: -s.shift)
            nearest = next((s for s in back if s.name != more.name), None)
            candidate = nearest.plan if nearest and more.shift - nearest.shift <= LARGEST_GAP else None
        if candidate is not None:
            candidate = spend_one_by_one(net, decisions, candidate, targets)
            if max(used_share(t, net.exact_usage(candidate)) for t in targets) >= FULL_USE:
                return candidate
    return plan


@cache
def nets(name: str) -> CompressedModel:
    return compressed(name, dtype=torch.float32)[1]


@pytest.mark.parametrize("name", ["residual", "concat", "depthwise", "shared"])
@given(
    seed=st.integers(0, 10**6), share=st.floats(0.006, 0.05), shift=st.floats(-3, 1), multiple=st.sampled_from([1, 4])
)
@settings(max_examples=12, deadline=None)
def test_blocks_give_the_plan_of_single_steps(name: str, seed: int, share: float, shift: float, multiple: int) -> None:
    net = nets(name)
    net.multiple = multiple
    scatter(net, seed)
    targets = list(parse_targets({"bops": f"{100 * share:.4f}%", "size": "20%"}, net.exact_usage()))
    decisions = soft_decisions(net)
    plan = decisions.plan_at(shift)
    if not all_met(targets, net.exact_usage(plan)):
        plan = decisions.plan_at(-BOTTOM)
    if not all_met(targets, net.exact_usage(plan)):
        return
    spent = discretize.spend_slack(net, decisions, plan, targets)
    assert spent == spend_one_by_one(net, decisions, plan, targets)
    assert discretize.trade_steps(net, decisions, spent, targets) == trade_one_by_one(net, decisions, spent, targets)


def test_thousands_of_units_take_few_evaluations() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 3000), nn.ReLU(), nn.Linear(3000, 2000), nn.ReLU(), nn.Linear(2000, 4))
    net = jpq.compress(model, torch.randn(4, 8), bops="2%", steps=2).net
    decisions, count = soft_decisions(net), 0
    targets = parse_targets({"bops": "2%", "macs": "70%"}, net.exact_usage())

    def fits(plan: Plan) -> bool:
        nonlocal count
        count += 1
        return all_met(targets, net.exact_usage(plan))

    plan = ladders.spend(Ladders(decisions, NATS), decisions.plan_at(-BOTTOM), fits)
    assert sum(map(sum, plan.kept.values())) > 2000
    assert max(used_share(t, net.exact_usage(plan)) for t in targets) > 0.999
    assert count < 200, "not one for each of the units that opened"
