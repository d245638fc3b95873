"""Image classification: cross entropy, accuracy, and agreement by the class with the largest score."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jpq.tasks.base import Task


class Classification(Task):
    """Task of one class per sample: outputs are logits `[B, classes]`, targets class numbers, int64 `[B]`."""

    name = "classification"
    metric_name = "accuracy"
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


def _has_classes(output: Tensor) -> bool:
    return output.dim() >= 2 and output.shape[1] >= 2
