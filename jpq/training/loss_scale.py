"""The factor that brings a small training loss to about 1, as the budget and distillation beside it are made for."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from jpq.tasks import BUILT_IN
from jpq.tasks.data import Data
from jpq.tasks.regression import Regression
from jpq.tracing.forward import call_model, eval_mode
from jpq.training.run_state import RunState

SMALLEST = 0.1  # loss of a model that knows nothing, below which losses are multiplied


@torch.no_grad()
def choose_loss_scale(model: nn.Module, data: Data) -> float:
    """The factor of the task's loss in this run: 1, or more where even a model that knows nothing has a small loss.

    That loss is measured on one training batch, with the float model's outputs handed on from each sample to the next:
    such outputs are as likely as the model's own, and say nothing of their sample. Losses that are large need no
    factor, since the budget's weight grows until its target is met. Nor do jpq's own losses of classes and images,
    whose size is known; that of regression has the unit of the targets.

    Args:
        model: float, trained.
        data: of its training batches the first of epoch 0 is read.
    """
    task = data.task
    if type(task) in BUILT_IN.values() and not isinstance(task, Regression):
        return 1.0
    x, y = next(iter(data.train.epoch(0)))
    with eval_mode(model):
        output = task.main_output(call_model(model, x))
    if not isinstance(output, Tensor) or len(output) < 2:
        return 1.0  # training refuses outputs of another kind; a single sample has no other to exchange with
    known_nothing = float(task.loss(output.roll(1, 0), y))
    if not math.isfinite(known_nothing) or not 0 < known_nothing < SMALLEST:
        return 1.0
    return 1 / known_nothing


def loss_scale_note(scale: float, name: str) -> str:
    """A sentence on a factor; "" for 1."""
    if scale == 1:
        return ""
    return (
        f"The loss of task '{name}' is {1 / scale:.2g} where outputs know nothing of their samples: it is multiplied "
        f"by {scale:.3g}, since budget and distillation are weighed against losses of about 1."
    )


def scale_loss(model: nn.Module, data: Data, run: RunState) -> None:
    """Choose the factor of a run's loss, and note it."""
    run.loss_scale = choose_loss_scale(model, data)
    if sentence := loss_scale_note(run.loss_scale, data.task.name):
        run.notes.append(sentence)
