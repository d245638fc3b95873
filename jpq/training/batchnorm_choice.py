"""Whether BatchNorm keeps the float model's statistics while the network is compressed (`--batchnorm`).

In training BatchNorm normalises by the statistics of each batch, and what is left in the end is their average. Batches
of few samples have other statistics than those that the model was trained with: public weights of DnCNN (128 crops a
batch) fall from 29 to 20 dB when their statistics are measured anew on batches of 4. Fine-tuning does not repair that.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from jpq.compression.batchnorm import keep_statistics, moving_norms
from jpq.compression.calibration import reestimate_batchnorm
from jpq.config import BATCH, FROZEN, Config
from jpq.tasks.data import Data
from jpq.tracing.forward import batch_size
from jpq.training import distributed
from jpq.types import JpqError

MEASURED = 16  # batches that statistics are averaged over
JUDGED = 8  # of them, on which the metric is measured
LOST = 0.1  # share of its metric above chance (where none is known: of all) that statistics of batches may cost


@dataclass(frozen=True)
class BatchStatistics:
    """Scores of the float model on the same training batches: by its own statistics, and by the average of batches."""

    own: float
    batches: float
    chance: float | None  # None: unknown
    samples: int  # of the largest batch

    @property
    def are_harmful(self) -> bool:
        """Whether the model loses more than `LOST` of its metric above chance, or of its size where none is known."""
        gain = abs(self.own) if self.chance is None else self.own - self.chance
        return math.isfinite(gain) and gain > 0 and self.own - self.batches > LOST * gain


def choose_batchnorm(model: nn.Module, data: Data, config: Config) -> BatchStatistics | None:
    """Let the BatchNorm of the float model keep its statistics where the config says so, or where batches harm it.

    `--batchnorm auto` compares the metric of the first training batches by both statistics.

    Args:
        model: float, trained; its norms are marked.
        data: whose training split is looked at.
        config: the settings.

    Returns what was compared, where that has decided for the float model's statistics; else None.
    """
    if config.train.batchnorm == BATCH or not moving_norms(model):
        return None
    if config.train.batchnorm == FROZEN:
        keep_statistics(model)
        return None
    found = distributed.run_on_first(lambda: compare_statistics(model, data))
    if found is None or not found.are_harmful:
        return None
    keep_statistics(model)
    return found


@torch.no_grad()
def compare_statistics(model: nn.Module, data: Data) -> BatchStatistics | None:
    """The float model's scores on the first training batches; None where these have no metric."""
    batches = list(islice(data.train.epoch(0), MEASURED))
    copied = copy.deepcopy(model).eval()

    def answer(*args: Any, **kwargs: Any) -> Any:
        return copied(*args, **kwargs)

    try:
        own = data.task.evaluate(answer, batches[:JUDGED])
        reestimate_batchnorm(copied, batches)
        averaged = data.task.evaluate(answer, batches[:JUDGED])
    except JpqError:  # no metric on so few samples
        return None
    samples = max(batch_size(x) for x, _ in batches)
    return BatchStatistics(own, averaged, data.chance_score, samples)
