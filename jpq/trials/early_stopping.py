"""Early stopping of dominated trials: the rule, and the observer that applies it while a trial runs.

Optuna's pruners refuse studies of several objectives, so the rule is our own.

After an epoch of its fine-tuning (decisions are fixed by then) a trial is *behind* where some finished trial that
costs no more, by every cost objective, had a held-out accuracy more than `margin` above its own after the same share
of its epochs. A trial that is behind `patience` epochs in a row is stopped: on the way it is dominated already, and
the margin is what late progress may still make up. Nothing is stopped before `warm_up` trials have finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import Trial, TrialState

from jpq.results.formatting import format_metric
from jpq.tasks import CLASSIFICATION
from jpq.tasks.base import Task
from jpq.training.history import EpochRecord, TrainingObserver
from jpq.trials.attributes import CURVE, EPOCHS, SAME, STOPPED
from jpq.trials.objectives import UNITS
from jpq.trials.preview import Costs
from jpq.trials.settings import Study


@dataclass(frozen=True)
class MetricCurve:
    """Held-out metric after each finished epoch of a trial's fine-tuning, and the costs of its model."""

    accuracy: tuple[float, ...]
    epochs: int  # number of epochs of the whole fine-tuning
    cost: tuple[float, ...]  # by every cost objective, in one order

    def metric_at(self, share: float) -> float | None:
        """The last metric that was known at this share of the epochs; None before the first."""
        done = min(int(share * self.epochs + 1e-9), len(self.accuracy))
        return self.accuracy[done - 1] if done else None


def should_stop(
    trial: MetricCurve, finished: Sequence[MetricCurve], margin: float, patience: int, warm_up: int
) -> bool:
    """Whether the rule stops a trial after its last finished epoch.

    Args:
        trial: its curve so far; finished: curves of finished trials.
        margin: by how much the metric must be worse.
        patience: for how many epochs in a row.
        warm_up: finished trials before any is stopped.
    """
    if len(finished) < warm_up or len(trial.accuracy) < patience:
        return False
    rivals = [peer for peer in finished if all(p <= t for p, t in zip(peer.cost, trial.cost, strict=True))]
    done = len(trial.accuracy)
    return all(_behind(trial, epoch, rivals, margin) for epoch in range(done - patience + 1, done + 1))


def _behind(trial: MetricCurve, epoch: int, rivals: Sequence[MetricCurve], margin: float) -> bool:
    """Whether another trial was better by more than the margin at the same share of its epochs."""
    theirs = [peer.metric_at(epoch / trial.epochs) for peer in rivals]
    known = [accuracy for accuracy in theirs if accuracy is not None]
    return bool(known) and max(known) - trial.accuracy[epoch - 1] > margin


class EarlyStoppingObserver:
    """Observer of one trial: passes progress on, records the curve in the study, and stops dominated trials.

    Args:
        trial: of Optuna; study: the settings.
        observer: receives everything that this one receives.
        costs: of the trial's model, where they are known before it trains.
    """

    def __init__(self, trial: Trial, study: Study, observer: TrainingObserver, costs: Costs | None) -> None:
        self.trial, self.study, self.observer, self.costs = trial, study, observer, costs
        self.cost_names = [name for name in study.objective_names() if name != "accuracy"]
        self.accuracy: list[float] = []
        self.task: Task = CLASSIFICATION

    def begin(self, task: Task) -> None:
        """Pass it on."""
        self.task = task
        self.observer.begin(task)

    def phase(self, name: str, epochs: int, steps: int) -> None:
        """Pass it on."""
        self.observer.phase(name, epochs, steps)

    def step(self, loss: float, bops_share: float, limit_share: float) -> None:
        """Pass it on."""
        self.observer.step(loss, bops_share, limit_share)

    def epoch(self, row: EpochRecord) -> None:
        """Record the metric of a finished epoch. Raises TrialPruned for a dominated trial."""
        self.observer.epoch(row)
        if row.phase != "fine-tune":
            return
        so_far = (
            self.trial.user_attrs.get(CURVE, []) if not self.accuracy and row.epoch > 1 else self.accuracy
        )  # resumed
        self.accuracy = [*so_far[: row.epoch - 1], row.accuracy]
        self.trial.set_user_attr(CURVE, self.accuracy)
        if EPOCHS not in self.trial.user_attrs:
            self.trial.set_user_attr(EPOCHS, row.epochs)
        costs = self.costs or ({"bops": row.bops_share} if self.cost_names == ["bops"] else None)
        if not self.study.early_stop or costs is None or row.epoch == row.epochs or len(self.accuracy) < row.epoch:
            return
        curve = MetricCurve(
            tuple(self.accuracy), row.epochs, tuple(costs[name] * UNITS[name][1] for name in self.cost_names)
        )
        if should_stop(curve, self._finished(), self.study.margin, self.study.patience, self.study.warm_up):
            text = f"after {row.epoch} of {row.epochs} epochs, at {format_metric(self.task, row.accuracy)}"
            self.trial.set_user_attr(STOPPED, text)
            raise optuna.TrialPruned(text)

    def _finished(self) -> list[MetricCurve]:
        """Complete curves of finished trials; the beginning of others was lost with a worker."""
        done = self.trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return [
            MetricCurve(tuple(t.user_attrs[CURVE]), len(t.user_attrs[CURVE]), tuple(t.values[1:]))
            for t in done
            if len(t.user_attrs.get(CURVE, [])) == t.user_attrs.get(EPOCHS) and SAME not in t.user_attrs
        ]
