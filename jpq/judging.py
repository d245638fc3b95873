"""What a run's decisions look at: training batches and held-out images, never the test split."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from itertools import islice

from torch import Tensor

from jpq.allocators import Judge
from jpq.config import Config
from jpq.data import Data
from jpq.methods import row
from jpq.network.compressed import Compressed
from jpq.plan import Plan
from jpq.scores import Score, pick_score
from jpq.train import evaluate, reestimate
from jpq.types import JpqError

CALIBRATION = 8  # batches that fit the quantizers' ranges
JUDGED = 1000  # held-out images on which allocators try plans
EVIDENCE = 10**6  # the first epoch that scores look at: no training comes to it


def calibration(data: Data) -> list[Tensor]:
    """A few training batches."""
    return [x for x, _ in islice(data.train.epoch(0), CALIBRATION)]


def score_of(config: Config) -> Score:
    """What ranks channels: --score, or the method's own."""
    return pick_score(config.decide.score or row(config.decide.method).score or "l1", config.decide.classes)


def known_classes(classes: str, data: Data) -> None:
    """Raises JpqError for a class that the data do not have."""
    for number in filter(None, classes.split(",")):
        if int(number) >= data.classes:
            raise JpqError(f"--classes {classes}: data '{data.name}' has classes 0 to {data.classes - 1} only.")


def evidence(data: Data, decision: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches for a score, others at each decision."""
    return data.train.epoch(EVIDENCE + decision)


def judge_of(net: Compressed, data: Data, config: Config) -> Judge:
    """What allocators may look at: training batches, and the held-out accuracy of any plan.

    The accuracy is that of a copy that settles on the plan and measures BatchNorm's statistics anew.
    """
    images = data.held_out.first(JUDGED)
    batches = list(islice(data.train.epoch(0), CALIBRATION))

    def accuracy(plan: Plan) -> float:
        trial = copy.deepcopy(net)
        trial.settle(plan)
        reestimate(trial, batches)
        return evaluate(trial, images)

    return Judge(partial(evidence, data), accuracy, config.run.seed)
