"""The report of a run on what more pruning would cost at its budget, beside taking as much from the bits."""

from __future__ import annotations

from functools import partial
from typing import Any

from jpq.allocation.decision_data import calibration_batches
from jpq.allocation.measured.pruning_price import price_pruning
from jpq.allocation.procedures import procedure_of
from jpq.compression.model import CompressedModel
from jpq.plan import Plan
from jpq.tasks import CLASSIFICATION
from jpq.training import distributed
from jpq.training.job import Job


def report_pruning_price(net: CompressedModel, plan: Plan, job: Job) -> None:
    """Measure the price of more pruning after a search for channels, and add its sentence to the notes of the run.

    Done once for each budget: a run that is resumed after the search has the figures in its checkpoint.

    Args:
        net: after the search, before its plan is frozen.
        plan: what the search came to.
        job: what the run works on at this budget; the run's record `pruning` is filled, {} where there is nothing to
            measure.
    """
    run = job.run
    if run.is_past("search"):
        run.pruning = (run.saved or {}).get("pruning", {})
    elif _searches_channels(net):
        run.observer.phase("price of pruning", 0, 0)
        run.pruning = run.timed("search", lambda: distributed.run_on_first(partial(_measure, net, plan, job)))
    if run.pruning:
        run.notes.append(run.pruning["sentence"])


def _searches_channels(net: CompressedModel) -> bool:
    """Whether a search decides how many channels stay."""
    learned = [g for s, g in zip(net.sites, net.gates, strict=True) if not s.is_mask and not g.fixed_count]
    return procedure_of(net.method).searches and bool(learned) and len(learned) == len(net.sites)


def _measure(net: CompressedModel, plan: Plan, job: Job) -> dict[str, Any]:
    task = job.data.task
    unit = "nats" if task.name == CLASSIFICATION.name else ""
    inputs = partial(calibration_batches, job.data)
    price = price_pruning(net, plan, job.model, job.targets, inputs, task.divergence, unit, task.main_output)
    return {} if price is None else {**price.record(), "sentence": price.sentence()}
