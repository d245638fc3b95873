"""Multi-label classification: binary cross entropy, mean average precision, and agreement label by label."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jpq.tasks.base import Pair, Task, check_targets


class MultiLabel(Task):
    """Any number of labels per sample: outputs are logits `[B, labels]`, targets 0 or 1 `[B, labels]`.

    The metric is the mean of the average precisions of those labels that occur in the split (torchmetrics).
    """

    name = "multi-label"
    metric_name = "mean AP"
    divergence_unit = "nats"
    metric_unit = "%"
    metric_bounds = (0.0, 1.0)
    output_name = "label scores"
    decision_name = "label"
    packages = ("torchmetrics",)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Binary cross entropy in nats, the mean over samples and labels."""
        return F.binary_cross_entropy_with_logits(output, target.to(output.dtype))

    def distill(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """T^2 times the KL divergence of each label's softened probability, summed over labels, in nats."""
        return temperature**2 * self.divergence(student / temperature, teacher / temperature)

    def divergence(self, output: Tensor, reference: Tensor) -> Tensor:
        """KL divergence of the labels' probabilities in nats, summed over labels, mean over samples."""
        reference = reference.detach()
        p = reference.sigmoid()
        present = p * (F.logsigmoid(reference) - F.logsigmoid(output))
        absent = (1 - p) * (F.logsigmoid(-reference) - F.logsigmoid(-output))
        return (present + absent).sum(1).mean()

    def summarize(self, pairs: Iterable[Pair]) -> float:
        """Mean average precision over the labels that occur."""
        from torchmetrics.functional.classification import multilabel_average_precision

        scores, target = _concatenate(pairs)
        target = target.long()
        with warnings.catch_warnings():  # labels that never occur give NaN with a warning
            warnings.simplefilter("ignore")
            every = multilabel_average_precision(scores.sigmoid(), target, scores.shape[1], average="none")
        return float(every[target.amax(0) > 0].mean())

    def other_metrics(self, pairs: Sequence[Pair]) -> dict[str, tuple[float, str]]:
        """F1 at a probability of one half, the mean over labels."""
        from torchmetrics.functional.classification import multilabel_f1_score

        scores, target = _concatenate(pairs)
        value = multilabel_f1_score(scores.sigmoid(), target.long(), scores.shape[1], average="macro")
        return {"F1": (float(value), "%")}

    def same_decision(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether both outputs give a label a probability above one half, boolean [B, labels]."""
        return (a > 0) == (b > 0)

    def decision_gap(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each score of `a` from one half, as a share of its largest output."""
        return a.abs() / a.abs().amax().clamp_min(1e-30)

    def fits(self, output: object, samples: int, classes: int | None) -> bool:
        """Whether the output is one tensor [samples, labels]."""
        if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != samples:
            return False
        return classes is None or output.shape[1] == classes

    def check_target(self, target: Any, classes: int) -> None:
        """Raise JpqError for targets that are not 0 or 1 per label."""
        fine = isinstance(target, Tensor) and target.dim() == 2 and target.shape[1] == classes
        fine = fine and bool(((target == 0) | (target == 1)).all())
        check_targets(fine, self, f"a row of {classes} zeros and ones per sample", target)

    def example_batch(self, samples: int, classes: int) -> tuple[Tensor, Tensor]:
        """Scores of the right sign, and labels of which each occurs."""
        target = (torch.arange(samples)[:, None] + torch.arange(classes)) % 2
        return 4.0 * (2.0 * target - 1), target


def _concatenate(pairs: Iterable[Pair]) -> tuple[Tensor, Tensor]:
    """(outputs, targets) of a whole split, [N, labels] each, on the CPU."""
    rows = [(output.float().cpu(), target.cpu()) for output, target in pairs]
    outputs, targets = zip(*rows, strict=True)
    return torch.cat(outputs), torch.cat(targets)
