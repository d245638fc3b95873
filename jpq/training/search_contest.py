"""The contest at the end of a search (`--search-contest`): the learned plan beside uniform bits and two stages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from jpq.allocation.decision_data import calibration_batches
from jpq.allocation.measured.candidates import comparison_plans
from jpq.allocation.procedures import allowed_widths
from jpq.allocation.ranking.rank import rank_units
from jpq.compression.model import CompressedModel
from jpq.methods.scores import pick_score
from jpq.plan import Plan
from jpq.training import distributed
from jpq.training.contest import Entry, contest_steps, hold_contest
from jpq.training.job import Job
from jpq.training.measured_decision import plan_costs, record_contest
from jpq.training.measured_start import ranked_network
from jpq.types import JpqError


def contest_of_search(
    net: CompressedModel,
    learned: Plan,
    job: Job,
) -> Plan:
    """The plan that a contest keeps: the learned one, uniform bits, those with wider ends, or two stages.

    Args:
        net: attached, as the search has left it; every plan begins with its weights.
        learned: the discretized plan of the search.
        job: what the run works on at this budget; its held-out data judge.

    Raises JpqError for masks inside layers, which the other plans do not have.
    """
    if any(site.is_mask for site in net.sites):
        raise JpqError("--search-contest compares plans of whole channels, which this method does not: leave it out.")
    plans = usual_plans(net, job)
    entries = [Entry(net.method, learned, math.nan)]
    entries += [Entry(name, replace(learned, layers=p.layers, kept=p.kept), math.nan) for name, p in plans.items()]
    run = job.run
    run.observer.phase("contest", 0, 0)
    hold = partial(hold_contest, net, entries, job.model, job.data, job.config, True, run.loss_scale)
    verdict = run.timed("contest", lambda: distributed.run_on_first(hold))
    rows = [{"name": entry.name, "divergence": None, **plan_costs(net, entry.plan), "kept": False} for entry in entries]
    run.contest = {"candidates": rows}
    record_contest(run, entries, verdict, contest_steps(job.config, job.data))
    return entries[verdict.kept].plan


def usual_plans(net: CompressedModel, job: Job) -> Mapping[str, Plan]:
    """The plans of uniform bits and two stages for the float model, by name; those that cannot be are left out."""
    d = job.config.decide
    ranked = ranked_network(net, job.model, calibration_batches(job.data), d)
    rank_units(ranked, pick_score("l1"))
    return comparison_plans(ranked, job.targets, allowed_widths(net, d), d.density)
