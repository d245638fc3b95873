"""A second task for tests: regression on a seeded table, with a small fully connected network.

`--data regression:table --model regression:network` of `jpq optimize`, with a task that is not in TASKS.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jpq.tasks.base import Task
from jpq.tasks.data import Batches, Data

SPLITS = (600, 100, 200)  # samples of train, held-out, test


class Regression(Task):
    """One real number per sample, with targets of mean 0 and variance 1; judged by R^2."""

    name = "table-regression"
    metric_name = "R^2"
    metric_bounds = (-float("inf"), 1.0)
    output_name = "one number per sample"
    decision_name = "number"
    sample_name = "sample"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(output, target)

    def distill(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Mean squared distance from the float model's output."""
        return F.mse_loss(student, teacher.detach())

    def metric(self, output: Tensor, target: Tensor) -> Tensor:
        """1 - squared error, whose mean is R^2 for targets of variance 1."""
        return 1 - (output - target).square().mean(1)

    def chance(self, classes: int) -> float:
        """R^2 of the mean of all targets."""
        return 0.0


def table() -> Data:
    """900 rows of 16 features as images [1, 4, 4], and a smooth function of them as target, [N, 1]."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(sum(SPLITS), 1, 4, 4, generator=generator)
    columns = features.flatten(1)
    target = torch.sin(3 * columns[:, 0]) + columns[:, 1] * columns[:, 2] - columns[:, 3].square()
    target = ((target - target.mean()) / target.std())[:, None]
    parts = [
        Batches(x, y, mean=(0.5,), std=(0.3,), batch_size=50, shuffle=i == 0)
        for i, (x, y) in enumerate(zip(features.split(SPLITS), target.split(SPLITS), strict=True))
    ]
    example = parts[0].normalise(features[:2])
    return Data("table", *parts, example=example, classes=1, shape=(1, 4, 4), checksum="", task=Regression())


def network(classes: int) -> nn.Module:
    """16 features -> 32 -> 24 -> `classes` numbers."""
    layers = (nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, classes))
    return nn.Sequential(*layers)
