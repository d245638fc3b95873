"""The decision of `--method measured` in a run: its table is kept in the run's folder, and what it compared noted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from jpq import costs
from jpq.allocation.decision_data import calibration_inputs, plan_evaluator
from jpq.allocation.measured.calibration import Measurement
from jpq.allocation.measured.candidates import MEASURED
from jpq.allocation.measured.decide import Decision
from jpq.allocation.measured.partial import PartialTable, partial_path
from jpq.allocation.measured.table import SensitivityTable, model_checksum, read_table, write_table
from jpq.allocation.procedures import Measured
from jpq.compression.model import CompressedModel
from jpq.config import RECONSTRUCTION
from jpq.plan import Plan
from jpq.tasks.data import Data
from jpq.training import distributed
from jpq.training.contest import Entry, Verdict, contest_steps, hold_contest, keeps_all
from jpq.training.job import Job
from jpq.training.run_state import RunState

SOLVED_ENTRIES = 2  # of the solver's plans that take part in a contest

TABLE_NAME = "sensitivity.csv"  # in the run's folder


def compare_plans(
    procedure: Measured,
    net: CompressedModel,
    job: Job,
    float_net: Callable[[], CompressedModel] | None = None,
) -> Decision:
    """The plans that measuring compares, the least divergence first.

    The table is read from the run's folder where an earlier budget, or an earlier part of this run, has measured it.

    Args:
        procedure: of the method.
        net: attached, its decisions open.
        job: what the run works on at this budget; its training data are measured on, never the held-out ones.
        float_net: gives the network attached to the float model, where `net` has other weights by now.
    """
    evaluator = plan_evaluator(net, job.data, job.config.run.seed)
    evaluator = replace(evaluator, measurement=replace(run_measurement(job.data, job.model, job.run), net=float_net))
    decision: Decision = job.run.timed(
        "measure", lambda: procedure.compare(net, job.targets, job.config.decide, evaluator)
    )
    job.run.contest = decision_record(net, decision)
    return decision


def run_measurement(data: Data, model: nn.Module, run: RunState, measured: bool = False) -> Measurement:
    """The means of measuring in a run: its table is kept in the run's folder, and what it finds noted beside it.

    Args:
        data: its training split is measured on.
        model: float, trained.
        run: whose observer is told how much is measured.
        measured: whether this run has measured its table before.
    """
    task, kept = data.task, run.top / TABLE_NAME
    table, source = known_table(run, measured)
    return Measurement(
        inputs=lambda: calibration_inputs(data),
        divergence=task.divergence,
        model=model_checksum(model),
        table=table,
        source=str(source),
        save=lambda table, network: distributed.run_on_first(lambda: write_table(kept, table, network)),
        progress=_Steps(run),
        main_output=task.main_output,
        notes=PartialTable(partial_path(kept), run.config.run.resume, distributed.is_first(), task.name),
        same_samples=run.config.decide.sensitivity is not None,
        task=task.name,
    )


class _Steps:
    """Tells a run's observer of each change that is measured, as a step of a phase without epochs."""

    def __init__(self, run: RunState) -> None:
        self.run, self.told = run, -1  # -1: the phase has not begun

    def __call__(self, done: int, total: int) -> None:
        """Receive how many of the changes are measured."""
        if self.told < 0:
            self.run.observer.phase("measure", 0, total)
            self.told = 0
        for _ in range(done - self.told):
            self.run.observer.step(math.nan, math.nan, math.nan)
        self.told = max(done, self.told)


def confirmed_plan(net: CompressedModel, decision: Decision, job: Job) -> Plan:
    """The plan that a contest confirms, as the run's record then says; that of least divergence with `--no-contest`."""
    entries = contest_entries(decision)
    if not job.config.decide.contest or len(entries) < 2:
        return decision.best.plan
    run = job.run
    run.observer.phase("contest", 0, 0)
    hold = partial(hold_contest, net, entries, job.model, job.data, job.config, scale=run.loss_scale)
    verdict = run.timed("contest", lambda: distributed.run_on_first(hold))
    record_contest(run, entries, verdict, contest_steps(job.config, job.data))
    return entries[verdict.kept].plan


def contest_entries(decision: Decision) -> list[Entry]:
    """The plans that are worth training: those of the usual methods, and two of the solver's.

    Of the solver's it is the one of least divergence, and the next best that differs from it in kind: that keeps every
    unit where the first does not, or the other way round. Where all are of one kind it is the second best.
    """
    solved = [c for c in decision.candidates if c.name.startswith(MEASURED)]
    usual = [c for c in decision.candidates if not c.name.startswith(MEASURED)]
    rest = sorted(solved[1:], key=lambda c: keeps_all(c.plan) == keeps_all(solved[0].plan))
    return [Entry(c.name, c.plan, c.divergence) for c in (*solved[:1], *rest[: SOLVED_ENTRIES - 1], *usual)]


def record_contest(run: RunState, entries: Sequence[Entry], verdict: Verdict, first_rung: int) -> None:
    """Add to the run's record of candidates what the contest found, and keep the weights that it has trained."""
    outcomes = dict(zip((entry.name for entry in entries), verdict.outcomes, strict=True))
    tied = {entries[place].name for place in verdict.tied}
    for row in run.contest["candidates"]:
        row["kept"] = row["name"] == entries[verdict.kept].name
        outcome = outcomes.get(row["name"])
        if outcome is not None:
            row |= {
                "held_out_loss": outcome.loss if math.isfinite(outcome.loss) else None,
                "held_out_metric": outcome.metric if math.isfinite(outcome.metric) else None,
                "steps": outcome.steps,
                "tied": row["name"] in tied,
                "seconds": round(outcome.seconds, 2),
            }
    run.contest |= {
        "steps": first_rung,
        "all_steps": sum(outcome.steps for outcome in verdict.outcomes),
        "contest_seconds": round(sum(outcome.seconds for outcome in verdict.outcomes), 2),
        "held_out_samples": len(verdict.outcomes[0].losses),
    }
    run.trained = verdict.state


def take_contest_weights(net: CompressedModel, job: Job) -> None:
    """Go on from the weights that the contest has trained under the plan that it kept: its steps are not lost.

    Not where norms are opened, which train rebuilt, nor where the rounding of the weights is learned first, from the
    weights as they were. A run that is resumed after its search has weights in its checkpoint.

    Args:
        net: frozen under that plan.
        job: what the run works on at this budget.
    """
    run = job.run
    if run.trained is not None and not net.opened and job.config.train.warm_start != RECONSTRUCTION:
        net.load_state_dict(run.trained)
    run.trained = None


def known_table(run: RunState, measured: bool = False) -> tuple[SensitivityTable | None, Path]:
    """(the table that is known already, its file): that of --sensitivity, or the one that this run has measured.

    A run has measured it where it says so (`measured`), an earlier budget did, or it did before it was interrupted.
    Raises JpqError for a bad file.
    """
    given, kept = run.config.decide.sensitivity, run.top / TABLE_NAME
    if given is not None:
        return distributed.first_then_others(lambda: read_table(given)), given
    may_be_ours = measured or run.budget > 0 or run.config.run.resume
    return (read_table(kept) if may_be_ours and kept.is_file() else None), kept


def decision_record(net: CompressedModel, decision: Decision) -> dict[str, Any]:
    """What was measured and compared, for result.json and the report."""
    return {
        "estimator": decision.table.estimator,
        "samples": decision.samples,
        "mixed": decision.mixed,
        "passes": decision.passes,
        "measure_seconds": round(decision.seconds, 2),
        "candidates": [
            {
                "name": candidate.name,
                "divergence": candidate.divergence,
                **plan_costs(net, candidate.plan),
                "kept": place == 0,
            }
            for place, candidate in enumerate(decision.candidates)
        ],
    }


def plan_costs(net: CompressedModel, plan: Plan) -> dict[str, float]:
    """Costs of a plan, and its mean widths and share of kept units."""
    uses = net.exact_usage(plan)
    layers = [use for use in uses if use.part == "layer"]  # those kept in floating point count, with 32 bits
    units = [unit for kept in plan.kept.values() for unit in kept]
    return {
        "bops": int(costs.bops(uses)),
        "bops_share": float(costs.bops(uses)) / costs.baseline(uses)["bops"],
        "macs": int(costs.macs(uses)),
        "size": int(costs.size(uses)),
        "w_bits": sum(layer.w_bits for layer in layers) / max(1, len(layers)),
        "a_bits": sum(layer.a_bits for layer in layers) / max(1, len(layers)),
        "units": sum(units) / max(1, len(units)),
    }
