"""Distillation in a user's own loop: the float model's output for the same inputs, and the tensors to compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jpq.tasks.base import Task
from jpq.tracing.forward import as_plain_nest, call_model, collect_tensors, eval_mode
from jpq.types import JpqError

LOGITS = "logits"  # key of the scores in a ModelOutput of Hugging Face


def distill(
    teacher: nn.Module,
    output: Any,
    inputs: Any,
    temperature: float,
    task: Task,
    pick: Callable[[Any], Tensor] | None = None,
) -> Tensor:
    """Distance of an output from the teacher's output for the same inputs, a scalar: see `CompressionSession.distill`.

    The teacher runs in evaluation mode and without gradients. Raises JpqError where it is not clear which tensors to
    compare, where their shapes differ, and for a temperature that is not positive.
    """
    if not temperature > 0:
        raise JpqError(f"distill needs a temperature above 0; got {temperature}.")
    with torch.no_grad(), eval_mode(teacher):
        target = result_tensor(call_model(teacher, inputs), pick)
    student = result_tensor(output, pick)
    if student.shape != target.shape:
        raise JpqError(
            f"distill compares {list(student.shape)} with the float model's {list(target.shape)}: give the inputs that "
            "the output was computed from."
        )
    return task.distill(student, target, temperature)


def result_tensor(output: Any, pick: Callable[[Any], Tensor] | None = None) -> Tensor:
    """The tensor of an output that a loss compares: `pick`'s, the `logits`, or the only one.

    Raises JpqError where an output has none, or several.
    """
    if isinstance(output, Tensor):
        return output
    if pick is not None:
        chosen = pick(output)
        if not isinstance(chosen, Tensor):
            raise JpqError(f"pick gave a {type(chosen).__name__}; it must give one tensor of the output.")
        return chosen
    nest = as_plain_nest(output)
    if isinstance(nest, Mapping) and isinstance(nest.get(LOGITS), Tensor):
        logits: Tensor = nest[LOGITS]
        return logits
    tensors = collect_tensors(nest)
    if len(tensors) != 1:
        raise JpqError(
            f"The model gives {len(tensors)} tensors: say which of them to compare, such as pick=lambda out: out[0]."
        )
    return tensors[0]
