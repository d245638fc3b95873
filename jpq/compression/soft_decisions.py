"""Soft decisions: the real-valued bits and margins of a search, and the plans that rounding makes of them.

Every decision has a soft value: a width its real-valued bits, a unit its margin (nats above the threshold). One number,
`shift`, moves them all: bits become `nearest(soft + shift)`, a unit stays where `margin + NATS * shift > 0` (where
channels stay in multiples: the units of largest margin, as many as their number rounds to). At shift 0 the plan is that
of the present decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from jpq.compression.channel_counts import nearest_count
from jpq.compression.model import CompressedModel
from jpq.methods.quantizers import BitWidth
from jpq.plan import MaskPlan, Plan

NATS = 2.0  # margin of a unit, in nats, that a shift of one bit moves

BOTTOM = 1e6  # minus this shift, every decision is at its smallest


@dataclass(frozen=True)
class SoftDecisions:
    """The soft values of all decisions, and the plans that rounding makes of them."""

    plan: Plan  # of the present decisions: supplies signs, names and the order of layers
    widths: Mapping[tuple[str, str], BitWidth]  # (layer, "w" | "a")
    margins: Mapping[str, tuple[float, ...]]  # channel site -> unit -> nats above the threshold
    counts: Mapping[str, tuple[int, ...]]  # channel site -> numbers of units that may stay, ascending
    masks: Mapping[str, Tensor] = field(default_factory=dict)  # layer -> [rows, n] margins; no fixed counts

    @cached_property
    def order(self) -> dict[str, list[int]]:
        """Channel site -> its units by falling margin; equal ones by index."""
        return {site: sorted(range(len(m)), key=[-x for x in m].__getitem__) for site, m in self.margins.items()}

    def plan_at(self, shift: float) -> Plan:
        """The plan at a shift; every site keeps at least its best unit, or the smallest number that may stay."""
        layers = {}
        for name, layer in self.plan.layers.items():
            w, a = (width.nearest(width.soft() + shift) for width in (self.widths[name, "w"], self.widths[name, "a"]))
            layers[name] = replace(layer, w_bits=w, a_bits=a)
        kept = dict(self.plan.kept)
        for site, margins in self.margins.items():
            above = sum(m + NATS * shift > 0 for m in margins)
            best = set(self.order[site][: nearest_count(self.counts[site], above)])
            kept[site] = tuple(u in best for u in range(len(margins)))
        masks = {name: MaskPlan.of(_above(margins, -NATS * shift)) for name, margins in self.masks.items()}
        return replace(self.plan, layers=layers, kept=kept, masks={**self.plan.masks, **masks})


def _above(margins: Tensor, threshold: float) -> Tensor:
    """The units above a threshold, and the unit of largest margin in any case; bool, shaped like the margins."""
    keep = margins > threshold
    keep.view(-1)[margins.argmax()] = True
    return keep


def soft_decisions(net: CompressedModel) -> SoftDecisions:
    """The soft values of a model's decisions as they are now."""
    widths = {}
    for layer in net.network.layers:
        pair = net.quantizers(layer.name)
        if pair:
            for side, quantizer in zip("wa", pair, strict=True):
                widths[layer.name, side] = quantizer.width
    plan = net.plan()  # also shows the present weights to the gates
    free = [(s, g) for s, g in zip(net.sites, net.gates, strict=True) if not g.fixed_count]
    margins = {s.name: tuple(g.margin()[0].tolist()) for s, g in free if not s.is_mask}
    counts = {s.name: net.counts(s) for s, _ in free if not s.is_mask}
    masks = {s.taps[0].layer: g.margin().detach().cpu() for s, g in free if s.is_mask}
    return SoftDecisions(plan, widths, margins, counts, masks)
