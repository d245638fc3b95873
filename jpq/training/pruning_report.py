"""The report of a run on what more pruning would cost at its budget, beside taking as much from the bits."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from jpq.allocation.decision_data import calibration_batches
from jpq.allocation.measured.pruning_price import price_pruning
from jpq.allocation.procedures import procedure_of
from jpq.compression.model import CompressedModel
from jpq.costs.target import Target
from jpq.plan import Plan
from jpq.tasks import CLASSIFICATION
from jpq.tasks.data import Data
from jpq.training import distributed
from jpq.training.run_state import RunState


def report_pruning_price(
    net: CompressedModel, plan: Plan, model: nn.Module, data: Data, targets: tuple[Target, ...], run: RunState
) -> None:
    """Measure the price of more pruning after a search for channels, and add its sentence to the notes of the run.

    Done once for each budget: a run that is resumed after the search has the figures in its checkpoint.

    Args:
        net: after the search, before its plan is frozen.
        plan: what the search came to.
        model: float.
        data: training batches are read.
        targets: of the budget.
        run: its record `pruning` is filled; {} where there is nothing to measure.
    """
    if run.is_past("search"):
        run.pruning = (run.saved or {}).get("pruning", {})
    elif _searches_channels(net):
        run.observer.phase("price of pruning", 0, 0)
        run.pruning = run.timed(
            "search", lambda: distributed.run_on_first(partial(_measure, net, plan, model, data, targets))
        )
    if run.pruning:
        run.notes.append(run.pruning["sentence"])


def _searches_channels(net: CompressedModel) -> bool:
    """Whether a search decides how many channels stay."""
    learned = [g for s, g in zip(net.sites, net.gates, strict=True) if not s.is_mask and not g.fixed_count]
    return procedure_of(net.method).searches and bool(learned) and len(learned) == len(net.sites)


def _measure(
    net: CompressedModel, plan: Plan, model: nn.Module, data: Data, targets: tuple[Target, ...]
) -> dict[str, Any]:
    unit = "nats" if data.task.name == CLASSIFICATION.name else ""
    inputs = partial(calibration_batches, data)
    price = price_pruning(net, plan, model, targets, inputs, data.task.divergence, unit, data.task.main_output)
    return {} if price is None else {**price.record(), "sentence": price.sentence()}
