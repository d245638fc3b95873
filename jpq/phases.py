"""Search, landing and fine-tuning for one budget, each from where the run stands."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jpq import by_hand, checkpoint, landing, ranks, stages
from jpq.allocators import bit_widths, place
from jpq.budget import Controller, Target
from jpq.closing import Closing, open_share, within
from jpq.config import BY_HAND, Config
from jpq.data import Data
from jpq.diverged import require_buffers
from jpq.exporters import verify
from jpq.exporters.quantized import rebuild
from jpq.gates import Ranked
from jpq.journal import Journal
from jpq.judging import calibration, evidence, judge_of, score_of
from jpq.methods import Method, row
from jpq.network.attach import observe_again
from jpq.network.compressed import Compressed
from jpq.parts import decide
from jpq.plan import Plan, from_json
from jpq.schedule import pick_schedule
from jpq.train import Objective, Phase, fit, optimizer, reestimate
from jpq.types import JpqError

Moments = Mapping[Tensor, Any]  # Adam's moving averages, by parameter
More = Callable[[], dict[str, Any]]  # what a checkpoint holds beside the network and its optimiser


@dataclass(frozen=True)
class Share:
    """One budget's part of the epochs."""

    search: int
    tune: int
    before: int  # epochs of the run's learning-rate curve that lie before this search
    total: int  # epochs of the whole curve

    def phases(self, budget: str, first: bool) -> tuple[Phase, Phase]:
        """(search, fine-tuning). The rate of the fine-tuning begins where the search ended, and ends at 0."""
        after = self.before + self.search
        stretch = (self.total - after) / self.tune
        return (
            Phase("search", self.search, self.before, self.total, budget=budget, anneals=first),
            Phase("fine-tune", self.tune, after, self.total, stretch=stretch, budget=budget),
        )


@dataclass
class Soft:
    """What goes on from budget to budget while decisions are learned."""

    net: Compressed
    optim: torch.optim.Optimizer | None = None
    pressure: dict[str, float] = field(default_factory=dict)  # the controller's multipliers

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; {} before anything was learned."""
        if self.optim is None:
            return {}
        return {"net": self.net.state_dict(), "optimizer": self.optim.state_dict(), "pressure": dict(self.pressure)}

    def restore(self, state: Mapping[str, Any], config: Config, run: Journal) -> None:
        """Go on from `state()`."""
        checkpoint.restore(self.net, state["net"], run.top / checkpoint.NAME)
        self.optim = search_optimizer(self.net, config)
        checkpoint.restore_optimizer(self.optim, state["optimizer"], run.top / checkpoint.NAME)
        self.pressure = dict(state["pressure"])

    def moments(self, landed: Compressed) -> dict[Tensor, Any]:
        """A copy of what the optimiser knows of each parameter, for `landed`, which is this network or one like it."""
        if self.optim is None:
            return {}
        own, state = dict(self.net.model.named_parameters()), self.optim.state
        pairs = [(p, own[n]) for n, p in landed.model.named_parameters() if n in own and own[n].shape == p.shape]
        return {p: copy.deepcopy(state[mine]) for p, mine in pairs if mine in state}


def split(config: Config, method: Method) -> tuple[int, int]:
    """(search epochs, fine-tune epochs)."""
    if not (method.searches or method.stages):
        return 0, config.train.epochs
    search = min(config.train.epochs - 1, max(1, round(config.train.search * config.train.epochs)))
    return search, config.train.epochs - search


def shares(config: Config, method: Method) -> dict[str, Share]:
    """Every budget's part: the search is divided among them, the last is fine-tuned for the rest of the epochs.

    Raises JpqError where a budget would have no epoch to search in.
    """
    budgets = list(config.each())
    search, tune = split(config, method)
    if 0 < search < len(budgets):
        raise JpqError(f"--epochs {config.train.epochs}: {search} epochs of search are too few for {len(budgets)} "
                       "budgets. Give more --epochs, or a larger --search.")  # fmt: skip
    less = config.train.tune_epochs or max(1, tune // 4)
    found, before = {}, 0
    for i, budget in enumerate(budgets):
        part = search // len(budgets) + (i < search % len(budgets))
        last = i == len(budgets) - 1
        found[budget] = Share(part, tune if last else less, before, search + tune)
        before += part
    return found


def phases(config: Config, method: Method) -> Iterator[Phase]:
    """Everything that will be trained, in order."""
    if config.task.weights is None:
        yield Phase("float", config.train.float_epochs)
    for i, (budget, share) in enumerate(shares(config, method).items()):
        yield from share.phases(budget, i == 0)


def train(
    net: nn.Module, data: Data, phase: Phase, objective: Objective, optim: torch.optim.Optimizer, run: Journal,
    more: More = dict,
) -> None:  # fmt: skip
    """One phase from where the run stands, with a checkpoint after every epoch that holds `more` too."""
    run.go_on(phase, net, optim)
    save = lambda p: run.keep(p, net, optim, **more())  # noqa: E731
    every = run.config.run.checkpoint_every
    with run.stop, ranks.Split(net, net.draws if isinstance(net, Compressed) else ()) as objective.split:
        run.timed(phase.name, lambda: fit(
            net, data, phase, objective, optim, run.recorder, run.watch, save, every, run.stop,
        ))  # fmt: skip


def search_optimizer(net: Compressed, config: Config) -> torch.optim.Optimizer:
    """Over weights and decisions."""
    d, t = config.decide, config.train
    return optimizer(net, t.lr, t.weight_decay, d.gate_lr, d.bit_lr)


def search(
    soft: Soft, model: nn.Module, data: Data, goals: tuple[Target, ...], config: Config, run: Journal, phase: Phase,
    more: More = dict,
) -> Plan:  # fmt: skip
    """Learn the decisions (or take them at once) and land them on the targets; nothing is settled yet."""
    method = row(soft.net.method)
    if run.is_past("search"):
        run.metrics = run.saved["metrics"]  # type: ignore[index]
        plan = from_json(run.saved["plan"], str(run.top / checkpoint.NAME))  # type: ignore[index]
    elif method.stages:
        plan = prune_first(soft, model, data, goals, config, run, phase, more)
    elif soft.net.method == BY_HAND:
        plan = by_hand.ranked(soft.net, config.decide, score_of(config), evidence(data))
    elif not method.searches:
        score, judge = score_of(config), judge_of(soft.net, data, config)
        plan = decide(
            soft.net, goals, config.decide.w_bits, config.decide.a_bits, score, judge, config.decide.allocator
        )
    else:
        plan = learn(soft, model, data, goals, config, run, phase)
    if config.decide.classes:
        run.notes.append(
            f"Channels were ranked for classes {config.decide.classes} alone; every accuracy is on all classes."
        )
    ranks.require_same(plan.to_json(), "a landed plan")
    note = landing.note(goals, soft.net, plan)
    if note and soft.net.method != BY_HAND:
        run.notes.append(note)
    return plan


def learn(
    soft: Soft, model: nn.Module, data: Data, goals: tuple[Target, ...], config: Config, run: Journal, phase: Phase
) -> Plan:
    """Weights and decisions in one loss. Gates anneal, and rankings close units, on the way to the first budget."""
    d, t, net = config.decide, config.train, soft.net
    method = row(net.method)
    if method.gate is Ranked and phase.anneals:
        schedule = pick_schedule(d.schedule or method.schedule)
        net.closing = Closing(net, score_of(config), schedule, d.density, partial(evidence, data))
        if not run.is_in("search"):
            net.closing(0.0)
    controller = Controller(goals)
    controller.begin(net.exact())
    controller.pressure.update(soft.pressure)
    objective = Objective(model, t.distill, t.temperature, d.gate_weight, controller)
    optim = soft.optim = soft.optim or search_optimizer(net, config)
    if run.is_in("search"):
        saved, source = run.saved or {}, run.top / checkpoint.NAME
        checkpoint.fitted(lambda: controller.restore(saved["controller"]), source)
    train(net, data, phase, objective, optim, run, lambda: {"controller": controller.state()})
    soft.pressure = dict(controller.pressure)
    net.conclude()
    net.closing = None
    run.metrics = net.metrics()
    return landing.land(net, goals)


def prune_first(
    soft: Soft, model: nn.Module, data: Data, goals: tuple[Target, ...], config: Config, run: Journal, phase: Phase,
    more: More,
) -> Plan:  # fmt: skip
    """Stage one of two: channels go at once, and the pruned network trains before it is quantized."""
    d, t, net = config.decide, config.train, soft.net
    judge = judge_of(net, data, config)
    share = open_share(net, within(net, d.density))
    place(net, score_of(config), d.allocator, judge, share, stages.goal_of(net, d.density))
    widths = lambda plan: bit_widths(net, d.allocator, judge, plan, goals, d.w_bits, d.a_bits)  # noqa: E731
    plan = stages.decide(net, goals, d.w_bits, d.a_bits, d.density, widths)
    net.settle(stages.pruned(net, plan))
    soft.optim = optimizer(net, t.lr, t.weight_decay)
    train(net, data, phase, Objective(model, t.distill, t.temperature), soft.optim, run, more)
    observe_again(net, calibration(data))
    return plan


def opened(net: Compressed, model: nn.Module, data: Data, run: Journal) -> nn.Module:
    """The small model at landing, to be fine-tuned in place of `net`: what opened averages did shows on it alone."""
    small, _ = rebuild(net, model)
    resumed = run.saved if run.is_past("search") else None  # which never trained this `net`
    run.opened = float(resumed["opened"]) if resumed else verify.difference(net, small, data.example)
    return small


def fine_tune(
    net: nn.Module, model: nn.Module, data: Data, config: Config, run: Journal, plan: Plan, moments: Moments,
    phase: Phase, more: More = dict,
) -> None:  # fmt: skip
    """Train the landed network with its decisions fixed, then measure BatchNorm's statistics anew.

    The learning rate is high where the search ends, so parameters that trained in it keep their Adam `moments`.
    """
    t = config.train
    optim = optimizer(net, t.lr, t.weight_decay)
    optim.state.update({p: moments[p] for group in optim.param_groups for p in group["params"] if p in moments})
    objective = Objective(model, t.distill, t.temperature)
    settled = lambda: {"plan": plan.to_json(), "opened": run.opened, "metrics": run.metrics, **more()}  # noqa: E731
    train(net, data, phase, objective, optim, run, settled)
    run.timed("fine-tune", lambda: reestimate(net, data.train.epoch(phase.before + phase.epochs)))
    require_buffers(net, "after its statistics were measured anew")
