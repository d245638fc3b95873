"""What a run's decisions look at: training batches and held-out images, never the test split."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

from torch import Tensor

from jpq.allocation.allocators import PlanEvaluator, place
from jpq.allocation.ranking.scheduled_pruning import uniform_keep_share
from jpq.allocation.uniform_bits import uniform
from jpq.compression import discretize
from jpq.compression.build import Bounds
from jpq.compression.calibration import reestimate_batchnorm
from jpq.compression.model import CompressedModel
from jpq.config import Config
from jpq.costs.target import Target, all_met
from jpq.methods.scores import Score, pick_score
from jpq.methods.table import METHODS, row
from jpq.plan import Plan
from jpq.tasks.classification import evaluate
from jpq.tasks.data import Data
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


def check_classes(classes: str, data: Data) -> None:
    """Raises JpqError for a class that the data do not have."""
    for number in filter(None, classes.split(",")):
        if int(number) >= data.classes:
            raise JpqError(f"--classes {classes}: data '{data.name}' has classes 0 to {data.classes - 1} only.")


def evidence(data: Data, decision: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches for a score, others at each decision."""
    return data.train.epoch(EVIDENCE + decision)


def plan_evaluator(net: CompressedModel, data: Data, config: Config) -> PlanEvaluator:
    """What allocators may look at: training batches, and the held-out accuracy of any plan.

    The accuracy is that of a copy that settles on the plan and measures BatchNorm's statistics anew.
    """
    images = data.held_out.first(JUDGED)
    batches = list(islice(data.train.epoch(0), CALIBRATION))

    def accuracy(plan: Plan) -> float:
        trial = copy.deepcopy(net)
        trial.freeze(plan)
        reestimate_batchnorm(trial, batches)
        return evaluate(trial, images)

    return PlanEvaluator(partial(evidence, data), accuracy, config.run.seed)


def decide(
    net: CompressedModel,
    targets: Sequence[Target],
    w_bits: Bounds,
    a_bits: Bounds,
    score: Score,
    judge: PlanEvaluator | None,
    allocator: str = "",
) -> Plan:
    """The plan of a method that does not search: uniform bits, or the units that a score and an allocator put first.

    Without a judge the ranking stands as it is: enough to tell targets that cannot be met.
    """
    if METHODS[net.method].gate is None:
        return uniform(net, targets, range(w_bits[0], w_bits[1] + 1), range(a_bits[0], a_bits[1] + 1))
    if judge:
        place(net, score, allocator, judge, uniform_keep_share(net, lambda uses: all_met(targets, uses)), targets[0])
    return discretize.discretize(net, targets)
