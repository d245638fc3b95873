"""The data that decisions look at: training batches for ranges and scores, held-out images for plans."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache, partial
from itertools import islice
from typing import Any

from torch import Tensor

from jpq.allocation.allocators import PlanEvaluator
from jpq.compression.calibration import reestimate_batchnorm
from jpq.compression.model import CompressedModel
from jpq.plan import Plan
from jpq.tasks.batches import SplitBatches
from jpq.tasks.data import Data
from jpq.types import JpqError

CALIBRATION_BATCHES = 8  # training batches that fit the quantizers' ranges
EVALUATED_IMAGES = 1000  # held-out images on which allocators measure plans
SCORE_EPOCH = 10**6  # number of the epoch whose batches scores read, beyond those of training


def calibration_batches(data: Data) -> list[Tensor]:
    """The inputs of the first few training batches, to which the ranges of quantizers are fitted."""
    return [x for x, _ in islice(data.train.epoch(0), CALIBRATION_BATCHES)]


def calibration_inputs(data: Data) -> Iterator[Tensor]:
    """Batches of training inputs that sensitivities are measured on, the same at every call."""
    return (x for x, _ in data.train.epoch(0))


def score_batches(data: Data, decision: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches (inputs, labels) for a score, in another order at each decision."""
    return data.train.epoch(SCORE_EPOCH + decision)


def plan_evaluator(net: CompressedModel, data: Data, seed: int) -> PlanEvaluator:
    """Training batches, and the held-out metric of any plan, for allocators.

    A plan is measured on a copy of `net` that takes it and re-estimates BatchNorm's statistics.
    """

    @cache
    def batches() -> tuple[list[tuple[Any, Any]], SplitBatches]:
        training = list(islice(data.train.epoch(0), CALIBRATION_BATCHES))
        return training, data.held_out.first(EVALUATED_IMAGES)

    def metric(plan: Plan) -> float:
        training, held_out = batches()
        trial = copy.deepcopy(net)
        trial.freeze(plan)
        reestimate_batchnorm(trial, training)
        return data.task.evaluate(trial, held_out)

    return PlanEvaluator(partial(score_batches, data), metric, seed, data.task.output_loss)


def check_classes(classes: str, data: Data) -> None:
    """Raise JpqError for a class of `--classes` that the data do not have."""
    for number in filter(None, classes.split(",")):
        if int(number) >= data.classes:
            raise JpqError(f"--classes {classes}: data '{data.name}' has classes 0 to {data.classes - 1} only.")
