"""Discretization: from soft decisions to whole bits and 0/1 units that meet every target and use nearly all of one.

The cost grows with the shift of the soft decisions (except the bytes of a mask, which shrink as it fills up), so
bisection finds the largest shift that meets every target. The rest of the budget is spent on single decisions, those
nearest to their next step first, or where a sensitivity table is known those that gain most for their cost (`gains`).
Where single steps are too coarse for a small network, steps back elsewhere pay for a step forward. At shift 0 the plan
is that of the present decisions, so a search that ended on its budget is changed little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from jpq.compression import ladders
from jpq.compression.feasibility import check_reachable, tightest_share
from jpq.compression.gains import Divergences, Gains, spend_by_gain, trade_by_gain
from jpq.compression.ladders import Ladders
from jpq.compression.model import CompressedModel
from jpq.compression.soft_decisions import BOTTOM, NATS, SoftDecisions, soft_decisions
from jpq.costs.target import FULL_USE, Target, all_met, used_share
from jpq.plan import MaskPlan, Plan

REACH = 24.0  # shift that moves every width from one end of its range to the other


def discretize(
    net: CompressedModel,
    targets: Sequence[Target],
    decisions: SoftDecisions | None = None,
    divergences: Divergences | None = None,
) -> Plan:
    """The plan that meets every target and leaves as little of the tightest unused as single steps allow.

    Args:
        net: attached.
        targets: all of them are met.
        decisions: those of the model unless given.
        divergences: measured, of single changes: single steps are then taken by their gain per cost.

    Raises JpqError if no plan meets the targets.
    """
    decisions = decisions or soft_decisions(net)
    check_reachable(net, targets, decisions.plan_at(-BOTTOM))
    low, high = -REACH, REACH
    if all_met(targets, net.exact_usage(decisions.plan_at(high))):
        return decisions.plan_at(high)
    for _ in range(48):
        middle = (low + high) / 2
        low, high = (middle, high) if all_met(targets, net.exact_usage(decisions.plan_at(middle))) else (low, middle)
    plan = decisions.plan_at(low)
    if not all_met(targets, net.exact_usage(plan)):  # margins or bits beyond REACH
        plan = decisions.plan_at(-BOTTOM)
    plan = fill_masks(net, decisions, spend_slack(net, decisions, plan, targets, divergences), targets)
    return (
        plan
        if tightest_share(net, targets, plan) >= FULL_USE
        else trade_steps(net, decisions, plan, targets, divergences)
    )


def spend_slack(
    net: CompressedModel,
    decisions: SoftDecisions,
    plan: Plan,
    targets: Sequence[Target],
    divergences: Divergences | None = None,
) -> Plan:
    """The plan after steps that keep more until no single step fits: nearest first, or by gain per cost where known."""
    steps, fits = Ladders(decisions, NATS), _within(net, targets)
    if divergences is None:
        return ladders.spend(steps, plan, fits)
    return spend_by_gain(_gains(net, steps, targets, divergences), plan, fits)


def trade_steps(
    net: CompressedModel,
    decisions: SoftDecisions,
    plan: Plan,
    targets: Sequence[Target],
    divergences: Divergences | None = None,
) -> Plan:
    """The plan after one step forward and the steps back that pay for it, where 97 % of a target are then used."""
    steps, fits = Ladders(decisions, NATS), _within(net, targets)

    def is_full(plan: Plan) -> bool:
        return tightest_share(net, targets, plan) >= FULL_USE

    if divergences is None:
        return ladders.trade(steps, plan, fits, is_full)
    return trade_by_gain(_gains(net, steps, targets, divergences), plan, fits, is_full)


def _within(net: CompressedModel, targets: Sequence[Target]) -> Callable[[Plan], bool]:
    """The test whether a plan meets every target."""
    return lambda plan: all_met(targets, net.exact_usage(plan))


def _gains(net: CompressedModel, steps: Ladders, targets: Sequence[Target], divergences: Divergences) -> Gains:
    """What single steps gain, and cost as shares of all targets together."""

    def cost(plan: Plan) -> float:
        uses = net.exact_usage(plan)
        return float(sum(used_share(target, uses) for target in targets))

    return Gains(steps, divergences, cost)


def fill_masks(net: CompressedModel, decisions: SoftDecisions, plan: Plan, targets: Sequence[Target]) -> Plan:
    """The plan after the rest of the budget is spent on units of masks, layer by layer, largest margins first."""
    for name, margins in decisions.masks.items():
        kept = plan.masks[name].units()
        closed = margins.masked_fill(kept, -math.inf).flatten()
        order = closed.argsort(descending=True)[: int((~kept).sum())]
        low, high = 0, len(order)
        while low < high:
            middle = (low + high + 1) // 2
            fits = all_met(targets, net.exact_usage(_opened(plan, name, kept, order[:middle])))
            low, high = (middle, high) if fits else (low, middle - 1)
        plan = _opened(plan, name, kept, order[:low])
    return plan


def _opened(plan: Plan, name: str, kept: Tensor, more: Tensor) -> Plan:
    """The plan with more units of one mask kept; `more`: their flat indices."""
    keep = kept.clone()
    keep.view(-1)[more] = True
    return replace(plan, masks={**plan.masks, name: MaskPlan.of(keep)})
