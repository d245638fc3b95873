"""The training loop: `fit` trains for one phase of float training, search or fine-tuning; they differ in its arguments.

`Objective` is the loss, `build_optimizer` the parameter groups, `Recorder` turns epochs into rows of history.csv.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jpq import costs
from jpq.compression.batchnorm import start_training
from jpq.compression.model import CompressedModel, Trainable
from jpq.config import BFLOAT16, FLOAT32
from jpq.costs.target import Controller
from jpq.methods.quantizers import IntegerQuantizer
from jpq.tasks import CLASSIFICATION
from jpq.tasks.base import Task
from jpq.tasks.batches import SplitBatches
from jpq.tasks.data import Data
from jpq.tracing.forward import call_model
from jpq.tracing.missing_gradients import name_missing_gradient
from jpq.training import distributed
from jpq.training.distributed import Split
from jpq.training.epochs import Phase
from jpq.training.history import EpochRecord, NullObserver, TrainingObserver
from jpq.training.nonfinite import check_finite, divergence_error, nonfinite_names
from jpq.training.signals import Interruption
from jpq.types import JpqError

MAX_GRADIENT_NORM = 5.0  # norm to which the weights' gradient is clipped


def fit(
    net: nn.Module,
    data: Data,
    phase: Phase,
    objective: Objective,
    optim: torch.optim.Optimizer,
    recorder: Recorder,
    observer: TrainingObserver | None = None,
    save: Callable[[Phase], None] = lambda phase: None,
    save_every: int = 0,
    stop: Interruption | None = None,
    begin_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train for one phase; after each epoch measure the held-out metric, record a row and `save`.

    `begin_epoch` is told the number of each epoch, from 0, before its first step.

    Saves within an epoch too: after `save_every` steps (0: never), and where the run is asked to `stop`, or the
    observer ends it by a KeyboardInterrupt, which then passes through. A phase goes on at its `done` and `losses`.

    In a search with bi-level gates, batches alternate: weights learn on the task alone from one half
    of the training samples, decisions on everything from the other (`Batches.halves`); an epoch is still one pass.

    Raises JpqError when the loss is no longer a number; the last checkpoint stays as it is.
    """
    observer, stop = observer or NullObserver(), stop or Interruption()
    objective.task = data.task
    parts = data.train.halves() if _is_bilevel(net, objective) else (data.train,)
    steps = len(parts) * min(len(part) for part in parts)
    if len(phase.losses) > steps:
        raise JpqError(f"The checkpoint is of {len(phase.losses)} steps in an epoch of {steps}. Run without --resume.")
    observer.begin(data.task)
    observer.phase(phase.title, phase.epochs, steps)

    def save_within_epoch(x: Tensor) -> None:
        done = len(phase.losses)
        if save_every and done % save_every == 0 and done < steps:
            check_finite(net, x, phase.name, phase.done)
            save(phase)

    try:
        for epoch in range(phase.done, phase.epochs):
            if not phase.losses:
                begin_epoch(epoch)
            distributed.share_state(net)
            start_training(net)
            for i, (side, x, y) in enumerate(_batches_with_sides(parts, phase.before + epoch)):
                if i < len(phase.losses):
                    continue  # an earlier part of this run did it
                with stop.uninterrupted():
                    phase.losses.append(_step(net, (x, y), phase, epoch + i / steps, objective, optim, side))
                observer.step(phase.losses[-1], *recorder.bops_shares(objective))
                save_within_epoch(x)
            check_finite(net, x, phase.name, phase.done)  # before it can replace a good checkpoint
            metric = data.task.evaluate(net, data.held_out)
            with stop.uninterrupted():
                mean_loss = sum(phase.losses) / max(1, len(phase.losses))
                row = recorder.record(phase, epoch + 1, mean_loss, metric, net, objective, optim.param_groups[0]["lr"])
                phase.done, phase.losses = epoch + 1, []
            observer.epoch(row)
            save(phase)
    except KeyboardInterrupt:
        if not stop.cut and not nonfinite_names(net):
            save(phase)
        raise


def _is_bilevel(net: nn.Module, objective: Objective) -> bool:
    """Whether weights and decisions learn from different halves of the training samples."""
    return objective.controller is not None and isinstance(net, CompressedModel) and net.bilevel


def _batches_with_sides(parts: Sequence[SplitBatches], epoch: int) -> Iterator[tuple[Trainable, Any, Any]]:
    """The batches of one epoch with the parameters that learn from each: both, or weights and decisions in turn."""
    sides: tuple[Trainable, ...] = ("both",) if len(parts) == 1 else ("weights", "decisions")
    for pairs in zip(*(part.epoch(epoch) for part in parts), strict=False):  # halves may differ by one batch
        for side, (x, y) in zip(sides, pairs, strict=True):
            yield side, x, y


def _step(
    net: nn.Module,
    batch: tuple[Tensor, Tensor],
    phase: Phase,
    position: float,
    objective: Objective,
    optim: torch.optim.Optimizer,
    side: Trainable,
) -> float:
    """One optimizer step at a fractional epoch of the phase; the loss before it, averaged over processes."""
    if isinstance(net, CompressedModel):
        net.set_trainable(side)
    for group in optim.param_groups:
        group["lr"] = group["peak"] * (phase.rate(position) if group["curve"] else 1.0)
    loss = objective(net, *batch, position / phase.epochs, side)
    value = distributed.mean(loss)
    if not math.isfinite(value):
        raise JpqError(divergence_error(net, batch[0], phase.name, phase.done))
    optim.zero_grad()
    with name_missing_gradient():
        loss.backward()
    distributed.average_gradients(net)
    nn.utils.clip_grad_norm_(optim.param_groups[0]["params"], MAX_GRADIENT_NORM)
    optim.step()
    if isinstance(net, CompressedModel):
        net.after_step(position / phase.epochs if phase.anneals else 1.0)
    return value


@dataclass
class Objective:
    """The loss of a phase: task loss, distillation, the gates' regulariser and the budget's pressure."""

    teacher: nn.Module | None = None
    distill: float = 0.0  # weight of the distillation
    temperature: float = 1.0
    gate_weight: float = 0.0
    controller: Controller | None = None  # None outside the search: decisions are fixed
    split: Split | None = None  # this process's rows, where several share a batch
    scale: float = 1.0  # factor of the task's loss
    task: Task = CLASSIFICATION  # `fit` sets the task of its data
    precision: str = FLOAT32  # in which layers compute; the loss is float32

    def __call__(self, net: nn.Module, x: Any, y: Any, progress: float, side: Trainable = "both") -> Tensor:
        """The loss of one batch, a scalar; progress of the phase in [0, 1]. Weights alone learn without the budget."""
        if self.split is not None:
            x, y = self.split.take(x, y)
        with self._autocast(net):
            output = self.task.main_output(call_model(net, x))
        if not isinstance(output, Tensor):
            raise JpqError(
                f"In training the model gives a {type(output).__name__}, and jpq trains on one tensor of "
                f"{self.task.output_name}. Build it without auxiliary outputs (aux_logits=False), or use jpq.compress "
                "in your own loop."
            )
        output = _in_float32(output)
        loss = self.scale * self.task.loss(output, y)
        if self.teacher is not None and self.distill > 0:
            with torch.no_grad(), self._autocast(net):
                target = self.task.main_output(call_model(self.teacher, x))
            loss = loss + self.distill * self.task.distill(output, _in_float32(target), self.temperature)
        if self.split is not None:
            loss = loss * self.split.weight
        if self.controller is not None and isinstance(net, CompressedModel) and side != "weights":
            loss = loss + pressure(net, self.controller, progress, self.gate_weight)
        return loss

    def _autocast(self, net: nn.Module) -> AbstractContextManager[object]:
        """A context in which layers compute in this precision; float32 leaves all as it is, a caller's autocast too."""
        if self.precision != BFLOAT16:
            return nullcontext()
        return torch.autocast(next(net.parameters()).device.type, torch.bfloat16)


def _in_float32(output: Tensor) -> Tensor:
    """An output in float32, where it was computed in bfloat16."""
    return output.float() if output.dtype == torch.bfloat16 else output


def pressure(net: CompressedModel, controller: Controller, progress: float, gate_weight: float) -> Tensor:
    """The budget's loss, the gates' own loss, and their regulariser times the budget's multiplier: a scalar."""
    decisions = net.unit_decisions()
    uses = net.soft_usage(decisions)
    loss = controller.loss(uses, progress) + net.own_loss()
    if not gate_weight:
        return loss
    mean = gate_weight * controller.multiplier() * net.penalty()
    return loss + mean + gate_weight * net.priced_penalty(controller.weighted_cost(uses), decisions)


def build_optimizer(
    net: nn.Module, lr: float, weight_decay: float, gate_lr: float = 0.0, bit_lr: float = 0.0
) -> torch.optim.Optimizer:
    """AdamW over weights, and over decisions where their rates are above 0; each group remembers its peak rate.

    Weights of layers decay; biases, norms, quantizers' ranges and decisions do not.
    """
    if isinstance(net, CompressedModel):
        weights = net.weights()
        groups = [(weights["decayed"], lr, weight_decay), (weights["plain"], lr, 0.0)]
        if gate_lr or bit_lr:
            decisions = net.decisions()
            groups += [(decisions["gates"], gate_lr, 0.0), (decisions["bits"], bit_lr, 0.0)]
    else:
        ranges = {id(m.log_threshold) for m in net.modules() if isinstance(m, IntegerQuantizer)}
        decayed = {id(p) for p in net.parameters() if p.dim() > 1 and id(p) not in ranges}
        groups = [
            ([p for p in net.parameters() if id(p) in decayed], lr, weight_decay),
            ([p for p in net.parameters() if id(p) not in decayed], lr, 0.0),
        ]
    # decisions keep their rate: they must still move when the weights' rate has fallen
    tables: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay, "curve": i < 2}
        for i, (parameters, rate, decay) in enumerate(groups)
        if parameters
    ]
    return torch.optim.AdamW(tables)


@dataclass
class Recorder:
    """Rows of history.csv from finished epochs: cost of the network as it stands, and seconds since the run began."""

    clock: Callable[[], float]
    full_bops: float = math.nan  # of the fp32 model
    cost: str = "bops"  # name in COSTS by which bit-operations are counted
    rows: list[EpochRecord] = field(default_factory=list)

    def bops_shares(self, objective: Objective) -> tuple[float, float]:
        """(BOPs now, limit now) as shares of the fp32 model; nan outside a search for BOPs."""
        if objective.controller is None:
            return math.nan, math.nan
        bops, limit = objective.controller.last_costs.get(self.cost, (math.nan, math.nan))
        return bops / self.full_bops, limit / self.full_bops

    def record(
        self, phase: Phase, epoch: int, loss: float, metric: float, net: nn.Module, objective: Objective, lr: float
    ) -> EpochRecord:
        """The row of one finished epoch (`epoch` counts from 1), kept in `rows`."""
        bops = w_bits = a_bits = kept = math.nan
        if isinstance(net, CompressedModel):
            uses = net.exact_usage()
            bops = float(costs.COSTS[self.cost](uses))
            layers = uses[: len(net.network.layers)]  # products and tables, which stay at 32 bits, follow them
            w_bits = sum(u.w_bits for u in layers) / len(layers)
            a_bits = sum(u.a_bits for u in layers) / len(layers)
            kept = _kept_share(net, uses)
        limit, multiplier = self._target_state(objective.controller, epoch / phase.epochs)
        row = EpochRecord(
            phase=phase.name,
            epoch=epoch,
            epochs=phase.epochs,
            loss=loss,
            accuracy=metric,
            bops=bops,
            bops_share=bops / self.full_bops,
            aim_share=limit,
            pressure=multiplier,
            w_bits=w_bits,
            a_bits=a_bits,
            kept=kept,
            lr=lr,
            seconds=self.clock(),
            budget=phase.budget,
        )
        self.rows.append(row)
        return row

    def _target_state(self, controller: Controller | None, progress: float) -> tuple[float, float]:
        """(ramped limit as a share of the fp32 model's BOPs, multiplier) of the first target; nan where it has none."""
        if controller is None:
            return math.nan, math.nan
        target = controller.targets[0]
        limit = controller.ramped_limit(target, progress) / self.full_bops if target.cost == self.cost else math.nan
        return limit, controller.pressure[target.cost]


def _kept_share(net: CompressedModel, uses: Sequence[costs.LayerUse]) -> float:
    """Share of units kept; of weights, where masks lie inside layers."""
    plan = net.plan()
    if plan.masks:
        return float(sum(u.weights * u.density for u in uses) / sum(u.weights for u in uses))
    units = [keep for mask in plan.kept.values() for keep in mask]
    return sum(units) / len(units) if units else 1.0
