"""Classification: cross entropy, accuracy, and agreement by the class with the largest score.

`Classification` is of images; `TextClassification` and `SequenceClassification` differ in their inputs alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jpq.tasks.base import Task, check_classes, check_targets


class Classification(Task):
    """Task of one class per sample: outputs are logits `[B, classes]`, targets class numbers, int64 `[B]`."""

    name = "classification"
    metric_name = "accuracy"
    divergence_unit = "nats"
    metric_unit = "%"
    metric_bounds = (0.0, 1.0)
    output_name = "class scores"
    decision_name = "class"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross entropy, in nats."""
        return F.cross_entropy(output, target)

    def distill(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """T^2 KL(softmax(teacher / T) || softmax(student / T)), in nats (Hinton et al. 2015, arXiv:1503.02531)."""
        log_q, log_p = (F.log_softmax(logits / temperature, 1) for logits in (student, teacher.detach()))
        return temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    def divergence(self, output: Tensor, reference: Tensor) -> Tensor:
        """KL(softmax(reference) || softmax(output)) in nats, the mean over samples, or over places of [B, C, H, W].

        Outputs without classes (one column, or one dim) count by their squared error, as in `Task.divergence`.
        """
        if not _has_classes(reference):
            return super().divergence(output, reference)
        if output.dim() == 2:  # few numbers: float32 would leave an error of 1e-8, the size of a divergence at 8 bits
            output, reference = output.double(), reference.double()
        log_q, log_p = F.log_softmax(output, 1), F.log_softmax(reference.detach(), 1)
        return (log_p.exp() * (log_p - log_q)).sum(1).mean()

    def metric(self, output: Tensor, target: Tensor) -> Tensor:
        """Whether the largest score is that of the right class, boolean [B]."""
        return output.argmax(1) == target

    def chance(self, classes: int) -> float:
        """Accuracy of guessing among equally frequent classes."""
        return 1 / max(1, classes)

    def same_decision(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether both outputs name the same class along dim 1: [B] for [B, classes], [B, H, W] for [B, classes, H, W].

        Outputs without classes (one column, or one dim) agree within a tenth of the range.
        """
        return a.argmax(1) == b.argmax(1) if _has_classes(a) else super().same_decision(a, b)

    def decision_gap(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance between the two largest scores of `a`, as a share of its largest output."""
        if not _has_classes(a):
            return super().decision_gap(a, b)
        top = a.topk(2, 1).values
        return (top.select(1, 0) - top.select(1, 1)) / a.abs().amax().clamp_min(1e-30)

    def fits(self, output: object, samples: int, classes: int | None) -> bool:
        """Whether the output is one tensor [samples, classes]."""
        if not isinstance(output, Tensor) or output.dim() != 2:
            return False
        return classes is None or list(output.shape) == [samples, classes]

    def check_target(self, target: Any, classes: int) -> None:
        """Raise JpqError for targets that are not class numbers [B] from 0 to classes - 1."""
        fine = isinstance(target, Tensor) and target.dim() == 1 and not target.is_floating_point()
        check_targets(fine, self, "class numbers, an integer per sample", target)
        check_classes(self, target, classes)

    def example_batch(self, samples: int, classes: int) -> tuple[Tensor, Tensor]:
        """Scores whose largest is that of the target, and the classes in turn as targets."""
        target = torch.arange(samples) % classes
        return 4.0 * F.one_hot(target, classes), target

    def row_text(self, classes: int) -> str:
        """Form of one sample's output, in words."""
        return f"a row of {classes} classes"

    def report(self, value: str, samples: str) -> str:
        """Accuracy as a sentence."""
        return f"{value} of {samples} are right"


class TextClassification(Classification):
    """One class per text: inputs are token ids, int64 [B, T], alone or as "input_ids" beside an "attention_mask"."""

    name = "text-classification"
    sample_name = "text"


class SequenceClassification(Classification):
    """One class per time series: inputs are float [B, channels, steps] or [B, steps, channels], as models read them."""

    name = "sequence-classification"
    sample_name = "sequence"


def _has_classes(output: Tensor) -> bool:
    return output.dim() >= 2 and output.shape[1] >= 2
