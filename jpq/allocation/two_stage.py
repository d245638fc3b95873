"""The two-stage baseline: prune first, then quantize, both planned so that together they meet a budget exactly.

Everything is decided at the start, from the trained weights: channels are removed by a score and an allocator until
`density` of the MACs is left; then come the widest uniform bits that fit, or the allocator's bits; then channels open
or close by rank until the budget is used up (where all are open before, uniform bits grow by one step and some close).
Stage one trains the pruned network at the widest bits that are allowed, which is nearly float; stage two trains it
quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jpq.allocation.ranking.rank import check_channels
from jpq.allocation.uniform_bits import decide_uniform_bits, uniform_plan
from jpq.compression.calibration import recalibrate
from jpq.compression.discretize import discretize
from jpq.compression.feasibility import check_reachable, density_target, underuse_note
from jpq.compression.model import CompressedModel
from jpq.compression.soft_decisions import BOTTOM, SoftDecisions, soft_decisions
from jpq.costs.target import Target, all_met
from jpq.methods.quantizers import BitWidth, Fixed
from jpq.plan import Plan

Bounds = tuple[int, int]  # smallest and largest width, in bits

Widths = Callable[[Plan], Mapping[tuple[str, str], BitWidth] | None]  # plan -> soft widths for the units it keeps


def decide_two_stage(
    net: CompressedModel,
    targets: Sequence[Target],
    w_bits: Bounds,
    a_bits: Bounds,
    density: float,
    widths: Widths | None = None,
) -> Plan:
    """Decide channels and bits of both stages in one plan that meets every target.

    Args:
        net: attached with `Ranked` gates, which hold a ranking (`allocators.allocate_channels`) unless only errors
            matter.
        targets: all of them are met. Targets for MACs count in stage one too.
        w_bits, a_bits: smallest and largest width.
        density: share of the dense network's MACs that stays after stage one; more channels open where the bits leave
            some of the budget, and more close where the smallest bits exceed it.
        widths: chooses soft widths for the pruned network; default: the same bits everywhere.

    Raises JpqError, naming the smallest possible cost or density, for what cannot be met, and for units that are no
    channels.
    """
    check_channels(net)
    ranking = soft_decisions(net)
    narrowest = uniform_plan(net, w_bits[0], a_bits[0])
    check_reachable(net, targets, with_plan_bits(ranking, narrowest).plan_at(-BOTTOM))
    pruned = discretize(net, [density_target(net, density), *(g for g in targets if g.cost == "macs")], ranking)
    bits = cheapest = replace(narrowest, kept=pruned.kept)
    chosen = widths(pruned) if widths and all_met(targets, net.exact_usage(bits)) else None
    if chosen:
        return discretize(
            net, targets, with_plan_bits(ranking, discretize(net, targets, with_widths(ranking, bits, chosen)))
        )
    if all_met(targets, net.exact_usage(bits)):
        bits = decide_uniform_bits(
            net, targets, range(w_bits[0], w_bits[1] + 1), range(a_bits[0], a_bits[1] + 1), pruned.kept
        )
    plan = discretize(net, targets, with_plan_bits(ranking, bits))
    if bits is cheapest:  # channels were removed for the targets: bits that cost no further channel come back
        free = decide_uniform_bits(
            net, targets, range(w_bits[0], w_bits[1] + 1), range(a_bits[0], a_bits[1] + 1), plan.kept
        )
        if free.layers == plan.layers:
            return plan
        bits = replace(bits, layers=free.layers)
        plan = discretize(net, targets, with_plan_bits(ranking, bits))
    wider_bits = next_wider_bits(net, bits, w_bits[1], a_bits[1])
    if underuse_note(targets, net, plan) and wider_bits:  # every channel is open: wider bits close some again
        return discretize(net, targets, with_plan_bits(ranking, wider_bits))
    return plan


def next_wider_bits(net: CompressedModel, bits: Plan, w_most: int, a_most: int) -> Plan | None:
    """The next wider uniform bits: one more for activations or weights, whichever have fewer; None at the widest."""
    inner = [layer for name, layer in bits.layers.items() if not net.network.layer(name).reads_input]
    w, a = (inner[0].w_bits, inner[0].a_bits) if inner else (w_most, a_most)
    if (w, a) == (w_most, a_most):
        return None
    widen_activations = a < a_most and (a <= w or w == w_most)
    return uniform_plan(net, w, a + 1) if widen_activations else uniform_plan(net, w + 1, a)


def with_plan_bits(ranking: SoftDecisions, plan: Plan) -> SoftDecisions:
    """The ranking of channels, with every width fixed as in `plan`."""
    layers = plan.layers
    widths = {(n, side): Fixed(layers[n].w_bits if side == "w" else layers[n].a_bits) for n, side in ranking.widths}
    return replace(ranking, widths=widths)


def with_widths(ranking: SoftDecisions, plan: Plan, widths: Mapping[tuple[str, str], BitWidth]) -> SoftDecisions:
    """Soft widths, with the channels fixed as in `plan`."""
    return replace(ranking, plan=plan, widths={**with_plan_bits(ranking, plan).widths, **widths}, margins={})


def first_stage_plan(net: CompressedModel, plan: Plan) -> Plan:
    """The plan of stage one: the plan's channels at the bits as they stand."""
    return replace(plan, layers=net.plan().layers)


def start_second_stage(net: CompressedModel, plan: Plan, batches: Iterable[Any]) -> None:
    """Begin the second stage: recalibrate on batches of inputs, and freeze the plan with its bits."""
    recalibrate(net, batches)
    net.freeze(plan)
