"""`jpq.sensitivity`: how much a model's outputs change when one tensor is rounded, or one site keeps fewer units.

A measurement that is written to a file notes every entry beside it as soon as it is found, and goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from jpq.allocation.decision_data import CALIBRATION_BATCHES
from jpq.allocation.measured import coarse
from jpq.allocation.measured.calibration import SAMPLES, calibration_samples
from jpq.allocation.measured.coarse import COARSE, coarse_table
from jpq.allocation.measured.decide import unit_orders
from jpq.allocation.measured.estimate import AUTO, CostEstimate, check_samples, estimate_cost, pick_estimator
from jpq.allocation.measured.fisher import fisher_table
from jpq.allocation.measured.measure import Bounds
from jpq.allocation.measured.partial import PartialTable, measure_noted
from jpq.allocation.measured.probe import Divergence, Probe
from jpq.allocation.measured.table import SensitivityTable, model_checksum, write_table
from jpq.allocation.prepare import prepare
from jpq.allocation.ranking.rank import rank_units
from jpq.compression.model import CompressedModel
from jpq.config import Budget, Decide
from jpq.tasks import CLASSIFICATION
from jpq.tasks.base import Task
from jpq.tracing.decompose import decompose
from jpq.tracing.forward import take_samples
from jpq.tracing.network import Network
from jpq.types import JpqError

METHOD = "measured"  # whose set-up and ranking of units a table is measured with


@dataclass(frozen=True, eq=False)
class SensitivityProbe:
    """A model that is ready to be measured."""

    probe: Probe
    network: Network
    model: str  # checksum of the float weights
    w_bits: Bounds
    a_bits: Bounds
    net: CompressedModel  # that is probed
    inputs: Sequence[Any]  # batches of samples, not mixed
    task: str = ""  # name of the task whose distance is measured; "": a distance of the caller's own

    def with_samples(self, count: int) -> Probe:
        """A probe of the same network on the first samples alone."""
        mixed, plain = calibration_samples(self.inputs, count)
        probe = self.probe
        return Probe(self.net, mixed, plain, probe.divergence, probe.orders, probe.main_output)


def sensitivity(
    model: nn.Module,
    inputs: Tensor | Iterable[Any],
    *,
    task: Task = CLASSIFICATION,
    divergence: Divergence | None = None,
    estimator: str = AUTO,
    samples: int = SAMPLES,
    w_bits: Bounds = (2, 8),
    a_bits: Bounds = (2, 8),
    out: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> pd.DataFrame:
    """How sensitive a trained model's outputs are to the width of each tensor and to the units of each site.

    Args:
        model: float, trained; it is not changed.
        inputs: training inputs, [samples, ...], or batches of them, each alone or beside its targets; of a model with
            several inputs a dict of keywords each, or a tuple of arguments beside its targets. They are mixed in pairs,
            because the model is too sure of samples that it was trained on; token numbers stay as they are.
        task: whose divergence is measured; classification: KL(float || changed) in nats.
        divergence: another distance (output, float output) -> scalar.
        estimator: single (one change at a time), coarse (half of the changes on 128 samples, the other widths
            interpolated), fisher (one backward pass, for large models), or auto (single where it takes less than ten
            minutes, else coarse where that takes less than thirty, else fisher).
        samples: how many of the inputs are used.
        w_bits, a_bits: smallest and largest width of weights and of activations.
        out: a CSV file to write too, for `jpq optimize --sensitivity`.
        progress: is told how many entries are done, of how many.

    Returns a row per entry: `what` (weight, input or units), `name` of the layer or site, `value` (bits, or units that
    stay), `of` (32, or all units), `divergence` and the layer's `macs`. Raises JpqError for models whose main output
    (`task.main_output`) is not one tensor, for tasks without a divergence, and where there are no inputs.
    """
    batches = list(inputs.split(64)) if isinstance(inputs, Tensor) else list(_without_targets(inputs))
    distance, name = (task_divergence(task), task.name) if divergence is None else (divergence, "")
    probed = probe_model(model, batches, distance, samples, w_bits, a_bits, task.main_output, name)
    chosen, _ = pick_estimator(estimator, estimate_cost(probed.probe, w_bits, a_bits))
    table = measure(probed, chosen, progress=progress)
    if out is not None:
        write_table(out, table, probed.network)
    return table_frame(table, probed.network)


def probe_model(
    model: nn.Module,
    batches: Iterable[Any],
    divergence: Divergence,
    samples: int = SAMPLES,
    w_bits: Bounds = (2, 8),
    a_bits: Bounds = (2, 8),
    main_output: Callable[[Any], Any] = CLASSIFICATION.main_output,
    task: str = "",
) -> SensitivityProbe:
    """A copy of a model with quantizers and gates, its units ranked, and the samples that it is measured on.

    Arguments and errors as for `sensitivity`; `main_output` is that of its task, and `task` its name.
    """
    check_samples(samples)
    inputs = list(batches)
    mixed, plain = calibration_samples(inputs, samples)
    model = decompose(model, plain[0]).eval()
    decide = Decide(method=METHOD, w_bits=w_bits, a_bits=a_bits)
    prepared = prepare(model, take_samples(plain[0], 0, 2), decide, Budget(target_bops="100%"))
    net = prepared.attach(model, inputs[:CALIBRATION_BATCHES])
    rank_units(net, prepared.score)
    probe = Probe(net, mixed, plain, divergence, unit_orders(net), main_output)
    return SensitivityProbe(probe, prepared.network, model_checksum(model), w_bits, a_bits, net, plain, task)


def measure(
    probed: SensitivityProbe,
    estimator: str,
    partial: Path | None = None,
    resume: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SensitivityTable:
    """The table of a model, by an estimator's name.

    Args:
        probed: the model and its calibration.
        estimator: single, coarse or fisher.
        partial: a file that each entry is noted in as soon as it is found; it is removed at the end.
        resume: begin with the entries of that file.
        progress: is told how many entries, or parts of the calibration, are done.

    Raises JpqError where the entries of `partial` are of another measurement.
    """
    bounds = probed.w_bits, probed.a_bits
    if estimator == "fisher":
        return replace(fisher_table(probed.probe, *bounds, probed.model, progress=progress), task=probed.task)
    notes = None if partial is None else PartialTable(partial, resume, task=probed.task)
    if estimator == COARSE:
        table = coarse_table(probed.with_samples(coarse.SAMPLES), *bounds, probed.model, notes, progress)
    else:
        table = measure_noted(probed.probe, *bounds, probed.model, notes, progress)
    if partial is not None:
        partial.unlink()
    return replace(table, task=probed.task)


def table_frame(table: SensitivityTable, network: Network) -> pd.DataFrame:
    """A table as a DataFrame: a row per entry, in the order of the layers."""
    macs = {layer.name: layer.macs for layer in network.layers}
    rows: list[tuple[str, str, int, int, float, int | None]] = []
    for (layer, side), by_width in table.bits.items():
        what = "weight" if side == "w" else "input"
        rows += [(what, layer, b, 32, s, macs.get(layer)) for b, s in sorted(by_width.items())]
    for site, by_count in table.units.items():
        rows += [("units", site, k, len(table.orders[site]), s, None) for k, s in sorted(by_count.items())]
    frame = pd.DataFrame(rows, columns=["what", "name", "value", "of", "divergence", "macs"])
    return frame.astype({"macs": "Int64"})


def task_divergence(task: Task) -> Divergence:
    """The task's distance of two outputs. Raises JpqError where it has none."""
    divergence: Divergence | None = getattr(task, "divergence", None)
    if divergence is None:
        raise JpqError(
            f"The task '{task.name}' has no divergence, so sensitivities cannot be measured: give it a method "
            "divergence(output, reference)."
        )
    return divergence


def describe_cost(cost: CostEstimate, estimator: str, samples: int) -> str:
    """Time and memory before a measurement, as a sentence."""
    fewer = (
        f", of which half are measured on {coarse.SAMPLES} samples" if estimator == COARSE else f" on {samples} samples"
    )
    return (
        f"{cost.changes} entries{fewer}: about {cost.seconds[estimator]:.0f} s "
        f"({cost.pass_seconds:.2f} s a pass), {cost.memory / 2**20:.0f} MiB beside the model"
    )


def _without_targets(batches: Iterable[Any]) -> Iterator[Any]:
    """The inputs of batches that are tensors or pairs of (inputs, targets)."""
    for batch in batches:
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        yield batch[0] if pair else batch
