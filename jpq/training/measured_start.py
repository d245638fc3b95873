"""The start of a search by measurement (`--start measured`): a table of the float model, and widths solved from it.

The table is measured before the search, kept in the run's folder and shared by its budgets; `--sensitivity FILE` takes
its place. Widths then start at the bits of least predicted divergence a little above the first budget, all units open.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from jpq.allocation.decision_data import calibration_batches, score_batches
from jpq.allocation.measured.calibration import Measurement
from jpq.allocation.measured.decide import calibrated_probe, known_table, measure_anew
from jpq.allocation.measured.start import start_widths
from jpq.allocation.measured.table import SensitivityTable
from jpq.allocation.prepare import Prepared
from jpq.allocation.procedures import allowed_widths
from jpq.allocation.ranking.rank import rank_units
from jpq.compression.attach import attach
from jpq.compression.build import fixed_share, width_factory
from jpq.compression.model import CompressedModel
from jpq.config import MEASURED, Decide
from jpq.costs.target import Target
from jpq.methods.gates import Ranked
from jpq.methods.scores import pick_score
from jpq.methods.table import METHODS
from jpq.plan import ALL_LEVELS
from jpq.tasks import CLASSIFICATION
from jpq.tasks.base import Task
from jpq.tasks.data import Data
from jpq.training.measured_decision import run_measurement
from jpq.training.run_state import RunState


def with_measured_start(
    prepared: Prepared,
    net: CompressedModel,
    model: nn.Module,
    data: Data,
    targets: tuple[Target, ...],
    run: RunState,
) -> Prepared:
    """The set-up with the initial widths that a table says.

    Args:
        prepared: of the search.
        net: attached to `model` by it.
        model: float, trained.
        data: its training split is measured on, never the held-out one.
        targets: of the first budget.
        run: state of the run.
    """
    measurement = run_measurement(data, model, run)
    found = run.timed(
        "measure",
        lambda: measure_start(
            prepared, net, model, calibration_batches(data), score_batches(data), measurement, targets, data.task
        ),
    )
    if not found.starts:
        run.notes.append("--start measured: no bits meet the budget while all channels stay, so widths start uniform.")
    return replace(prepared, starts=found.starts)


@dataclass(frozen=True, eq=False)
class MeasuredStart:
    """Initial widths by measurement."""

    starts: Mapping[tuple[str, str], float]  # tensor -> width; {} where no bits meet the budget while all units stay
    table: SensitivityTable


def measure_start(
    prepared: Prepared,
    net: CompressedModel,
    model: nn.Module,
    inputs: Sequence[Any],
    batches: Iterable[tuple[Any, Any]],
    measurement: Measurement,
    targets: Sequence[Target],
    task: Task = CLASSIFICATION,
) -> MeasuredStart:
    """Measure the float model, or take the table that is known, and solve for the widths that a search begins with.

    Args:
        prepared: of the search.
        net: attached to `model` by it.
        model: float, trained.
        inputs: to which ranges are fitted.
        batches: (inputs, labels or None) pairs, for the ranking of units.
        measurement: what sensitivities are measured on.
        targets: of the first budget.
        task: whose loss a ranking may need.

    Raises JpqError for a table of another network, weights or samples.
    """
    decide, widths = prepared.decide, allowed_widths(net, prepared.decide)
    ranked = ranked_network(net, model, inputs, decide)
    if measurement.table is not None:
        table = known_table(measurement.table, ranked, measurement)
    else:
        rank_units(ranked, pick_score(METHODS[MEASURED].score), batches, loss=task.output_loss)
        probe = calibrated_probe(ranked, measurement)
        table = measure_anew(ranked, probe, widths, measurement)
    left = fixed_share(net.sites, prepared.method, decide.density)
    starts = start_widths(ranked, table, targets, widths, left)
    return MeasuredStart({key: float(bits) for key, bits in starts.items()}, table)


def ranked_network(net: CompressedModel, model: nn.Module, inputs: Sequence[Any], decide: Decide) -> CompressedModel:
    """The float model attached for measuring and comparing plans: any whole widths, and units that a score ranks.

    Args:
        net: attached to the same layers; its pruning groups of whole channels are taken over.
        model: float.
        inputs: to which ranges are fitted.
        decide: bounds of the widths.
    """
    widest = float(decide.w_bits[1]), float(decide.a_bits[1])
    return attach(
        model,
        net.network,
        [site for site in net.sites if not site.is_mask],
        Ranked,
        width_factory(METHODS[MEASURED], decide.w_bits, decide.a_bits, decide.image_bits, widest),
        inputs,
        net.method,
        decide.output_bits,
        net.multiple,
        decide.weight_levels == ALL_LEVELS and not any(width.own_grid for width in net.widths()),
    )
