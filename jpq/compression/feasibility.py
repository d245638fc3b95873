"""What budgets can be met: the cheapest plan, and sentences on targets below it and on plans that stay below theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

from jpq import costs
from jpq.compression.float_work import KEPT, FloatPart, FloatWork, describe_float_work, find_float_work
from jpq.compression.model import CompressedModel
from jpq.compression.soft_decisions import BOTTOM, soft_decisions
from jpq.costs import LayerUse
from jpq.costs.target import FULL_USE, Target, all_met, used_share
from jpq.plan import MaskPlan, Plan
from jpq.types import JpqError


def cheapest_plan(net: CompressedModel) -> Plan:
    """The cheapest possible plan: fewest bits, one unit at each site, or as many as a fixed count leaves."""
    plan = soft_decisions(net).plan_at(-BOTTOM)
    fixed = [(site, gate.least()) for site, gate in zip(net.sites, net.gates, strict=True) if gate.fixed_count]
    kept = {site.name: tuple(units[0].bool().tolist()) for site, units in fixed if not site.is_mask}
    masks = {site.taps[0].layer: MaskPlan.of(units) for site, units in fixed if site.is_mask}
    return replace(plan, kept={**plan.kept, **kept}, masks={**plan.masks, **masks})


def check_reachable(net: CompressedModel, targets: Sequence[Target], cheapest: Plan | None = None) -> None:
    """Raise JpqError, naming the smallest possible cost, if no plan meets a target.

    `cheapest`: a plan in place of `cheapest_plan`, for gates with a fixed count whose schedule has not ended, and for
    decisions that are not the model's own.
    """
    plan = cheapest_plan(net) if cheapest is None else cheapest
    uses = net.exact_usage(plan)
    for target in targets:
        share = used_share(target, uses)
        if share > 1:
            units, remedy = fewest_units_text(net, searching=cheapest is not None)
            raise JpqError(
                f"{target.flag} {target.text} ({target.format_cost(target.limit)}) cannot be met: the smallest "
                f"possible is {target.format_cost(share * target.limit)}, with fewest bits and {units}. "
                f"{_either(_remedies(net, target, remedy))}.{_float_work_text(net, plan, target)}"
            )


def _float_work_text(net: CompressedModel, plan: Plan, target: Target) -> str:
    """Sentences about what a plan leaves at 32 bits, with its cost: by itself, and as asked; empty where nothing."""
    if target.cost == "latency":
        return ""
    uses = net.exact_usage(plan)
    work = find_float_work(net.network, uses, plan.layers)
    asked = [part for part in work.parts if part.reason == KEPT]
    text = _float_cost_text(uses, target, [part for part in work.parts if part.reason != KEPT], with_tables=True)
    sentence = f" Of that {text[0]} are at 32 bits, which jpq cannot lower: {text[1]}." if text else ""
    kept = _float_cost_text(uses, target, asked, with_tables=False)
    if kept:
        sentence += f" Of that {kept[0]} are at 32 bits because --keep-float, or 32/32 in --bits, says so: {kept[1]}."
    return sentence


def _float_cost_text(
    uses: Sequence[LayerUse], target: Target, parts: Sequence[FloatPart], with_tables: bool
) -> tuple[str, str] | None:
    """(cost, names) of parts at 32 bits, and of parameters that are no layer's; None where there are none."""
    tables = [u for u in uses if u.part == "table"] if with_tables else []
    names = {part.name for part in parts}
    counted = [u for u in uses if u.name in names] + tables
    if not counted or (target.cost == "size" and not costs.size(counted)):
        return None
    text = describe_float_work(FloatWork(0, sum(part.share for part in parts), 0.0, tuple(parts)))
    if target.cost == "size" and tables:
        largest = max(tables, key=lambda u: u.weights)
        words = f"{len(tables)} parameters that are no layer's, such as '{largest.name}'"
        text = f"{text}; {words}" if text else words
    return target.format_cost(costs.COSTS[target.cost](counted)), text


def _remedies(net: CompressedModel, target: Target, keep_less: str) -> list[str]:
    """Changes that would make a target reachable, in words; some are empty."""
    outside = any(gate.decided_outside for gate in net.gates)
    masks_only = target.cost == "latency" and bool(net.sites) and all(site.is_mask for site in net.sites)
    bits = "" if target.cost in ("macs", "latency") else "allow fewer bits (--w-bits, --a-bits)"
    drop = "choose a method that drops channels" if masks_only else "" if outside else "skip fewer layers"
    finer = "" if net.multiple == 1 else "lower --channel-multiple"
    asked = any(layer.kept_float for layer in net.network.layers)
    quantize = "keep fewer layers in floating point (--keep-float, --bits)" if asked and bits else ""
    return ["" if masks_only or outside else keep_less, bits, drop, finer, quantize, "raise the target"]


def _either(remedies: Sequence[str]) -> str:
    """`Keep less, skip fewer layers, or raise the target`."""
    *most, last = filter(None, remedies)
    text = f"{', '.join(most)}, or {last}" if most else last
    return text[0].upper() + text[1:]


def fewest_units_text(net: CompressedModel, searching: bool) -> tuple[str, str]:
    """(fewest units that can stay, how to have fewer) in words; `searching`: the search has not ended yet."""
    fixed = next((gate for gate in net.gates if gate.fixed_count), None)
    if fixed is None:
        return minimum_units_text(net), ""
    until_end = searching and not fixed.decided_outside
    return "the units that stand until the search ends" if until_end else fixed.least_text, "keep less"


def minimum_units_text(net: CompressedModel) -> str:
    """The fewest units that a site keeps, in words."""
    if not net.sites:
        return "all channels, of which this method can remove none (`jpq inspect` says why)"
    return "one unit at each site" if net.multiple == 1 else f"{net.multiple} channels, or all, at each site"


def density_target(net: CompressedModel, density: float) -> Target:
    """A density as a target for MACs. Raises JpqError where the smallest plan keeps more."""
    full = costs.baseline(net.exact_usage())["macs"]
    least = costs.macs(net.exact_usage(soft_decisions(net).plan_at(-BOTTOM)))
    if density * full < least:
        share = math.ceil(1000 * least / full) / 1000
        raise JpqError(
            f"--density {density} cannot be met: with {minimum_units_text(net)} {share} of the MACs stay. "
            f"Raise --density, {'' if net.multiple == 1 else 'lower --channel-multiple, '}or skip fewer layers."
        )
    return Target("macs", str(density), math.floor(density * full))


def tightest_share(net: CompressedModel, targets: Sequence[Target], plan: Plan) -> Fraction:
    """Share of the tightest target that a plan uses."""
    uses = net.exact_usage(plan)
    return max((used_share(t, uses) for t in targets), default=Fraction(1))


def underuse_note(targets: Sequence[Target], net: CompressedModel, plan: Plan) -> str | None:
    """The reason why less than 97 % of the tightest target is used, for the report; None where 97 % are used."""
    if not targets:
        return None
    used = tightest_share(net, targets, plan)
    if used >= FULL_USE:
        return None
    uses = net.exact_usage(plan)
    tightest = max(targets, key=lambda t: used_share(t, uses))
    share = f"{100 * float(used):.1f} % of {tightest.flag} {tightest.text} is used"
    if _has_fitting_unit(net, targets, plan):
        units = [unit for kept in plan.kept.values() for unit in kept]
        return f"{share}: {len(units) - sum(units)} of {len(units)} units were closed by choice, not for the target."
    if tensor := _tensor_with_fitting_bits(net, targets, plan):
        return f"{share}: wider bits for {tensor} alone would fit, and were left out by choice."
    more = "one more unit" if net.multiple == 1 else f"{net.multiple} more channels"
    choices = [width.choices for width in net.widths()]
    by_one = all(large - small == 1 for row in choices for small, large in pairwise(row))
    bits = "one more bit" if by_one else "the next wider bits"
    return (
        f"{share}: every decision is at its largest, or the next single step ({bits} somewhere, or {more}) would "
        "exceed a target."
    )


def _has_fitting_unit(net: CompressedModel, targets: Sequence[Target], plan: Plan) -> bool:
    """Whether the next larger number of units at some site would keep to every target."""
    for site in net.sites:
        kept = plan.kept.get(site.name, ())
        more = next((count for count in net.counts(site) if count > sum(kept)), None) if kept else None
        if more is None:
            continue
        open_units = {unit for unit, stays in enumerate(kept) if stays}
        closed = [unit for unit in range(len(kept)) if unit not in open_units]
        open_units.update(closed[: more - len(open_units)])
        wider = tuple(unit in open_units for unit in range(len(kept)))
        if all_met(targets, net.exact_usage(replace(plan, kept={**plan.kept, site.name: wider}))):
            return True
    return False


def _tensor_with_fitting_bits(net: CompressedModel, targets: Sequence[Target], plan: Plan) -> str:
    """A weight or an input, in words, whose next wider bits alone would keep to every target; "" where none would."""
    for name, layer in plan.layers.items():
        w, a = [quantizer.width.choices for quantizer in net.quantizers(name) or ()] or [(), ()]
        wider = [("weight", replace(layer, w_bits=bits)) for bits in w if bits > layer.w_bits][:1]
        wider += [("input", replace(layer, a_bits=bits)) for bits in a if bits > layer.a_bits][:1]
        for what, changed in wider:
            if all_met(targets, net.exact_usage(replace(plan, layers={**plan.layers, name: changed}))):
                return f"the {what} of {name}"
    return ""
