"""Regression: squared error, R^2 with the root mean squared error, and agreement number by number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jpq.tasks.base import Pair, Task, check_targets


class Regression(Task):
    """One or several real numbers per sample: outputs `[B, K]`, targets `[B, K]`, or `[B]` for one number.

    The metric is the mean over the K numbers of R^2, 1 - squared error / squared distance from the mean (torchmetrics).
    """

    name = "regression"
    metric_name = "R²"
    metric_bounds = (-math.inf, 1.0)
    output_name = "numbers"
    decision_name = "number"
    sample_name = "sample"
    packages = ("torchmetrics",)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(output, self._like(output, target))

    def summarize(self, pairs: Iterable[Pair]) -> float:
        """R^2 over the split. Raises JpqError for fewer than two samples."""
        from torchmetrics.functional.regression import r2_score

        output, target = self._concatenate(pairs)
        if len(output) < 2:
            check_targets(False, self, "two samples in each split at least", target)
        varies = (target != target[:1]).any(0)
        if not bool(varies.any()):
            return math.nan
        output, target = output[:, varies], target[:, varies]
        mean, std = target.mean(0), target.std(0, correction=0)  # torchmetrics takes sums of squares below 1e-4 for 0
        return float(r2_score((output - mean) / std, (target - mean) / std))

    def chance(self, classes: int) -> float:
        """R^2 of a model that always gives the mean."""
        return 0.0

    def other_metrics(self, pairs: Sequence[Pair]) -> dict[str, tuple[float, str]]:
        """Root of the mean squared error, in the unit of the targets."""
        from torchmetrics.functional.regression import mean_squared_error

        output, target = self._concatenate(pairs)
        return {"RMSE": (float(mean_squared_error(output, target, squared=False)), "")}

    def _concatenate(self, pairs: Iterable[Pair]) -> tuple[Tensor, Tensor]:
        """(outputs, targets) of a whole split, [N, K] each, in float64 on the CPU."""
        rows = [(output.double().cpu(), self._like(output, target).double().cpu()) for output, target in pairs]
        outputs, targets = zip(*rows, strict=True)
        return torch.cat(outputs).flatten(1), torch.cat(targets).flatten(1)

    def _like(self, output: Tensor, target: Tensor) -> Tensor:
        """The targets in the outputs' shape, where [B] stands for [B, 1]. Raises JpqError for other shapes."""
        check_targets(
            target.numel() == output.numel(), self, f"numbers {list(output.shape)}, as the outputs are", target
        )
        return target.reshape(output.shape).to(output.dtype)

    def fits(self, output: object, samples: int, classes: int | None) -> bool:
        """Whether the output is one tensor [samples, numbers]."""
        if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != samples:
            return False
        return classes is None or output.shape[1] == classes

    def check_target(self, target: Any, classes: int) -> None:
        """Raise JpqError for targets that are not finite real numbers [B, K], or [B]."""
        fine = isinstance(target, Tensor) and target.is_floating_point() and 1 <= target.dim() <= 2
        fine = fine and (1 if target.dim() == 1 else target.shape[1]) == classes
        check_targets(fine, self, f"rows of {classes} real numbers", target)
        check_targets(bool(target.isfinite().all()), self, "finite numbers, without NaN", target)
