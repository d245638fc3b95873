"""Soft decisions -> whole bits and 0/1 units that meet every target and use nearly all of the tightest.

Every decision has a soft value: a width its real-valued bits, a unit its margin (nats above the threshold). One
number, `shift`, moves them all: bits become `nearest(soft + shift)`, a unit stays where `margin + NATS * shift > 0`
(where channels stay in multiples: the best units, as many as their number rounds to).
The cost grows with the shift (but for the bytes of a mask, which shrink as it fills up), so bisection finds the most
generous shift that still meets every target; what is left is spent on single decisions, those nearest to their next
step first, and where those are too coarse for a small network, steps back pay for a step forward elsewhere. At shift 0
nothing changes: where the controller did its work, landing has little to do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from jpq import costs
from jpq.compression.channel_counts import nearest, turn
from jpq.compression.model import CompressedModel
from jpq.costs.target import FULL_USE, Target, all_met, used_share
from jpq.methods.quantizers import BitWidth
from jpq.plan import LayerPlan, MaskPlan, Plan
from jpq.types import JpqError

NATS = 2.0  # a unit's margin, in nats, that weighs as much as one bit

BOTTOM = 1e6  # a shift below everything

REACH = 24.0  # a shift that moves every bit from one end to the other

NEAR = 2.0  # how many bits a step back may lie behind the step forward that it pays for


@dataclass(frozen=True)
class SoftDecisions:
    """The soft values that landing rounds."""

    plan: Plan  # as things stand: supplies signs, names and the layers' order
    widths: Mapping[tuple[str, str], BitWidth]  # (layer, "w" | "a")
    margins: Mapping[str, tuple[float, ...]]  # channel site -> unit -> nats above the threshold
    counts: Mapping[str, tuple[int, ...]]  # channel site -> how many units may stay, ascending
    masks: Mapping[str, Tensor] = field(default_factory=dict)  # layer -> [rows, n] margins, where landing may choose

    @cached_property
    def order(self) -> dict[str, list[int]]:
        """Channel site -> its units, the best first; of equal ones the first."""
        return {site: sorted(range(len(m)), key=[-x for x in m].__getitem__) for site, m in self.margins.items()}

    def at(self, shift: float) -> Plan:
        """The plan that this shift gives; every site keeps at least its best unit, or the fewest that may stay."""
        layers = {}
        for name, layer in self.plan.layers.items():
            w, a = (width.nearest(width.soft() + shift) for width in (self.widths[name, "w"], self.widths[name, "a"]))
            layers[name] = replace(layer, w_bits=w, a_bits=a)
        kept = dict(self.plan.kept)
        for site, margins in self.margins.items():
            above = sum(m + NATS * shift > 0 for m in margins)
            best = set(self.order[site][: nearest(self.counts[site], above)])
            kept[site] = tuple(u in best for u in range(len(margins)))
        masks = {name: MaskPlan.of(_above(margins, -NATS * shift)) for name, margins in self.masks.items()}
        return replace(self.plan, layers=layers, kept=kept, masks={**self.plan.masks, **masks})

    def steps(self, plan: Plan) -> list[Step]:
        """Every single decision that could be one step more generous, the nearest first."""
        found: list[Step] = []
        for (name, side), width in self.widths.items():
            bits = _bits(plan.layers[name], side)
            more = [c for c in width.choices if c > bits]
            if more:
                shift = width.switch(bits, more[0]) - width.soft()
                found.append(Step(shift, f"{name} {side}", _with_bits(plan, name, side, more[0])))
        for site, margins in self.margins.items():
            now = sum(plan.kept[site])
            larger = [c for c in self.counts[site] if c > now]
            if larger:  # units of one site open in the order of their margins
                closed = [u for u in self.order[site] if not plan.kept[site][u]][: larger[0] - now]
                last = closed[turn(now, larger[0]) - now - 1]  # with it, rounding passes to the larger count
                found.append(Step(-margins[last] / NATS, site, _with_units(plan, site, closed, True)))
        return sorted(found, key=lambda step: step.shift)

    def steps_back(self, plan: Plan) -> list[Step]:
        """Every single decision that could be one step less generous, the nearest first."""
        found: list[Step] = []
        for (name, side), width in self.widths.items():
            bits = _bits(plan.layers[name], side)
            less = [c for c in width.choices if c < bits]
            if less:
                shift = width.switch(less[-1], bits) - width.soft()
                found.append(Step(shift, f"{name} {side}", _with_bits(plan, name, side, less[-1])))
        for site, margins in self.margins.items():
            now = sum(plan.kept[site])
            smaller = [c for c in self.counts[site] if c < now]
            if smaller:
                open_ = [u for u in self.order[site] if plan.kept[site][u]]
                last = open_[turn(smaller[-1], now) - 1]  # without it, rounding passes to the smaller count
                found.append(Step(-margins[last] / NATS, site, _with_units(plan, site, open_[smaller[-1] :], False)))
        return sorted(found, key=lambda step: -step.shift)


class Step(NamedTuple):
    """One decision, one step further: the shift at which rounding would take it, its name, and the plan with it."""

    shift: float
    name: str
    plan: Plan


def _bits(layer: LayerPlan, side: str) -> int:
    return layer.w_bits if side == "w" else layer.a_bits


def _with_bits(plan: Plan, name: str, side: str, bits: int) -> Plan:
    """The plan with another width."""
    now = plan.layers[name]
    layer = replace(now, w_bits=bits) if side == "w" else replace(now, a_bits=bits)
    return replace(plan, layers={**plan.layers, name: layer})


def _with_units(plan: Plan, site: str, units: Sequence[int], open_: bool) -> Plan:
    """The plan with units of one site opened or closed."""
    moved = set(units)
    kept = tuple(open_ if u in moved else k for u, k in enumerate(plan.kept[site]))
    return replace(plan, kept={**plan.kept, site: kept})


def _above(margins: Tensor, threshold: float) -> Tensor:
    """Units above the threshold, and the best unit in any case."""
    keep = margins > threshold
    keep.view(-1)[margins.argmax()] = True
    return keep


def soft_decisions(net: CompressedModel) -> SoftDecisions:
    """The soft values of a network under compression."""
    widths = {}
    for layer in net.network.layers:
        pair = net.quantizers(layer.name)
        if pair:
            for side, quantizer in zip("wa", pair, strict=True):
                widths[layer.name, side] = quantizer.width
    plan = net.plan()  # also shows the gates the weights as they stand
    free = [(s, g) for s, g in zip(net.sites, net.gates, strict=True) if not g.fixed_count]
    margins = {s.name: tuple(g.margin()[0].tolist()) for s, g in free if not s.is_mask}
    counts = {s.name: net.counts(s) for s, _ in free if not s.is_mask}
    masks = {s.taps[0].layer: g.margin().detach().cpu() for s, g in free if s.is_mask}
    return SoftDecisions(plan, widths, margins, counts, masks)


def cheapest_plan(net: CompressedModel) -> Plan:
    """The cheapest plan there is: fewest bits, one unit at each site, or as many as gates that count will leave."""
    plan = soft_decisions(net).at(-BOTTOM)
    given = [(site, gate.least()) for site, gate in zip(net.sites, net.gates, strict=True) if gate.fixed_count]
    kept = {site.name: tuple(units[0].bool().tolist()) for site, units in given if not site.is_mask}
    masks = {site.taps[0].layer: MaskPlan.of(units) for site, units in given if site.is_mask}
    return replace(plan, kept={**plan.kept, **kept}, masks={**plan.masks, **masks})


def check_reachable(net: CompressedModel, targets: Sequence[Target], least: Plan | None = None) -> None:
    """Raise JpqError, naming the smallest possible cost, if a target cannot be met at all.

    `least`: the cheapest plan, where it is not the network's own (`smallest`): of gates that count and have not come to
    their end yet, or of decisions that are not the network's.
    """
    plan = cheapest_plan(net) if least is None else least
    uses = net.exact_usage(plan)
    rigid = [layer.name for layer in net.network.layers if layer.name not in plan.layers]
    stay = f" {len(rigid)} layers cannot be quantized and stay at 32 bits, such as '{rigid[0]}'." if rigid else ""
    units, less = fewest_units_text(net, searching=least is not None)
    held = any(gate.decided_outside for gate in net.gates)
    for goal in targets:
        share = used_share(goal, uses)
        if share > 1:
            bits = "" if goal.cost in ("macs", "latency") else "allow fewer bits (--w-bits, --a-bits)"
            masks_only = goal.cost == "latency" and bool(net.sites) and all(site.is_mask for site in net.sites)
            drop = "choose a method that drops channels" if masks_only else "" if held else "skip fewer layers"
            finer = "" if net.multiple == 1 else "lower --channel-multiple"
            ways = ["" if masks_only or held else less, bits, drop, finer, "raise the target"]
            raise JpqError(
                f"{goal.flag} {goal.text} ({goal.format_cost(goal.limit)}) cannot be met: the smallest possible is "
                f"{goal.format_cost(share * goal.limit)}, with fewest bits and {units}. "
                f"{_either(ways)}.{stay}"
            )


def fewest_units_text(net: CompressedModel, searching: bool) -> tuple[str, str]:
    """(fewest units that can stay, how to have fewer) in words; `searching`: the search has not ended yet."""
    counted = next((gate for gate in net.gates if gate.fixed_count), None)
    if counted is None:
        return minimum_units_text(net), ""
    until_end = searching and not counted.decided_outside
    return "the units that stand until the search ends" if until_end else counted.least_text, "keep less"


def minimum_units_text(net: CompressedModel) -> str:
    """What a site keeps at least, in words."""
    return "one unit at each site" if net.multiple == 1 else f"{net.multiple} channels, or all, at each site"


def _either(ways: Sequence[str]) -> str:
    """`Keep less, skip fewer layers, or raise the target`."""
    *most, last = filter(None, ways)
    text = f"{', '.join(most)}, or {last}" if most else last
    return text[0].upper() + text[1:]


def discretize(net: CompressedModel, targets: Sequence[Target], decisions: SoftDecisions | None = None) -> Plan:
    """The plan that meets every target and leaves as little of the tightest unused as single steps allow.

    `decisions` are the network's own unless given. Raises JpqError if no plan meets the targets.
    """
    decisions = decisions or soft_decisions(net)
    check_reachable(net, targets, decisions.at(-BOTTOM))
    low, high = -REACH, REACH
    if all_met(targets, net.exact_usage(decisions.at(high))):
        return decisions.at(high)
    for _ in range(48):
        middle = (low + high) / 2
        low, high = (middle, high) if all_met(targets, net.exact_usage(decisions.at(middle))) else (low, middle)
    plan = decisions.at(low)
    if not all_met(targets, net.exact_usage(plan)):  # margins or bits beyond REACH: begin at the very bottom
        plan = decisions.at(-BOTTOM)
    plan = fill_masks(net, decisions, spend_slack(net, decisions, plan, targets), targets)
    return plan if _used(targets, net, plan) >= FULL_USE else trade_steps(net, decisions, plan, targets)


def spend_slack(net: CompressedModel, decisions: SoftDecisions, plan: Plan, targets: Sequence[Target]) -> Plan:
    """Spend what is left, nearest decisions first, until no single step fits."""
    too_dear: set[str] = set()  # costs grow: what does not fit now never will
    while True:
        for step in decisions.steps(plan):
            if step.name in too_dear:
                continue
            if all_met(targets, net.exact_usage(step.plan)):
                plan = step.plan
                break
            too_dear.add(step.name)
        else:
            return plan


def trade_steps(net: CompressedModel, decisions: SoftDecisions, plan: Plan, targets: Sequence[Target]) -> Plan:
    """One step forward that does not fit, with steps back elsewhere that pay for it, if that uses 97 % of a target.

    The nearest step forward that can be paid for; no step back lies more than `NEAR` bits behind it (a power of two
    that falls from 8 bits to 4 is not worth a few percent of the budget).
    """
    for more in decisions.steps(plan):
        candidate: Plan | None = more.plan
        while candidate is not None and not all_met(targets, net.exact_usage(candidate)):
            back = (s for s in decisions.steps_back(candidate) if s.name != more.name)
            candidate = next((s.plan for s in back if more.shift - s.shift <= NEAR), None)
        if candidate is not None:
            candidate = spend_slack(net, decisions, candidate, targets)
            if _used(targets, net, candidate) >= FULL_USE:
                return candidate
    return plan


def fill_masks(net: CompressedModel, decisions: SoftDecisions, plan: Plan, targets: Sequence[Target]) -> Plan:
    """Spend what single bits and channels leave on more units of the masks, layer by layer, best margins first."""
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
    """The plan with more units of one mask."""
    keep = kept.clone()
    keep.view(-1)[more] = True
    return replace(plan, masks={**plan.masks, name: MaskPlan.of(keep)})


def _used(targets: Sequence[Target], net: CompressedModel, plan: Plan) -> Fraction:
    """Share of the tightest target that a plan uses."""
    uses = net.exact_usage(plan)
    return max((used_share(goal, uses) for goal in targets), default=Fraction(1))


def underuse_note(targets: Sequence[Target], net: CompressedModel, plan: Plan) -> str | None:
    """Why less than 97 % of the tightest target is used; None where it is not so."""
    if not targets:
        return None
    used = _used(targets, net, plan)
    if used >= FULL_USE:
        return None
    uses = net.exact_usage(plan)
    tightest = max(targets, key=lambda g: used_share(g, uses))
    more = "one more unit" if net.multiple == 1 else f"{net.multiple} more channels"
    return (
        f"{float(used):.1%} of {tightest.flag} {tightest.text} is used: every decision is at its largest, or the next "
        f"single step (one more bit somewhere, or {more}) would exceed a target."
    )


def density_target(net: CompressedModel, density: float) -> Target:
    """A density as a target for MACs. Raises JpqError where even one channel at each site is more."""
    full = costs.baseline(net.exact_usage())["macs"]
    least = costs.macs(net.exact_usage(soft_decisions(net).at(-BOTTOM)))
    if density * full < least:
        share = math.ceil(1000 * least / full) / 1000
        raise JpqError(
            f"--density {density} cannot be met: with {minimum_units_text(net)} {share} of the MACs stay. "
            f"Raise --density, {'' if net.multiple == 1 else 'lower --channel-multiple, '}or skip fewer layers."
        )
    return Target("macs", str(density), math.floor(density * full))
