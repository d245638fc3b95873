"""Prune first, then quantize: the two stages that most people use today, planned so that they meet a budget exactly.

Everything is decided at the start, from the trained weights: channels go by a score and an allocator until `density`
of the MACs is left; then come the widest uniform bits that fit, or the allocator's bits; then channels open or close by
rank until the budget is used up (where all are open before that, uniform bits grow by one step and a few close). Stage
one trains the pruned network at the widest bits that are allowed, which is nearly float; stage two trains it quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jpq.allocation.ranking.rank import require_channels
from jpq.allocation.uniform_bits import everywhere, uniform
from jpq.compression.calibration import recalibrate
from jpq.compression.discretize import (
    BOTTOM,
    SoftDecisions,
    check_reachable,
    density_target,
    discretize,
    soft_decisions,
    underuse_note,
)
from jpq.compression.model import CompressedModel
from jpq.costs.target import Target, all_met
from jpq.methods.quantizers import BitWidth, Fixed
from jpq.plan import Plan

Bounds = tuple[int, int]

Widths = Callable[[Plan], Mapping[tuple[str, str], BitWidth] | None]  # soft widths for the units that a plan keeps


def decide_two_stage(
    net: CompressedModel,
    targets: Sequence[Target],
    w_bits: Bounds,
    a_bits: Bounds,
    density: float,
    widths: Widths | None = None,
) -> Plan:
    """The plan that both stages share.

    Args:
        net: attached with `Ranked` gates, which hold a ranking (`allocators.rank`) unless only errors are wanted.
        goals: all of them are met. Targets for MACs count in stage one too.
        w_bits, a_bits: smallest and largest width.
        density: share of the dense network's MACs that stay before what the bits leave of the budget opens more, or
            the smallest bits close more.
        widths: what chooses soft widths for the pruned network; default: the same bits everywhere.

    Raises JpqError, naming the smallest possible cost or density, for what cannot be met, and for units that are no
    channels.
    """
    require_channels(net)
    ranking = soft_decisions(net)
    least = everywhere(net, w_bits[0], a_bits[0])
    check_reachable(net, targets, with_plan_bits(ranking, least).at(-BOTTOM))
    pruned = discretize(net, [density_target(net, density), *(g for g in targets if g.cost == "macs")], ranking)
    bits = cheapest = replace(least, kept=pruned.kept)
    chosen = widths(pruned) if widths and all_met(targets, net.exact_usage(bits)) else None
    if chosen:
        return discretize(
            net, targets, with_plan_bits(ranking, discretize(net, targets, with_widths(ranking, bits, chosen)))
        )
    if all_met(targets, net.exact_usage(bits)):
        bits = uniform(net, targets, range(w_bits[0], w_bits[1] + 1), range(a_bits[0], a_bits[1] + 1), pruned.kept)
    plan = discretize(net, targets, with_plan_bits(ranking, bits))
    if bits is cheapest:  # channels paid for the targets: bits that cost none of them are taken back
        free = uniform(net, targets, range(w_bits[0], w_bits[1] + 1), range(a_bits[0], a_bits[1] + 1), plan.kept)
        if free.layers == plan.layers:
            return plan
        bits = replace(bits, layers=free.layers)
        plan = discretize(net, targets, with_plan_bits(ranking, bits))
    more = next_wider_bits(net, bits, w_bits[1], a_bits[1])
    if (
        underuse_note(targets, net, plan) and more
    ):  # every channel is open: bits that are a step too wide close a few again
        return discretize(net, targets, with_plan_bits(ranking, more))
    return plan


def next_wider_bits(net: CompressedModel, bits: Plan, w_most: int, a_most: int) -> Plan | None:
    """The next wider bits: one more for activations or weights, whichever have fewer; None where both are widest."""
    inner = [layer for name, layer in bits.layers.items() if not net.network.layer(name).reads_input]
    w, a = (inner[0].w_bits, inner[0].a_bits) if inner else (w_most, a_most)
    if (w, a) == (w_most, a_most):
        return None
    first = a < a_most and (a <= w or w == w_most)
    return everywhere(net, w, a + 1) if first else everywhere(net, w + 1, a)


def with_plan_bits(ranking: SoftDecisions, plan: Plan) -> SoftDecisions:
    """The same ranking of channels, with every width as it is in `plan`."""
    layers = plan.layers
    widths = {(n, side): Fixed(layers[n].w_bits if side == "w" else layers[n].a_bits) for n, side in ranking.widths}
    return replace(ranking, widths=widths)


def with_widths(ranking: SoftDecisions, plan: Plan, widths: Mapping[tuple[str, str], BitWidth]) -> SoftDecisions:
    """Soft widths alone, with the channels of `plan`."""
    return replace(ranking, plan=plan, widths={**with_plan_bits(ranking, plan).widths, **widths}, margins={})


def pruned(net: CompressedModel, plan: Plan) -> Plan:
    """Stage one: the plan's channels at the bits as they stand."""
    return replace(plan, layers=net.plan().layers)


def quantize(net: CompressedModel, plan: Plan, batches: Iterable[Any]) -> None:
    """Stage two: take the plan's bits."""
    recalibrate(net, batches)
    net.freeze(plan)
