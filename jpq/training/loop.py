"""fit(): the one loop. Float training, search and fine-tuning differ in what they hand to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jpq import costs
from jpq.compression.model import CompressedModel, Trainable
from jpq.costs.target import Controller
from jpq.methods.quantizers import IntegerQuantizer
from jpq.tasks.classification import evaluate
from jpq.tasks.data import Batches, Data
from jpq.training import distributed
from jpq.training.distributed import Split
from jpq.training.epochs import Phase
from jpq.training.history import EpochRecord, NullObserver, TrainingObserver
from jpq.training.nonfinite import diverged, not_finite, require_finite
from jpq.training.signals import Interruption
from jpq.types import JpqError

CLIP = 5.0  # largest norm of the weights' gradient

_NONE = (math.nan, math.nan)


@dataclass
class Objective:
    """What is minimised: task loss, distillation, the gates' regulariser and the budget's pressure."""

    teacher: nn.Module | None = None
    distill: float = 0.0
    temperature: float = 1.0
    gate_weight: float = 0.0
    controller: Controller | None = None  # None outside the search: decisions are fixed
    split: Split | None = None  # this process's rows, where several share a batch

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, progress: float, side: Trainable = "both") -> Tensor:
        """The loss of one batch; progress of the phase in [0, 1]. What the weights alone learn from has no budget."""
        if self.split is not None:
            x, y = self.split.take(x, y)
        logits = net(x)
        if not isinstance(logits, Tensor):
            raise JpqError(
                f"In training the model gives a {type(logits).__name__}, and jpq trains on one tensor of "
                "class scores. Build it without auxiliary outputs (aux_logits=False), or use jpq.compress "
                "in your own loop."
            )
        loss = F.cross_entropy(logits, y)
        if self.teacher is not None and self.distill > 0:
            with torch.no_grad():
                wanted = F.log_softmax(self.teacher(x) / self.temperature, 1)
            given = F.log_softmax(logits / self.temperature, 1)
            loss = loss + self.distill * self.temperature**2 * F.kl_div(
                given, wanted, log_target=True, reduction="batchmean"
            )
        if self.split is not None:
            loss = loss * self.split.weight
        if self.controller is not None and isinstance(net, CompressedModel) and side != "weights":
            loss = loss + pressure(net, self.controller, progress, self.gate_weight)
        return loss


def pressure(net: CompressedModel, controller: Controller, progress: float, gate_weight: float) -> Tensor:
    """What a search adds to the task's loss, a scalar: the budget, the gates' own loss and their regulariser."""
    loss = controller.loss(net.soft_usage(), progress) + net.own_loss()
    return loss + gate_weight * controller.multiplier() * net.penalty() if gate_weight else loss


@dataclass
class Recorder:
    """Turns epochs into rows: what the network costs now, and how long the run has taken."""

    clock: Callable[[], float]
    full_bops: float = math.nan
    cost: str = "bops"  # how they are counted, a name in COSTS
    rows: list[EpochRecord] = field(default_factory=list)

    def shares(self, objective: Objective) -> tuple[float, float]:
        """(BOPs now, BOPs aimed at) as shares of the fp32 model; nan outside a search for BOPs."""
        bops, aim = objective.controller.seen.get(self.cost, _NONE) if objective.controller else _NONE
        return bops / self.full_bops, aim / self.full_bops

    def row(
        self, phase: Phase, epoch: int, loss: float, accuracy: float, net: nn.Module, objective: Objective, lr: float
    ) -> EpochRecord:
        """The row of one finished epoch, kept in `rows`."""
        bops = aim = w_bits = a_bits = kept = pressure = math.nan
        if isinstance(net, CompressedModel):
            uses = net.exact_usage()
            bops = float(costs.COSTS[self.cost](uses))
            w_bits = sum(u.w_bits for u in uses) / len(uses)
            a_bits = sum(u.a_bits for u in uses) / len(uses)
            plan = net.plan()
            units = [k for mask in plan.kept.values() for k in mask]
            kept = sum(units) / len(units) if units else 1.0
            if plan.masks:
                kept = float(sum(u.weights * u.density for u in uses) / sum(u.weights for u in uses))
        if objective.controller is not None:
            goal = objective.controller.targets[0]
            aim = (
                objective.controller.ramped_limit(goal, epoch / phase.epochs) / self.full_bops
                if goal.cost == self.cost
                else math.nan
            )
            pressure = objective.controller.pressure[goal.cost]
        row = EpochRecord(
            phase.name,
            epoch,
            phase.epochs,
            loss,
            accuracy,
            bops,
            bops / self.full_bops,
            aim,
            pressure,
            w_bits,
            a_bits,
            kept,
            lr,
            self.clock(),
            phase.budget,
        )
        self.rows.append(row)
        return row


def optimizer(
    net: nn.Module, lr: float, weight_decay: float, gate_lr: float = 0.0, bit_lr: float = 0.0
) -> torch.optim.Optimizer:
    """AdamW over weights, and over decisions where their rates are above 0; each group remembers its peak rate."""
    if isinstance(net, CompressedModel):
        own = net.weights()
        groups = [(own["decayed"], lr, weight_decay), (own["plain"], lr, 0.0)]
        if gate_lr or bit_lr:
            decisions = net.decisions()
            groups += [(decisions["gates"], gate_lr, 0.0), (decisions["bits"], bit_lr, 0.0)]
    else:
        ranges = {id(m.log_threshold) for m in net.modules() if isinstance(m, IntegerQuantizer)}
        wide = {id(p) for p in net.parameters() if p.dim() > 1 and id(p) not in ranges}
        groups = [
            ([p for p in net.parameters() if id(p) in wide], lr, weight_decay),
            ([p for p in net.parameters() if id(p) not in wide], lr, 0.0),
        ]
    # decisions keep their rate: they must still move when the weights' rate has fallen
    tables: list[dict[str, Any]] = [
        {"params": ps, "lr": rate, "peak": rate, "weight_decay": decay, "curve": i < 2}
        for i, (ps, rate, decay) in enumerate(groups)
        if ps
    ]
    return torch.optim.AdamW(tables)


def fit(
    net: nn.Module,
    data: Data,
    phase: Phase,
    objective: Objective,
    optim: torch.optim.Optimizer,
    recorder: Recorder,
    watch: TrainingObserver | None = None,
    save: Callable[[Phase], None] = lambda phase: None,
    every: int = 0,
    stop: Interruption | None = None,
) -> None:
    """Train for one phase; after each epoch measure the held-out accuracy, record a row and `save`.

    Saves in the midst of an epoch too: after `every` steps (0: never), and where the run is asked to `stop`, or the
    watch ends it by a KeyboardInterrupt, which then passes through. A phase goes on where its `done` and `losses` say.

    In a search whose gates are `held_out` (bi-level), batches alternate: weights learn on the task alone from one half
    of the training samples, decisions on everything from the other (`Batches.halves`); an epoch is still one pass.

    Raises JpqError when the loss is no longer a number; what was saved last stays as it is.
    """
    watch, stop = watch or NullObserver(), stop or Interruption()
    bilevel = objective.controller is not None and isinstance(net, CompressedModel) and net.bilevel
    parts = data.train.halves() if bilevel else (data.train,)
    steps = len(parts) * min(len(part) for part in parts)
    if len(phase.losses) > steps:
        raise JpqError(f"The checkpoint is of {len(phase.losses)} steps in an epoch of {steps}. Run without --resume.")
    watch.phase(phase.title, phase.epochs, steps)
    try:
        for epoch in range(phase.done, phase.epochs):
            distributed.share_state(net)
            net.train()
            for i, (side, x, y) in enumerate(_turns(parts, phase.before + epoch)):
                if i < len(phase.losses):
                    continue  # an earlier part of this run did it
                with stop.whole():
                    phase.losses.append(_step(net, (x, y), phase, epoch + i / steps, objective, optim, side))
                watch.step(phase.losses[-1], *recorder.shares(objective))
                if every and len(phase.losses) % every == 0 and i + 1 < steps:
                    require_finite(net, x, phase.name, phase.done)
                    save(phase)
            require_finite(net, x, phase.name, phase.done)  # before it can replace a good checkpoint
            accuracy = evaluate(net, data.held_out)
            with stop.whole():
                mean = sum(phase.losses) / max(1, len(phase.losses))
                row = recorder.row(phase, epoch + 1, mean, accuracy, net, objective, optim.param_groups[0]["lr"])
                phase.done, phase.losses = epoch + 1, []
            watch.epoch(row)
            save(phase)
    except KeyboardInterrupt:
        if not stop.cut and not not_finite(net):
            save(phase)
        raise


def _step(
    net: nn.Module,
    batch: tuple[Tensor, Tensor],
    phase: Phase,
    at: float,
    objective: Objective,
    optim: torch.optim.Optimizer,
    side: Trainable,
) -> float:
    """One optimiser step at a fractional epoch of the phase; the loss before it."""
    if isinstance(net, CompressedModel):
        net.set_trainable(side)
    for group in optim.param_groups:
        group["lr"] = group["peak"] * (phase.rate(at) if group["curve"] else 1.0)
    loss = objective(net, *batch, at / phase.epochs, side)
    value = distributed.mean(loss)
    if not math.isfinite(value):
        raise JpqError(diverged(net, batch[0], phase.name, phase.done))
    optim.zero_grad()
    loss.backward()
    distributed.average_gradients(net)
    nn.utils.clip_grad_norm_(optim.param_groups[0]["params"], CLIP)
    optim.step()
    if isinstance(net, CompressedModel):
        net.after_step(at / phase.epochs if phase.anneals else 1.0)
    return value


def _turns(parts: Sequence[Batches], epoch: int) -> Iterator[tuple[Trainable, Tensor, Tensor]]:
    """The batches of one epoch, and what learns from each: everything, or from two halves weights and decisions."""
    sides: tuple[Trainable, ...] = ("both",) if len(parts) == 1 else ("weights", "decisions")
    for turn in zip(*(part.epoch(epoch) for part in parts), strict=False):  # halves may differ by one batch
        for side, (x, y) in zip(sides, turn, strict=True):
            yield side, x, y
