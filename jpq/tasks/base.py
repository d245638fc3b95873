"""The contract of a task: training loss, metric, distillation loss, divergence, and agreement of two outputs.

The training loop, allocators, verification, fronts, studies, plots and tables ask the task; the data carry it
(`jpq.tasks.data.Data.task`). Saved files name tasks by their `name` and keep the key "accuracy" for every metric: it
holds the task's score, which is the metric, or its negative where a lower metric is better.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from jpq.tracing.forward import call_model, eval_mode
from jpq.types import JpqError, plural

SAME_RANGE = 0.1  # share of the batch's largest output within which two outputs without classes agree

MAIN_OUTPUTS = ("logits", "out")  # keys of the scores in outputs of transformers and of torchvision's segmentation

Pair = tuple[Any, Any]  # (outputs, targets) of a batch, or (inputs, targets)


class Task(ABC):
    """A task of a network: its loss, its metric, and the form of its outputs.

    Outputs and targets have one sample per index of dim 0, B samples in a batch. A metric is the mean of `metric`
    over the samples of a split; where it is no such mean, override `summarize` in its place.
    """

    name: ClassVar[str]  # key in TASKS, kept in result.json
    metric_name: ClassVar[str]  # on the screen and on plots, such as "accuracy"
    metric_unit: ClassVar[str] = ""  # "%": the metric is a share in [0, 1] and shown in percent; else behind the number
    metric_bounds: ClassVar[tuple[float, float]] = (-math.inf, math.inf)  # smallest and largest value
    higher_is_better: ClassVar[bool] = True  # direction of the metric
    output_name: ClassVar[str] = "outputs"  # contents of the network's output tensor
    decision_name: ClassVar[str] = "output"  # unit of agreement: "the same class for 9 of 10 samples"
    sample_name: ClassVar[str] = "image"  # one sample, in words, where neither the data nor the own task name it
    divergence_unit: ClassVar[str] = "shares of the outputs' variance"  # of `divergence`, on pictures
    tolerance: ClassVar[float] = SAME_RANGE  # difference up to which outputs without classes agree (`same_decision`)
    any_size: ClassVar[bool] = False  # whether outputs have the size of their images, which may differ within a split
    packages: ClassVar[tuple[str, ...]] = ()  # Python packages that the metric needs, of the extra "metrics"

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Training loss, a scalar: the mean over the batch."""

    def distill(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Distance of the output from the float model's output, a scalar: the mean over the batch.

        `temperature` softens both where the task has probabilities. `teacher` carries no gradient. By default the
        divergence, whatever the temperature.
        """
        return self.divergence(student, teacher)

    def divergence(self, output: Tensor, reference: Tensor) -> Tensor:
        """Distance of an output from the float model's, a scalar of at least 0: what a sensitivity table adds up.

        By default the squared error over the variance of the reference, both over the whole batch: 0 for equal outputs,
        1 for an output that is the reference's mean everywhere.
        """
        error = (output - reference.detach()).square().mean()
        return error / reference.detach().var(unbiased=False).clamp_min(1e-30)

    def metric(self, output: Tensor, target: Tensor) -> Tensor:
        """Metric of each sample's output, `[B]`; the metric of a split is the mean over its samples."""
        raise JpqError(
            f"Task '{self.name}' has no metric: give its class metric(output, target), a number per sample, or "
            "summarize(pairs)."
        )

    def summarize(self, pairs: Iterable[Pair]) -> float:
        """Metric of a split from the (outputs, targets) of its batches, which are read once and in order.

        By default the mean of `metric` over the samples; override it where the metric is none.
        """
        total, samples = 0.0, 0
        for output, target in pairs:
            values = self.metric(output, target)
            total, samples = total + float(values.sum()), samples + len(values)
        return total / samples

    def other_metrics(self, pairs: Sequence[Pair]) -> dict[str, tuple[float, str]]:
        """Further metrics that a report shows beside the first, from all batches of a split: name -> (value, unit)."""
        return {}

    def chance(self, classes: int) -> float:
        """Metric of a model that knows nothing; `classes` is the number of outputs per sample. By default 0.

        The default says nothing of a metric that is better where it is lower, or that may be below 0.
        """
        return 0.0

    def same_decision(self, a: Tensor, b: Tensor) -> Tensor:
        """Agreement of two models' outputs, a boolean per decision.

        By default one per sample: they agree where no number differs by more than `tolerance` times the largest
        output of the batch.
        """
        return sample_difference(a, b) <= self.tolerance

    def decision_gap(self, a: Tensor, b: Tensor) -> Tensor:
        """Margin of each decision of `a` against a change by `b`, as a share of the output range."""
        return sample_difference(a, b)

    def main_output(self, output: Any) -> Any:
        """The tensor that loss and metric read, out of what a model returns.

        Of a dict, or a transformers' ModelOutput, the entry "logits" or "out"; anything else as it is.
        """
        if isinstance(output, Mapping):
            return next((output[key] for key in MAIN_OUTPUTS if isinstance(output.get(key), Tensor)), output)
        return output

    def output_loss(self, output: Any, target: Any) -> Tensor:
        """The training loss of what a model returns, of which `main_output` takes the scores."""
        return self.loss(self.main_output(output), target)

    def count_outputs(self, output: Tensor) -> int:
        """The number that data call classes, of an output: by default the size of dim 1."""
        return output.shape[1] if output.dim() > 1 else 1

    def fits(self, output: object, samples: int, classes: int | None) -> bool:
        """Whether a network's answer to a batch has the right form; `classes` is None where the number is unknown."""
        return isinstance(output, Tensor) and output.dim() > 0 and len(output) == samples

    def check_target(self, target: Any, classes: int) -> None:
        """Raise JpqError where the targets of a batch are not of this task, and say what they should be."""
        check_targets(isinstance(target, Tensor) and target.dim() > 0, self, "one tensor with a row per sample", target)

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

    def score(self, metric: float) -> float:
        """The metric as a number that is larger for better models, and such a score as the metric: a change of sign."""
        return metric if self.higher_is_better else 0.0 - metric  # 0, not -0, of 0

    @property
    def sample_names(self) -> str:
        """Several samples, in words."""
        return plural(self.sample_name)

    @property
    def score_bounds(self) -> tuple[float, float]:
        """Smallest and largest score."""
        low, high = sorted(self.score(bound) for bound in self.metric_bounds)
        return low, high

    @property
    def knows_chance(self) -> bool:
        """Whether `chance` is given, or its 0 is that of a metric that is larger for all models that know something."""
        return type(self).chance is not Task.chance or (self.higher_is_better and self.metric_bounds[0] >= 0)

    @property
    def is_mean_over_samples(self) -> bool:
        """Whether the metric of a split is the mean of its samples' metrics, as intervals of it suppose."""
        return type(self).summarize is Task.summarize and type(self).evaluate is Task.evaluate

    @torch.no_grad()
    def evaluate(self, net: Callable[..., Any], batches: Iterable[Pair]) -> float:
        """Score of a network over a split, in evaluation mode: its metric, or the negative where lower is better.

        Raises JpqError where the split is empty, and where the metric is not a number.
        """
        with _in_eval_mode(net):
            counted = _CountedPairs((self.main_output(call_model(net, x)), y) for x, y in batches)
            return self.score(self._summarize_checked(counted))

    @torch.no_grad()
    def evaluate_all(
        self, net: Callable[..., Any], batches: Iterable[Pair]
    ) -> tuple[float, dict[str, tuple[float, str]]]:
        """(score as `evaluate` gives it, other metrics) of a network over a split; all outputs are held in memory."""
        with _in_eval_mode(net):
            pairs = [(self.main_output(call_model(net, x)), y) for x, y in batches]
        return self.score(self._summarize_checked(_CountedPairs(pairs))), self.other_metrics(pairs)

    def _summarize_checked(self, pairs: _CountedPairs) -> float:
        """The metric of some batches. Raises JpqError for none of them, and where it is not a number."""
        self.check_packages()
        first = next(pairs, None)
        if first is None:
            raise JpqError(f"A split without a single batch has no {self.metric_name}; give data with samples in it.")
        value = float(self.summarize(_before(first, pairs)))
        if math.isnan(value):
            batches = f"{pairs.batches} batch{'es' * (pairs.batches != 1)}"
            raise JpqError(
                f"The {self.metric_name} of {batches} is not a number; look for NaN in the model's outputs and in the "
                f"targets, and for a split in which {self.metric_name} is not defined."
            )
        return value

    def check_packages(self) -> None:
        """Raise JpqError where a package that the metric needs is not installed."""
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise JpqError(
                f"The {self.metric_name} of task '{self.name}' needs a package that is missing ({', '.join(missing)}): "
                'pip install "jpq[metrics]".'
            )


class _CountedPairs(Iterator[Pair]):
    """(outputs, targets) of batches, with the number of those that were read."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self.batches = 0
        self._pairs = iter(pairs)

    def __next__(self) -> Pair:
        pair = next(self._pairs)
        self.batches += 1
        return pair


def _before(first: Pair, rest: Iterable[Pair]) -> Iterator[Pair]:
    """The first batch, and then the others."""
    yield first
    yield from rest


@contextmanager
def _in_eval_mode(net: Callable[..., Any]) -> Iterator[None]:
    """A context in which a module is in evaluation mode; other callables are left alone."""
    with eval_mode(net) if isinstance(net, nn.Module) else nullcontext():
        yield


def sample_difference(a: Tensor, b: Tensor) -> Tensor:
    """Largest difference of each sample, [B], relative to the largest finite output of the batch `a`.

    Equal infinities, and NaN in both, are no difference; NaN in one of them alone is an infinite one.
    """
    equal = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(equal, 0.0, (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    largest = torch.where(a.isfinite(), a.abs(), 0.0).amax()
    return apart.reshape(len(a), -1).amax(1) / largest.clamp_min(1e-30)


def check_targets(fine: bool, task: Task, form: str, target: Any) -> None:
    """Raise JpqError where targets do not have the form that a task reads, given in words."""
    if not fine:
        found = f"{target.dtype} {list(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        raise JpqError(
            f"Task '{task.name}' reads {form}, and the targets of a batch are {found}; give other data, or another "
            "--task."
        )


def check_classes(task: Task, target: Tensor, classes: int, void: int | None = None) -> None:
    """Raise JpqError where class numbers lie outside of 0 to classes - 1; `void` marks what has no class."""
    known = target if void is None else target[target != void]
    smallest, largest = (int(known.min()), int(known.max())) if known.numel() else (0, 0)
    if smallest < 0 or largest >= classes:
        number = smallest if smallest < 0 else largest
        but = "" if void is None else f", and {void} where there is none"
        raise JpqError(
            f"A target of task '{task.name}' is {number}, and its {classes} classes are numbered from 0 to "
            f"{classes - 1}{but}; correct the labels."
        )
