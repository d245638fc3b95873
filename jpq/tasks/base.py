"""The contract of a task: training loss, metric, distillation loss, and agreement of two outputs.

The training loop, allocators, verification, fronts, studies, plots and tables ask the task; the data carry it
(`jpq.tasks.data.Data.task`). Saved files name tasks by their `name` and keep the key "accuracy" for every metric.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from jpq.tracing.forward import eval_mode

SAME_RANGE = 0.1  # share of the batch's largest output within which two outputs without classes agree


class Task(ABC):
    """A task of a network: its loss, its metric, and the form of its outputs.

    Outputs and targets have one sample per index of dim 0, B samples in a batch. Larger metrics are better: a task
    that is judged by an error reports its negative.
    """

    name: ClassVar[str]  # key in TASKS, kept in result.json
    metric_name: ClassVar[str]  # on the screen and on plots, such as "accuracy"
    metric_unit: ClassVar[str] = ""  # "%": the metric is a share in [0, 1] and shown in percent; else behind the number
    metric_bounds: ClassVar[tuple[float, float]] = (-math.inf, math.inf)  # of a metric read from a file
    output_name: ClassVar[str] = "outputs"  # contents of the network's output tensor
    decision_name: ClassVar[str] = "output"  # unit of agreement: "the same class for 9 of 10 samples"

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Training loss, a scalar: the mean over the batch."""

    @abstractmethod
    def distill(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Distance of the output from the float model's output, a scalar: the mean over the batch.

        `temperature` softens both where the task has probabilities. `teacher` carries no gradient.
        """

    @abstractmethod
    def metric(self, output: Tensor, target: Tensor) -> Tensor:
        """Metric of each sample's output, `[B]`; the metric of a split is the mean over its samples."""

    @abstractmethod
    def chance(self, classes: int) -> float:
        """Metric of a model that knows nothing; `classes` is the number of outputs per sample."""

    def same_decision(self, a: Tensor, b: Tensor) -> Tensor:
        """Agreement of two models' outputs, a boolean per decision: by default one per sample, within a tenth."""
        return sample_difference(a, b) <= SAME_RANGE

    def decision_gap(self, a: Tensor, b: Tensor) -> Tensor:
        """Margin of each decision of `a` against a change by `b`, as a share of the output range."""
        return sample_difference(a, b)

    def fits(self, output: object, samples: int, classes: int | None) -> bool:
        """Whether a network's answer to a batch has the right form; `classes` is None where the number is unknown."""
        return isinstance(output, Tensor) and output.dim() > 0 and len(output) == samples

    def example_batch(self, samples: int, classes: int) -> tuple[Tensor, Tensor]:
        """Outputs that are right for their samples, and the targets, on which `jpq.testing.check_task` tries the task.

        By default real numbers `[samples, classes]` that are their own targets; override it for targets of other kinds.
        """
        output = torch.randn(samples, classes, generator=torch.Generator().manual_seed(0))
        return output, output.clone()

    def row_text(self, classes: int) -> str:
        """Form of one sample's output, in words."""
        return f"{classes} {self.output_name}"

    def report(self, value: str, samples: str) -> str:
        """A sentence on a measured metric: `value` with its unit, `samples` such as "449 test images of digits"."""
        return f"{self.metric_name} {value} on {samples}"

    @torch.no_grad()
    def evaluate(self, net: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Metric of a network over a split, in evaluation mode; override it where it is no mean over samples."""
        total, samples = 0.0, 0
        with eval_mode(net) if isinstance(net, nn.Module) else nullcontext():
            for x, y in batches:
                values = self.metric(net(x), y)
                total, samples = total + float(values.sum()), samples + len(values)
        return total / samples


def sample_difference(a: Tensor, b: Tensor) -> Tensor:
    """Largest difference of each sample, [B], relative to the largest output of the batch `a`."""
    return (a - b).abs().reshape(len(a), -1).amax(1) / a.abs().amax().clamp_min(1e-30)
