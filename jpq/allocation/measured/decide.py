"""Decide bits and channels by measurement: a sensitivity table, the exact solver, and the divergence of whole plans.

1. the table of single changes on mixed training images (`measure_anew`), once for all budgets; a coarse one of networks
   whose whole table would take more than about a minute
2. the plans of least predicted divergence within the targets (`Solver`), with units free, and of bits alone
3. the divergence of each plan with all its decisions at once, beside uniform bits, uniform bits with wider ends, and
   two stages; the least comes first

Changes around a plan are not measured: over random plans of equal cost they do not predict the accuracy after training
(rank correlation -0.06 +- 0.22 in 17 s, against 0.87 +- 0.07 in 13 s of the table; studies/results/estimators.csv).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jpq.allocation.measured.calibration import SAMPLES, Measurement, calibration_samples
from jpq.allocation.measured.candidates import (
    BITS_ONLY,
    MEASURED,
    AllowedWidths,
    Candidate,
    comparison_plans,
    image_layers,
)
from jpq.allocation.measured.coarse import SAMPLES as COARSE_SAMPLES
from jpq.allocation.measured.coarse import coarse_table
from jpq.allocation.measured.measure import changes_of
from jpq.allocation.measured.partial import measure_noted
from jpq.allocation.measured.probe import Probe
from jpq.allocation.measured.solve import Solver
from jpq.allocation.measured.table import Key, SensitivityTable, check_table, tensors_checksum
from jpq.compression.model import CompressedModel
from jpq.costs.target import Target
from jpq.plan import Plan
from jpq.tracing.forward import collect_tensors
from jpq.types import JpqError

MOST_MACS = 2e12  # of the passes of a whole table, about a minute of one core; a larger one is measured coarsely


@dataclass(frozen=True, eq=False)
class Decision:
    """The plans that were compared by measurement, and what that cost."""

    candidates: tuple[Candidate, ...]  # by rising measured divergence; no plan twice
    table: SensitivityTable  # of single changes
    passes: int  # batches that went through the network
    samples: int  # of the calibration
    seconds: float
    mixed: bool = True  # whether its samples were mixed in pairs

    @property
    def best(self) -> Candidate:
        """The candidate of least measured divergence."""
        return self.candidates[0]


def decide_by_measurement(
    net: CompressedModel,
    targets: Sequence[Target],
    widths: AllowedWidths,
    density: float,
    measurement: Measurement,
) -> Decision:
    """Measure, solve, and compare plans that meet every target.

    Args:
        net: attached with `Ranked` gates, whose margins hold a ranking of the units.
        targets: all of them are met.
        widths: the allowed ones.
        density: share of the MACs that stays in the first stage of the two-stage plan that is compared.
        measurement: what sensitivities are measured on.

    Raises JpqError for a table of another network, weights or samples, and where no plan meets the targets.
    """
    began = time.perf_counter()
    if measurement.table is not None:
        rank_as_table(net, known_table(measurement.table, net, measurement))
    probe = calibrated_probe(net, measurement)
    table = measurement.table or measure_anew(net, probe, widths, measurement)
    plans = solved_plans(net, table, targets, widths) | comparison_plans(
        net, targets, widths, density, lambda plan: joint_divergence(probe, plan)
    )
    candidates = [Candidate(name, plan, joint_divergence(probe, plan)) for name, plan in _distinct(plans).items()]
    candidates.sort(key=lambda candidate: candidate.divergence)  # of equal ones the first of `plans` stays first
    mixed = any(x is not y for x, y in zip(probe.batches, probe.norm_batches, strict=True))
    return Decision(tuple(candidates), table, probe.passes, probe.samples, time.perf_counter() - began, mixed)


def known_table(table: SensitivityTable, net: CompressedModel, measurement: Measurement) -> SensitivityTable:
    """The same table. Raises JpqError where it is of another task, network, weights, samples, version or levels."""
    calibration = None
    if measurement.same_samples:
        mixed, _ = calibration_samples(measurement.inputs(), table.samples)
        calibration = tensors_checksum(collect_tensors(mixed))
    check_table(table, net.network, measurement.model, measurement.source, calibration, measurement.task)
    levels = net.plan().weight_levels
    if table.base.get("weight_levels", levels) != levels:
        raise JpqError(
            f"{measurement.source} was measured with --weight-levels {table.base['weight_levels']}: measure it anew, "
            "or give the same."
        )
    return table


def calibrated_probe(net: CompressedModel, measurement: Measurement, samples: int = SAMPLES) -> Probe:
    """A probe of the network with up to so many samples."""
    mixed, plain = calibration_samples(measurement.inputs(), samples)
    return Probe(net, mixed, plain, measurement.divergence, unit_orders(net), measurement.main_output)


def measure_anew(
    net: CompressedModel, probe: Probe, widths: AllowedWidths, measurement: Measurement
) -> SensitivityTable:
    """The table of single changes in the float model, saved; entries that an interrupted measurement noted are used.

    Whether it is whole or coarse depends on the network and the widths alone, so every machine decides the same.
    """
    whole = whole_table_macs(probe, widths) <= MOST_MACS
    measuring, used = (
        (measure_noted, probe) if whole else (coarse_table, calibrated_probe(net, measurement, COARSE_SAMPLES))
    )
    bounds = (widths.w[0], widths.w[-1]), (widths.a[0], widths.a[-1])
    table = measuring(used, *bounds, measurement.model, measurement.notes, measurement.progress)
    table = replace(table, task=measurement.task)
    if used is not probe:
        probe.passes += used.passes
    measurement.save(table, net.network)
    if measurement.notes is not None and measurement.notes.writes:
        measurement.notes.path.unlink(missing_ok=True)
    return table


def whole_table_macs(probe: Probe, widths: AllowedWidths) -> float:
    """Multiply-accumulates of a pass over SAMPLES samples for every change of a table."""
    changes = changes_of(probe, (widths.w[0], widths.w[-1]), (widths.a[0], widths.a[-1]))
    return float(SAMPLES * len(changes) * sum(layer.macs for layer in probe.net.network.layers))


def solved_plans(
    net: CompressedModel, table: SensitivityTable, targets: Sequence[Target], widths: AllowedWidths
) -> dict[str, Plan]:
    """The solver's plans by name: with units free, and of bits alone where the first one drops units.

    Raises JpqError where no bits and units meet the targets.
    """

    def solve(free_units: bool) -> Plan:
        solver = Solver(net, allowed_part(table, widths), targets, widths.pinned, free_units)
        return solver.fill(solver.solve().plan)

    found = {MEASURED: solve(free_units=True)}
    if any(not all(kept) for kept in found[MEASURED].kept.values()):
        with suppress(JpqError):  # bits alone do not meet the targets
            found[BITS_ONLY] = solve(free_units=False)
    return found


@torch.no_grad()
def joint_divergence(probe: Probe, plan: Plan) -> float:
    """The divergence under all decisions of a plan at once, BatchNorm's statistics measured anew under them."""
    with probe.changed(plan_widths(probe.net, plan), plan_counts(probe, plan)), probe.statistics_anew():
        return probe.measure()  # anew for every plan alike, whether it drops units or not


def plan_counts(probe: Probe, plan: Plan) -> dict[str, int]:
    """Channel site -> number of units that a plan keeps."""
    return {site: sum(kept) for site, kept in plan.kept.items() if site in probe.orders}


def plan_widths(net: CompressedModel, plan: Plan) -> dict[Key, int]:
    """The widths of a plan by tensor; those of images, which are not chosen, are left out."""
    image = image_layers(net)
    found: dict[Key, int] = {}
    for name, layer in plan.layers.items():
        found[name, "w"] = layer.w_bits
        if name not in image:
            found[name, "a"] = layer.a_bits
    return found


def unit_orders(net: CompressedModel) -> dict[str, list[int]]:
    """Channel site -> its units by falling margin of its gate; equal ones by index."""
    return {
        site.name: gate.margin()[0].argsort(descending=True, stable=True).tolist()
        for site, gate in zip(net.sites, net.gates, strict=True)
        if not site.is_mask
    }


def rank_as_table(net: CompressedModel, table: SensitivityTable) -> None:
    """Give the units of each site the ranking of the table, whose counts are of its own order."""
    for site, gate in zip(net.sites, net.gates, strict=True):
        order = table.orders.get(site.name)
        if order is not None and len(order) == site.n:
            margins: Tensor = gate.margins
            ranks = torch.arange(site.n, 0, -1, dtype=margins.dtype, device=margins.device) / site.n
            margins[0, torch.tensor(order, device=margins.device)] = ranks


def allowed_part(table: SensitivityTable, widths: AllowedWidths) -> SensitivityTable:
    """The table without widths that are not allowed. Raises JpqError where a tensor has none left."""
    bits: dict[Key, Mapping[int, float]] = {}
    for key, row in table.bits.items():
        bits[key] = {b: s for b, s in row.items() if b in widths.of(key)}
        if not bits[key] and key not in widths.pinned:
            raise JpqError(
                f"The sensitivity table has no width of {key[0]} that --w-bits and --a-bits allow: measure it anew "
                "without --sensitivity."
            )
    return replace(table, bits=bits)


def _distinct(plans: Mapping[str, Plan]) -> dict[str, Plan]:
    """The plans without those that an earlier name has already."""
    seen: dict[str, str] = {}
    for name, plan in plans.items():
        seen.setdefault(plan.to_json(), name)
    return {name: plans[name] for name in seen.values()}
