"""Semantic segmentation: cross entropy and mIoU over the pixels that have a class, and agreement pixel by pixel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jpq.tasks.base import Pair, check_classes, check_targets
from jpq.tasks.classification import Classification

VOID = 255  # class number of pixels without a class, as in Pascal VOC


class Segmentation(Classification):
    """One class per pixel: outputs are logits `[B, classes, H, W]`, targets class numbers, int64 `[B, H, W]`.

    The metric is the mean intersection over union of the classes that occur in targets or outputs (torchmetrics).

    Args:
        void: class number of pixels that have no class; they count neither in the loss nor in the metric.
    """

    name = "segmentation"
    metric_name = "mIoU"
    output_name = "class scores per pixel"
    decision_name = "class per pixel"
    packages = ("torchmetrics",)

    def __init__(self, void: int = VOID) -> None:
        self.void = void

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross entropy in nats, the mean over pixels that have a class; 0 where none has."""
        if output.shape[2:] != target.shape[1:]:
            check_targets(False, self, f"a map of {_size(output)} pixels per sample, as the outputs have", target)
        pixels = (target != self.void).sum().clamp_min(1)
        return F.cross_entropy(output, target.long(), ignore_index=self.void, reduction="sum") / pixels

    def distill(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """T^2 times the KL divergence of the softened classes, the mean over pixels, in nats."""
        return temperature**2 * self.divergence(student / temperature, teacher / temperature)

    def summarize(self, pairs: Iterable[Pair]) -> float:
        """Mean intersection over union of the classes that occur, over all pixels of the split."""
        from torchmetrics.classification import MulticlassJaccardIndex

        return self._over_pixels(pairs, lambda classes: MulticlassJaccardIndex(classes, ignore_index=self.void))

    def other_metrics(self, pairs: Sequence[Pair]) -> dict[str, tuple[float, str]]:
        """Share of the pixels whose class is right."""
        from torchmetrics.classification import MulticlassAccuracy

        value = self._over_pixels(
            pairs, lambda classes: MulticlassAccuracy(classes, average="micro", ignore_index=self.void)
        )
        return {"pixel accuracy": (value, "%")}

    def _over_pixels(self, pairs: Iterable[Pair], build_metric: Any) -> float:
        """A metric of torchmetrics over the pixels of all batches."""
        total: Any = None
        for output, target in pairs:
            total = total or build_metric(output.shape[1])
            total.update(output.argmax(1).cpu(), target.cpu())
        return float(total.compute())

    def chance(self, classes: int) -> float:
        """mIoU of guessing among equally frequent classes: p^2 / (2 p - p^2) with p = 1 / classes."""
        return 1 / max(1, 2 * classes - 1)

    def fits(self, output: object, samples: int, classes: int | None) -> bool:
        """Whether the output is one tensor [samples, classes, height, width]."""
        if not isinstance(output, Tensor) or output.dim() != 4 or len(output) != samples:
            return False
        return classes is None or output.shape[1] == classes

    def check_target(self, target: Any, classes: int) -> None:
        """Raise JpqError for targets that are not class numbers [B, H, W], or the void class."""
        fine = isinstance(target, Tensor) and target.dim() == 3 and not target.is_floating_point()
        check_targets(fine, self, "maps of class numbers, integers [height, width] per sample", target)
        check_classes(self, target, classes, self.void)

    def example_batch(self, samples: int, classes: int) -> tuple[Tensor, Tensor]:
        """Scores whose largest is that of the target, and maps of all classes as targets, with a row that is void."""
        target = (torch.arange(samples)[:, None, None] + torch.arange(4)[:, None] + torch.arange(5)) % classes
        output = 4.0 * F.one_hot(target, classes).permute(0, 3, 1, 2)
        target[:, 0] = self.void
        return output, target

    def row_text(self, classes: int) -> str:
        """Form of one sample's output, in words."""
        return f"a map of {classes} classes per pixel"

    def report(self, value: str, samples: str) -> str:
        """mIoU as a sentence."""
        return f"{self.metric_name} {value} on {samples}"


def _size(output: Tensor) -> str:
    return " x ".join(map(str, output.shape[2:]))
