"""The phases of one budget (float training, search, fine-tuning), each from the run's current state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jpq.allocation.decision_data import calibration_batches, plan_evaluator, score_batches
from jpq.allocation.procedures import Measured, procedure_of, score_of
from jpq.allocation.ranking.scheduled_pruning import ScheduledPruning
from jpq.compression import feasibility
from jpq.compression.calibration import recalibrate, reestimate_batchnorm
from jpq.compression.model import CompressedModel
from jpq.config import MEASURED_START, Config
from jpq.costs.target import Controller
from jpq.export import verify
from jpq.export.rebuild import rebuild
from jpq.files import tensors
from jpq.methods.schedules import pick_schedule
from jpq.methods.table import method_row
from jpq.plan import Plan, from_json
from jpq.tasks.data import Data
from jpq.training import checkpoint, distributed
from jpq.training.epochs import Phase
from jpq.training.job import Job
from jpq.training.loop import Objective, build_optimizer, fit
from jpq.training.measured_decision import compare_plans, confirmed_plan, run_measurement
from jpq.training.nonfinite import check_buffers
from jpq.training.resolve_bits import BitsResolver
from jpq.training.run_state import RunState
from jpq.training.search_contest import contest_of_search

Moments = Mapping[Tensor, Any]  # Adam's moving averages, by parameter
CheckpointExtra = Callable[[], dict[str, Any]]  # entries of a checkpoint beside the network and its optimiser


@dataclass
class SearchState:
    """The state of a search that goes on from budget to budget: network, optimiser, multipliers of the targets."""

    net: CompressedModel
    optim: torch.optim.Optimizer | None = None
    pressure: dict[str, float] = field(default_factory=dict)  # the controller's multipliers

    def state(self) -> dict[str, Any]:
        """Entries of a checkpoint; {} before anything was learned."""
        if self.optim is None:
            return {}
        return {"net": self.net.state_dict(), "optimizer": self.optim.state_dict(), "pressure": dict(self.pressure)}

    def restore(self, state: Mapping[str, Any], config: Config, run: RunState) -> None:
        """Restore the search from a `state()`."""
        tensors.restore(self.net, state["net"], run.top / checkpoint.NAME)
        self.optim = search_optimizer(self.net, config)
        checkpoint.restore_optimizer(self.optim, state["optimizer"], run.top / checkpoint.NAME)
        self.pressure = dict(state["pressure"])

    def moments(self, discretized: CompressedModel) -> dict[Tensor, Any]:
        """A copy of Adam's moving averages for the parameters of `discretized`, this network or a copy of it."""
        if self.optim is None:
            return {}
        parameters, state = dict(self.net.model.named_parameters()), self.optim.state
        pairs = [
            (p, parameters[n])
            for n, p in discretized.model.named_parameters()
            if n in parameters and parameters[n].shape == p.shape
        ]
        return {p: copy.deepcopy(state[mine]) for p, mine in pairs if mine in state}


def train(
    net: nn.Module,
    data: Data,
    phase: Phase,
    objective: Objective,
    optim: torch.optim.Optimizer,
    run: RunState,
    extra: CheckpointExtra = dict,
    begin_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train one phase from the run's current state; a checkpoint after every epoch holds `extra` too."""

    def save(position: Phase) -> None:
        run.save_checkpoint(position, net, optim, **extra())

    run.resume_phase(phase, net, optim)
    every = run.config.run.checkpoint_every
    with run.stop, distributed.Split(net, net.draws if isinstance(net, CompressedModel) else ()) as objective.split:
        run.timed(
            phase.name,
            lambda: fit(
                net, data, phase, objective, optim, run.recorder, run.observer, save, every, run.stop, begin_epoch
            ),
        )


def search_optimizer(net: CompressedModel, config: Config) -> torch.optim.Optimizer:
    """AdamW over weights and decisions, at the rates of the config."""
    d, t = config.decide, config.train
    return build_optimizer(net, t.lr, t.weight_decay, d.gate_lr, d.bit_lr)


def search(
    state: SearchState,
    job: Job,
    phase: Phase,
    extra: CheckpointExtra = dict,
    float_net: Callable[[], CompressedModel] | None = None,
) -> Plan:
    """The plan of one budget: learned in a search phase and discretized, or decided at once; nothing is frozen yet.

    Args:
        state: the attached network, with the optimiser and multipliers of an earlier budget.
        job: what the run works on at this budget.
        phase: of the search.
        extra: what checkpoints of the phase hold besides.
        float_net: gives the network attached to the float model, where that of `state` has other weights by now.
    """
    net, run, procedure = state.net, job.run, procedure_of(state.net.method)
    if run.is_past("search"):
        run.metrics = run.saved["metrics"]  # type: ignore[index]
        run.contest = run.saved.get("contest", {})  # type: ignore[union-attr]
        plan = from_json(run.saved["plan"], str(run.top / checkpoint.NAME))  # type: ignore[index]
    else:
        if procedure.searches:
            learn_decisions(state, job, phase)
        plan = decide_plan(net, job, float_net)
        stage_plan = procedure.first_stage(net, plan)
        if stage_plan is not None and phase.epochs:
            train_first_stage(state, stage_plan, job, phase, extra)
    if job.config.decide.classes:
        run.notes.append(
            f"Channels were ranked for classes {job.config.decide.classes} alone; every accuracy is on all classes."
        )
    distributed.check_same(plan.to_json(), "a plan")
    note = feasibility.underuse_note(job.targets, net, plan) if procedure.fills_budget else ""
    if note:
        run.notes.append(note)
    return plan


def decide_plan(
    net: CompressedModel,
    job: Job,
    float_net: Callable[[], CompressedModel] | None,
) -> Plan:
    """The plan of the method's procedure, after the contest that it holds or was asked for."""
    procedure, d = procedure_of(net.method), job.config.decide
    if isinstance(procedure, Measured):
        return confirmed_plan(net, compare_plans(procedure, net, job, float_net), job)
    evaluator = plan_evaluator(net, job.data, job.config.run.seed)
    if procedure.searches and d.start == MEASURED_START:
        evaluator = replace(evaluator, measurement=run_measurement(job.data, job.model, job.run, measured=True))
    plan = procedure.decide(net, job.targets, d, evaluator)
    if procedure.searches and d.search_contest:
        return contest_of_search(net, plan, job)
    return plan


def learn_decisions(
    state: SearchState,
    job: Job,
    phase: Phase,
) -> None:
    """Train weights and decisions in one loss; gates anneal and rankings close units on the way to the first budget."""
    d, t, net, run = job.config.decide, job.config.train, state.net, job.run
    method = method_row(net.method)
    if method.score and phase.anneals:
        schedule = pick_schedule(d.schedule or method.schedule)
        score = score_of(net.method, d)
        net.scheduled_pruning = ScheduledPruning(
            net, score, schedule, d.density, partial(score_batches, job.data), job.data.task.output_loss
        )
        if not run.is_within("search"):
            net.scheduled_pruning(0.0)
    controller = Controller(job.targets)
    controller.begin(net.exact_usage())
    controller.pressure.update(state.pressure)
    objective = Objective(
        job.model, t.distill, t.temperature, d.gate_weight, controller, scale=run.loss_scale, precision=t.precision
    )
    optim = state.optim = state.optim or search_optimizer(net, job.config)
    if run.is_within("search"):
        saved, source = run.saved or {}, run.top / checkpoint.NAME
        tensors.apply_saved(lambda: controller.restore(saved["controller"]), source)
    train(net, job.data, phase, objective, optim, run, lambda: {"controller": controller.state()})
    state.pressure = dict(controller.pressure)
    net.finish_search()
    net.scheduled_pruning = None
    run.metrics = net.metrics()


def train_first_stage(
    state: SearchState,
    plan: Plan,
    job: Job,
    phase: Phase,
    extra: CheckpointExtra,
) -> None:
    """Train the pruned network of a two-stage method before it is quantized."""
    t, net = job.config.train, state.net
    net.freeze(plan)
    state.optim = build_optimizer(net, t.lr, t.weight_decay)
    objective = Objective(job.model, t.distill, t.temperature, scale=job.run.loss_scale, precision=t.precision)
    train(net, job.data, phase, objective, state.optim, job.run, extra)
    recalibrate(net, calibration_batches(job.data))


def rebuild_opened(net: CompressedModel, job: Job) -> nn.Module:
    """The rebuilt model, fine-tuned instead of `net` where norms were opened: only it has the changed averages."""
    small, _ = rebuild(net, job.model)
    run = job.run
    resumed = run.saved if run.is_past("search") else None  # which never trained this `net`
    run.opened = float(resumed["opened"]) if resumed else verify.difference(net, small, job.data.example)
    return small


def fine_tune(
    net: nn.Module,
    job: Job,
    plan: Plan,
    moments: Moments,
    phase: Phase,
    extra: CheckpointExtra = dict,
    resolver: BitsResolver | None = None,
) -> None:
    """Train the discretized network with its decisions fixed, then re-estimate BatchNorm's statistics.

    With a `resolver` bits are solved for once more on the way. Nothing is done in a phase of no epochs (`--effort
    minutes`).
    The learning rate is high where the search ends, so parameters that trained in it keep their Adam `moments`.
    """
    if not phase.epochs:
        return
    t, run = job.config.train, job.run
    optim = build_optimizer(net, t.lr, t.weight_decay)
    optim.state.update({p: moments[p] for group in optim.param_groups for p in group["params"] if p in moments})
    objective = Objective(job.model, t.distill, t.temperature, scale=run.loss_scale, precision=t.precision)

    def settled() -> dict[str, Any]:
        record: dict[str, Any] = {"metrics": run.metrics, "contest": run.contest, "pruning": run.pruning}
        if resolver is not None:
            record |= {"resolved": resolver.record}
        final = plan if resolver is None else resolver.plan
        return {"plan": final.to_json(), "opened": run.opened, **record, **extra()}

    train(net, job.data, phase, objective, optim, run, settled, resolver or (lambda epoch: None))
    run.timed("fine-tune", lambda: reestimate_batchnorm(net, job.data.train.epoch(phase.before + phase.epochs)))
    check_buffers(net, "after its statistics were measured anew")
