"""Search, landing and fine-tuning for one budget, each from where the run stands."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jpq.allocation import manual, two_stage
from jpq.allocation.allocators import bit_widths, place
from jpq.allocation.procedures import calibration, decide, evidence, plan_evaluator, score_of
from jpq.allocation.ranking.scheduled_pruning import ScheduledPruning, macs_limit, uniform_keep_share
from jpq.compression import discretize
from jpq.compression.calibration import recalibrate, reestimate_batchnorm
from jpq.compression.model import CompressedModel
from jpq.config import MANUAL, Config
from jpq.costs.target import Controller, Target
from jpq.export import verify
from jpq.export.rebuild import rebuild
from jpq.files import tensors
from jpq.methods.gates import Ranked
from jpq.methods.schedules import pick_schedule
from jpq.methods.table import row
from jpq.plan import Plan, from_json
from jpq.tasks.data import Data
from jpq.training import checkpoint, distributed
from jpq.training.epochs import Phase
from jpq.training.loop import Objective, fit, optimizer
from jpq.training.nonfinite import require_buffers
from jpq.training.run_state import RunState

Moments = Mapping[Tensor, Any]  # Adam's moving averages, by parameter

More = Callable[[], dict[str, Any]]  # what a checkpoint holds beside the network and its optimiser


@dataclass
class SearchState:
    """What goes on from budget to budget while decisions are learned."""

    net: CompressedModel
    optim: torch.optim.Optimizer | None = None
    pressure: dict[str, float] = field(default_factory=dict)  # the controller's multipliers

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; {} before anything was learned."""
        if self.optim is None:
            return {}
        return {"net": self.net.state_dict(), "optimizer": self.optim.state_dict(), "pressure": dict(self.pressure)}

    def restore(self, state: Mapping[str, Any], config: Config, run: RunState) -> None:
        """Go on from `state()`."""
        tensors.restore(self.net, state["net"], run.top / checkpoint.NAME)
        self.optim = search_optimizer(self.net, config)
        checkpoint.restore_optimizer(self.optim, state["optimizer"], run.top / checkpoint.NAME)
        self.pressure = dict(state["pressure"])

    def moments(self, landed: CompressedModel) -> dict[Tensor, Any]:
        """A copy of what the optimiser knows of each parameter, for `landed`, which is this network or one like it."""
        if self.optim is None:
            return {}
        own, state = dict(self.net.model.named_parameters()), self.optim.state
        pairs = [(p, own[n]) for n, p in landed.model.named_parameters() if n in own and own[n].shape == p.shape]
        return {p: copy.deepcopy(state[mine]) for p, mine in pairs if mine in state}


def train(
    net: nn.Module,
    data: Data,
    phase: Phase,
    objective: Objective,
    optim: torch.optim.Optimizer,
    run: RunState,
    more: More = dict,
) -> None:
    """One phase from where the run stands, with a checkpoint after every epoch that holds `more` too."""
    run.go_on(phase, net, optim)
    save = lambda p: run.keep(p, net, optim, **more())  # noqa: E731
    every = run.config.run.checkpoint_every
    with run.stop, distributed.Split(net, net.draws if isinstance(net, CompressedModel) else ()) as objective.split:
        run.timed(
            phase.name,
            lambda: fit(
                net,
                data,
                phase,
                objective,
                optim,
                run.recorder,
                run.watch,
                save,
                every,
                run.stop,
            ),
        )


def search_optimizer(net: CompressedModel, config: Config) -> torch.optim.Optimizer:
    """Over weights and decisions."""
    d, t = config.decide, config.train
    return optimizer(net, t.lr, t.weight_decay, d.gate_lr, d.bit_lr)


def search(
    soft: SearchState,
    model: nn.Module,
    data: Data,
    targets: tuple[Target, ...],
    config: Config,
    run: RunState,
    phase: Phase,
    more: More = dict,
) -> Plan:
    """Learn the decisions (or take them at once) and land them on the targets; nothing is settled yet."""
    method = row(soft.net.method)
    if run.is_past("search"):
        run.metrics = run.saved["metrics"]  # type: ignore[index]
        plan = from_json(run.saved["plan"], str(run.top / checkpoint.NAME))  # type: ignore[index]
    elif method.stages:
        plan = prune_first(soft, model, data, targets, config, run, phase, more)
    elif soft.net.method == MANUAL:
        plan = manual.ranked(soft.net, config.decide, score_of(config), evidence(data))
    elif not method.searches:
        score, judge = score_of(config), plan_evaluator(soft.net, data, config)
        plan = decide(
            soft.net, targets, config.decide.w_bits, config.decide.a_bits, score, judge, config.decide.allocator
        )
    else:
        plan = learn(soft, model, data, targets, config, run, phase)
    if config.decide.classes:
        run.notes.append(
            f"Channels were ranked for classes {config.decide.classes} alone; every accuracy is on all classes."
        )
    distributed.require_same(plan.to_json(), "a landed plan")
    note = discretize.underuse_note(targets, soft.net, plan)
    if note and soft.net.method != MANUAL:
        run.notes.append(note)
    return plan


def learn(
    soft: SearchState,
    model: nn.Module,
    data: Data,
    targets: tuple[Target, ...],
    config: Config,
    run: RunState,
    phase: Phase,
) -> Plan:
    """Weights and decisions in one loss. Gates anneal, and rankings close units, on the way to the first budget."""
    d, t, net = config.decide, config.train, soft.net
    method = row(net.method)
    if method.gate is Ranked and phase.anneals:
        schedule = pick_schedule(d.schedule or method.schedule)
        net.scheduled_pruning = ScheduledPruning(net, score_of(config), schedule, d.density, partial(evidence, data))
        if not run.is_in("search"):
            net.scheduled_pruning(0.0)
    controller = Controller(targets)
    controller.begin(net.exact_usage())
    controller.pressure.update(soft.pressure)
    objective = Objective(model, t.distill, t.temperature, d.gate_weight, controller)
    optim = soft.optim = soft.optim or search_optimizer(net, config)
    if run.is_in("search"):
        saved, source = run.saved or {}, run.top / checkpoint.NAME
        tensors.fitted(lambda: controller.restore(saved["controller"]), source)
    train(net, data, phase, objective, optim, run, lambda: {"controller": controller.state()})
    soft.pressure = dict(controller.pressure)
    net.finish_search()
    net.scheduled_pruning = None
    run.metrics = net.metrics()
    return discretize.discretize(net, targets)


def prune_first(
    soft: SearchState,
    model: nn.Module,
    data: Data,
    targets: tuple[Target, ...],
    config: Config,
    run: RunState,
    phase: Phase,
    more: More,
) -> Plan:
    """Stage one of two: channels go at once, and the pruned network trains before it is quantized."""
    d, t, net = config.decide, config.train, soft.net
    judge = plan_evaluator(net, data, config)
    share = uniform_keep_share(net, macs_limit(net, d.density))
    place(net, score_of(config), d.allocator, judge, share, discretize.density_target(net, d.density))
    widths = lambda plan: bit_widths(net, d.allocator, judge, plan, targets, d.w_bits, d.a_bits)  # noqa: E731
    plan = two_stage.decide_two_stage(net, targets, d.w_bits, d.a_bits, d.density, widths)
    net.freeze(two_stage.pruned(net, plan))
    soft.optim = optimizer(net, t.lr, t.weight_decay)
    train(net, data, phase, Objective(model, t.distill, t.temperature), soft.optim, run, more)
    recalibrate(net, calibration(data))
    return plan


def opened(net: CompressedModel, model: nn.Module, data: Data, run: RunState) -> nn.Module:
    """The small model at landing, to be fine-tuned in place of `net`: what opened averages did shows on it alone."""
    small, _ = rebuild(net, model)
    resumed = run.saved if run.is_past("search") else None  # which never trained this `net`
    run.opened = float(resumed["opened"]) if resumed else verify.difference(net, small, data.example)
    return small


def fine_tune(
    net: nn.Module,
    model: nn.Module,
    data: Data,
    config: Config,
    run: RunState,
    plan: Plan,
    moments: Moments,
    phase: Phase,
    more: More = dict,
) -> None:
    """Train the landed network with its decisions fixed, then measure BatchNorm's statistics anew.

    The learning rate is high where the search ends, so parameters that trained in it keep their Adam `moments`.
    """
    t = config.train
    optim = optimizer(net, t.lr, t.weight_decay)
    optim.state.update({p: moments[p] for group in optim.param_groups for p in group["params"] if p in moments})
    objective = Objective(model, t.distill, t.temperature)
    settled = lambda: {"plan": plan.to_json(), "opened": run.opened, "metrics": run.metrics, **more()}  # noqa: E731
    train(net, data, phase, objective, optim, run, settled)
    run.timed("fine-tune", lambda: reestimate_batchnorm(net, data.train.epoch(phase.before + phase.epochs)))
    require_buffers(net, "after its statistics were measured anew")
