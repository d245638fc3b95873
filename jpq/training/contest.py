"""The contest of plans: each is trained for a while from the same weights, and judged on held-out samples.

What a table of sensitivities predicts holds before training, and training heals some noise and not other; so the plan
that was measured has to stand beside uniform bits and two stages after some steps. Successive halving (K. Jamieson and
A. Talwalkar, AISTATS 2016) spends most of the steps on the plans that lead:

1. Every plan trains for a first rung of steps, its learning rate falling to 0, and is judged.
2. The better half trains on, with the weights that it has, for a second rung of twice as many steps. Pruned plans and
   plans that keep every unit learn at different speeds; so the best of the other kind goes on too where the better half
   is of one kind.
3. The plan of least mean held-out loss leads. Of the plans of the last rung that do not exceed it by more than two
   standard errors (of the paired differences over samples), one that keeps every unit is kept before one that prunes,
   then one of smaller divergence from the float model before training, then the first.

So the kept plan is never judged worse than uniform bits or two stages beyond the noise of the samples. The rule was
settled before any figure.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from jpq.allocation.decision_data import calibration_batches
from jpq.compression.batchnorm import start_training
from jpq.compression.calibration import recalibrate, reestimate_batchnorm
from jpq.compression.model import CompressedModel
from jpq.compression.power_of_two_steps import round_activation_steps
from jpq.config import Config
from jpq.plan import Plan
from jpq.tasks.base import Task
from jpq.tasks.data import Data
from jpq.tracing.forward import batch_size, call_model, eval_mode
from jpq.training.epochs import Phase
from jpq.training.loop import MAX_GRADIENT_NORM, Objective, build_optimizer
from jpq.types import JpqError

Floats = npt.NDArray[np.float64]

FEWEST_STEPS = 60  # of the first rung
SECOND_RUNG = 2  # its steps, in multiples of those of the first
NORM_BATCHES = 16  # that BatchNorm's statistics are measured on before a plan is judged
JUDGED = 2000  # largest number of held-out samples
TIED = 2.0  # standard errors of the paired difference within which two plans count as equal
CONTEST_EPOCH = 2 * 10**6  # number of the first epoch of batches, beyond those of training and of scores
RUNG_EPOCHS = 10**4  # numbers between the first epochs of two rungs


@dataclass(frozen=True)
class Entry:
    """A plan of the contest."""

    name: str
    plan: Plan
    divergence: float  # as measured before training; nan where it was not


def keeps_all(plan: Plan) -> bool:
    """Whether a plan keeps every unit of every site."""
    return all(all(units) for units in plan.kept.values())


@dataclass(frozen=True, eq=False)
class Outcome:
    """A plan after its short training."""

    losses: Floats  # of each held-out sample, [n]; infinite where training diverged
    metric: float  # of the task on the same samples
    seconds: float
    steps: int = 0  # of its training

    @property
    def loss(self) -> float:
        """The mean held-out loss."""
        return float(self.losses.mean())


@dataclass(frozen=True, eq=False)
class Verdict:
    """The end of a contest."""

    kept: int  # place of the plan that is kept
    tied: tuple[int, ...]  # places of the plans of the last rung that the samples do not tell from the best
    outcomes: tuple[Outcome, ...]  # of every plan, after its last training
    state: Mapping[str, Tensor]  # of the kept plan's network, as the contest has trained it, on the CPU


def contest_steps(config: Config, data: Data) -> int:
    """The optimiser steps of the first rung: half of the contest's share of all steps.

    The second rung has twice as many steps for half of the plans, so that both together take the share of each plan.
    """
    return max(FEWEST_STEPS, round(config.decide.contest_share / 2 * config.train.epochs * len(data.train)))


def hold_contest(
    net: CompressedModel,
    entries: Sequence[Entry],
    model: nn.Module,
    data: Data,
    config: Config,
    refit: bool = False,
    scale: float = 1.0,
) -> Verdict:
    """Train the plans in two rungs, judge them, and say which one is kept.

    Args:
        net: attached, with the weights that every plan begins with; it is not changed.
        entries: at least one.
        model: float, the teacher of distillation.
        data: trained on and judged by; its test split is not read.
        config: rates and steps.
        refit: fit the ranges of inputs anew first, where a search has changed what layers read.
        scale: factor of the task's loss in training, as in the run.

    Raises JpqError where every plan's training diverged.
    """
    steps = contest_steps(config, data)
    contestants = [Contestant(net, entry, model, data, config, refit, scale) for entry in entries]
    for contestant in contestants:
        contestant.train(steps)
    outcomes = [contestant.judge() for contestant in contestants]
    last = survivors(entries, outcomes)
    if len(last) > 1:
        for place in last:
            contestants[place].train(SECOND_RUNG * steps)
            outcomes[place] = contestants[place].judge()
    kept, tied = pick_entry(entries, outcomes, last)
    state = {name: tensor.detach().cpu().clone() for name, tensor in contestants[kept].net.state_dict().items()}
    return Verdict(kept, tied, tuple(outcomes), state)


def survivors(entries: Sequence[Entry], outcomes: Sequence[Outcome]) -> list[int]:
    """The places of the plans that train on: the better half, rounded up, and the best of a kind that it lacks."""
    order = sorted(range(len(entries)), key=lambda i: outcomes[i].loss)  # of equal ones the first stays first
    half = order[: math.ceil(len(order) / 2)]
    kinds = {keeps_all(entries[i].plan) for i in half}
    others = [i for i in order if keeps_all(entries[i].plan) not in kinds and math.isfinite(outcomes[i].loss)]
    return half + others[:1]


def pick_entry(
    entries: Sequence[Entry], outcomes: Sequence[Outcome], last: Sequence[int] | None = None
) -> tuple[int, tuple[int, ...]]:
    """(place of the plan that is kept, places of those that the samples do not tell from the best).

    Args:
        entries, outcomes: of every plan.
        last: places of the plans of the last rung; default: all.

    Raises JpqError where every plan's training diverged.
    """
    places = sorted(range(len(entries)) if last is None else last)
    best = min(places, key=lambda i: outcomes[i].loss)
    if not math.isfinite(outcomes[best].loss):
        raise JpqError("No plan of the contest could be trained: the loss is no longer a number. Lower --lr.")
    tied = [i for i in places if _is_tied(outcomes[i].losses, outcomes[best].losses)]
    kept = min(tied, key=lambda i: (not keeps_all(entries[i].plan), _known(entries[i].divergence)))
    return kept, tuple(tied)


def _known(divergence: float) -> float:
    """The divergence, or infinity where it was not measured."""
    return divergence if math.isfinite(divergence) else math.inf


def _is_tied(losses: Floats, best: Floats) -> bool:
    """Whether a loss exceeds the best one by no more than `TIED` standard errors of the paired difference."""
    if not np.isfinite(losses).all():
        return False
    difference = losses - best
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return float(difference.mean()) <= TIED * error


class Contestant:
    """A copy of the network under one plan, which trains for a while, is judged, and may train on."""

    def __init__(
        self,
        net: CompressedModel,
        entry: Entry,
        model: nn.Module,
        data: Data,
        config: Config,
        refit: bool = False,
        scale: float = 1.0,
    ) -> None:
        self.entry, self.data, self.config = entry, data, config
        t = config.train
        self.objective = Objective(model, t.distill, t.temperature, scale=scale, task=data.task, precision=t.precision)
        self.steps, self.rungs, self.finite, self.seconds = 0, 0, True, 0.0
        with self._alone():
            self.net = copy.deepcopy(net)
            if refit:
                recalibrate(self.net, calibration_batches(data))
            self.net.freeze(entry.plan)
            round_activation_steps(self.net)

    def train(self, steps: int) -> None:
        """Train for so many steps, on a learning-rate curve of their own that falls to 0, and on batches of their own.

        The same numbers of steps give every contestant the same batches. Nothing is done once the loss has diverged.
        """
        with self._alone():
            self.finite = self.finite and self._train(steps)
        self.steps, self.rungs = self.steps + steps, self.rungs + 1

    def judge(self) -> Outcome:
        """The losses of held-out samples, after BatchNorm's statistics are measured anew on training batches."""
        held_out = self.data.held_out.first(JUDGED)
        if not self.finite:
            return Outcome(np.full(held_out.size, np.inf), math.nan, self.seconds, self.steps)
        with self._alone():
            reestimate_batchnorm(self.net, islice(self.data.train.epoch(CONTEST_EPOCH), NORM_BATCHES))
            losses = sample_losses(self.net, held_out, self.data.task)
            metric = self.data.task.evaluate(self.net, held_out)
        return Outcome(losses, metric, self.seconds, self.steps)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A context with random numbers of its own, whose seconds are counted."""
        began = time.perf_counter()
        with torch.random.fork_rng():
            torch.manual_seed(self.config.run.seed + self.rungs)
            yield
        self.seconds += time.perf_counter() - began

    def _train(self, steps: int) -> bool:
        """Whether the loss stays finite in so many steps."""
        t = self.config.train
        optim = build_optimizer(self.net, t.lr, t.weight_decay)
        phase = Phase("contest", 1)
        start_training(self.net)
        for i, (x, y) in enumerate(islice(_endless(self.data, self.rungs), steps)):
            for group in optim.param_groups:
                group["lr"] = group["peak"] * phase.rate(i / steps)
            loss = self.objective(self.net, x, y, 1.0)
            if not torch.isfinite(loss):
                return False
            optim.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(optim.param_groups[0]["params"], MAX_GRADIENT_NORM)
            optim.step()
            self.net.after_step(1.0)
        return True


def _endless(data: Data, rung: int) -> Iterator[tuple[Tensor, Any]]:
    """Training batches, epoch after epoch, others in each rung."""
    for epoch in count(CONTEST_EPOCH + rung * RUNG_EPOCHS):
        yield from data.train.epoch(epoch)


@torch.no_grad()
def sample_losses(net: nn.Module, batches: Any, task: Task) -> Floats:
    """The task's loss of each sample, [n]; of each batch, repeated, where its targets are no tensor."""
    losses: list[float] = []
    with eval_mode(net):
        for x, y in batches:
            output = task.main_output(call_model(net, x))
            if isinstance(y, Tensor) and isinstance(output, Tensor):
                losses += [float(task.loss(output[i : i + 1], y[i : i + 1])) for i in range(len(y))]
            else:
                losses += [float(task.loss(output, y))] * batch_size(x)
    values = np.array(losses, np.float64)
    return np.where(np.isfinite(values), values, np.inf)
