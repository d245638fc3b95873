"""PROCEDURES: when and how each kind of method takes its decisions, by the name that a row of METHODS gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from jpq.allocation import manual, two_stage
from jpq.allocation.allocators import PlanEvaluator, allocate_bits, allocate_channels
from jpq.allocation.measured.candidates import AllowedWidths, with_pinned_widths
from jpq.allocation.measured.decide import Decision, decide_by_measurement
from jpq.allocation.measured.probe import quantizer_keys
from jpq.allocation.ranking.rank import rank_units
from jpq.allocation.ranking.scheduled_pruning import macs_limit, uniform_keep_share
from jpq.allocation.uniform_bits import widest_plans_with_wider_ends, widest_uniform_plans
from jpq.compression.discretize import discretize
from jpq.compression.feasibility import cheapest_plan, check_reachable, density_target
from jpq.compression.model import CompressedModel
from jpq.config import Decide
from jpq.costs.target import Target, all_met
from jpq.methods.scores import Score, pick_score
from jpq.methods.table import method_row
from jpq.plan import Plan
from jpq.types import JpqError


class Procedure(ABC):
    """The way from an attached network and its targets to a plan."""

    searches: ClassVar[bool] = False  # decisions are learned with the weights, and go on softly from budget to budget
    has_search_phase: ClassVar[bool] = False  # epochs are trained before the plan is taken
    fills_budget: ClassVar[bool] = True  # the plan is meant to use up the tightest target
    measures: ClassVar[bool] = False  # sensitivities are measured, and several plans compared

    @abstractmethod
    def check_feasible(self, net: CompressedModel, targets: Sequence[Target], decide: Decide) -> None:
        """Raise JpqError, naming the smallest possible cost, where a target cannot be met."""

    @abstractmethod
    def decide(
        self, net: CompressedModel, targets: Sequence[Target], decide: Decide, data: PlanEvaluator | None = None
    ) -> Plan:
        """The plan that meets every target; nothing is frozen yet.

        Args:
            net: attached; for "search" with its decisions as the search has left them.
            targets: all of them are met.
            decide: the settings of the decisions.
            data: what scores and allocators look at. None: rankings stand as they are, which is enough to tell targets
                that cannot be met.

        Raises JpqError where that cannot be.
        """

    def first_stage(self, net: CompressedModel, plan: Plan) -> Plan | None:
        """The part of a plan that is trained before the rest of it is taken; None: all of it is taken at once."""
        return None


class Search(Procedure):
    """Procedure by search: decisions relaxed by gates and widths, learned with the weights, then discretized."""

    searches = has_search_phase = True

    def check_feasible(self, net: CompressedModel, targets: Sequence[Target], decide: Decide) -> None:
        """Raise JpqError where even the cheapest plan, or the given density, exceeds a target."""
        _rank_without_data(net, decide)
        check_reachable(net, targets)
        if method_row(net.method).score:  # a ranking closes channels down to the asked density
            density_target(net, decide.density)

    def decide(
        self, net: CompressedModel, targets: Sequence[Target], decide: Decide, data: PlanEvaluator | None = None
    ) -> Plan:
        """The learned decisions, rounded to whole units and bits that meet every target; by a table where known."""
        known = data.measurement.table if data is not None and data.measurement is not None else None
        return discretize(net, targets, divergences=known)


class OneShot(Procedure):
    """Procedure before training: uniform bits, or channels chosen by a score and an allocator at given bits."""

    def check_feasible(self, net: CompressedModel, targets: Sequence[Target], decide: Decide) -> None:
        """Raise JpqError where no plan of this kind meets the targets."""
        _rank_without_data(net, decide)
        if method_row(net.method).gate is not None:
            check_reachable(net, targets)
        else:
            self.decide(net, targets, decide)

    def decide(
        self, net: CompressedModel, targets: Sequence[Target], decide: Decide, data: PlanEvaluator | None = None
    ) -> Plan:
        """The widest uniform bits, or the best-ranked channels, that meet every target."""
        (w_low, w_high), (a_low, a_high) = decide.w_bits, decide.a_bits
        if method_row(net.method).gate is None:
            widest = widest_plans_with_wider_ends if decide.wider_ends else widest_uniform_plans
            return widest(net, targets, range(w_low, w_high + 1), range(a_low, a_high + 1))[0]
        if data is not None:
            share = uniform_keep_share(net, lambda uses: all_met(targets, uses))
            allocate_channels(net, score_of(net.method, decide), decide.allocator, data, share, targets[0])
        return discretize(net, targets)


class TwoStage(Procedure):
    """Procedure in two stages: channels by a score, trained in float, then uniform bits or the allocator's."""

    has_search_phase = True

    def check_feasible(self, net: CompressedModel, targets: Sequence[Target], decide: Decide) -> None:
        """Raise JpqError where no density and bits together meet the targets."""
        _rank_without_data(net, decide)
        self.decide(net, targets, decide)

    def decide(
        self, net: CompressedModel, targets: Sequence[Target], decide: Decide, data: PlanEvaluator | None = None
    ) -> Plan:
        """The channels of stage one and the bits of stage two, in one plan that meets every target."""
        bounds = (decide.w_bits, decide.a_bits)
        if data is None:
            return two_stage.decide_two_stage(net, targets, *bounds, decide.density)
        share = uniform_keep_share(net, macs_limit(net, decide.density))
        density_limit = density_target(net, decide.density)
        allocate_channels(net, score_of(net.method, decide), decide.allocator, data, share, density_limit)
        return two_stage.decide_two_stage(
            net,
            targets,
            *bounds,
            decide.density,
            lambda kept: allocate_bits(net, decide.allocator, data, kept, targets, *bounds),
        )

    def first_stage(self, net: CompressedModel, plan: Plan) -> Plan:
        """The plan's channels at the bits as they stand."""
        return two_stage.first_stage_plan(net, plan)


class Manual(Procedure):
    """Procedure without search: bits and densities given by name, the channels of each site by a score."""

    fills_budget = False

    def check_feasible(self, net: CompressedModel, targets: Sequence[Target], decide: Decide) -> None:
        """Raise JpqError where the given decisions exceed a target that stands beside them."""
        _rank_without_data(net, decide)
        manual.check_targets(net, manual.manual_plan(net, decide), targets)

    def decide(
        self, net: CompressedModel, targets: Sequence[Target], decide: Decide, data: PlanEvaluator | None = None
    ) -> Plan:
        """The plan that `--bits` and `--densities` describe."""
        if data is None:
            return manual.manual_plan(net, decide)
        plan = manual.rank_and_plan(net, decide, score_of(net.method, decide), data.batches())
        manual.check_targets(net, plan, targets)
        return plan


class Measured(Procedure):
    """Procedure by measurement: bits and channels from a sensitivity table and an exact solver, before training."""

    measures: ClassVar[bool] = True

    def check_feasible(self, net: CompressedModel, targets: Sequence[Target], decide: Decide) -> None:
        """Raise JpqError, naming the smallest possible cost, where no bits and channels meet the targets."""
        _rank_without_data(net, decide)
        cheapest = cheapest_plan(net)
        check_reachable(net, targets, with_pinned_widths(cheapest, manual.pinned_widths(net, decide)))

    def decide(
        self, net: CompressedModel, targets: Sequence[Target], decide: Decide, data: PlanEvaluator | None = None
    ) -> Plan:
        """The plan of least divergence as measured, of those that were compared."""
        return discretize(net, targets) if data is None else self.compare(net, targets, decide, data).best.plan

    def compare(self, net: CompressedModel, targets: Sequence[Target], decide: Decide, data: PlanEvaluator) -> Decision:
        """The plans that measuring compares, the least divergence first; arguments and errors as for `decide`."""
        if data.measurement is None:
            raise JpqError(f"--method {net.method} measures on training batches, and there are none.")
        measured = data.measurement.net() if data.measurement.net else net
        rank_units(measured, score_of(net.method, decide), data.batches(), loss=data.loss)
        return decide_by_measurement(
            measured, targets, allowed_widths(measured, decide), decide.density, data.measurement
        )


def allowed_widths(net: CompressedModel, decide: Decide) -> AllowedWidths:
    """The widths that the attached quantizers may take, of weights and of activations."""
    choices: dict[str, set[int]] = {"w": set(), "a": set()}
    image = {layer.name for layer in net.network.layers if layer.reads_input}
    for (layer, side), quantizer in quantizer_keys(net).items():
        if side == "w" or layer not in image:
            choices[side] |= set(quantizer.width.choices)
    rows = {"w": decide.w_bits, "a": decide.a_bits}
    w, a = (tuple(sorted(choices[side])) or tuple(range(low, high + 1)) for side, (low, high) in rows.items())
    return AllowedWidths(w, a, manual.pinned_widths(net, decide))


PROCEDURES: Mapping[str, Procedure] = {
    "search": Search(),
    "one-shot": OneShot(),
    "two-stage": TwoStage(),
    "manual": Manual(),
    "measured": Measured(),
}


def procedure_of(method: str) -> Procedure:
    """The procedure of the method that a plan or a config names."""
    return PROCEDURES[method_row(method).procedure]


def score_of(method: str, decide: Decide) -> Score:
    """The score that ranks channels: `--score`, or the method's own."""
    return pick_score(decide.score or method_row(method).score or "l1", decide.classes)


def _rank_without_data(net: CompressedModel, decide: Decide) -> None:
    """Rank by a score that needs no data but may find nothing to rank by (BatchNorm's scales), to raise early."""
    if method_row(net.method).score and score_of(net.method, decide).needs == {"scales"}:
        rank_units(net, score_of(net.method, decide))
