"""Early stopping of hopeless trials. Optuna's pruners refuse studies of several objectives, so the rule is our own.

After an epoch of its fine-tuning (decisions are fixed by then) a trial is *behind* where some finished trial that
costs no more, by every cost objective, had a held-out accuracy more than `margin` above its own after the same share
of its epochs. A trial that is behind `patience` epochs in a row is stopped: on the way it is dominated already, and
the margin is what late progress may still make up. Nothing is stopped before `warm_up` trials have finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """Held-out accuracy after each epoch of a trial's fine-tuning, as far as it came, and what its model costs."""

    accuracy: tuple[float, ...]
    epochs: int  # of the whole fine-tuning
    cost: tuple[float, ...]  # by every cost objective, in one order

    def at(self, share: float) -> float | None:
        """The last accuracy that was known at this share of the epochs; None before the first."""
        done = min(int(share * self.epochs + 1e-9), len(self.accuracy))
        return self.accuracy[done - 1] if done else None


def should_stop(trial: Curve, finished: Sequence[Curve], margin: float, patience: int, warm_up: int) -> bool:
    """Whether the rule above stops a trial now."""
    if len(finished) < warm_up or len(trial.accuracy) < patience:
        return False
    rivals = [peer for peer in finished if all(p <= t for p, t in zip(peer.cost, trial.cost, strict=True))]
    done = len(trial.accuracy)
    return all(_behind(trial, epoch, rivals, margin) for epoch in range(done - patience + 1, done + 1))


def _behind(trial: Curve, epoch: int, rivals: Sequence[Curve], margin: float) -> bool:
    theirs = [peer.at(epoch / trial.epochs) for peer in rivals]
    known = [accuracy for accuracy in theirs if accuracy is not None]
    return bool(known) and max(known) - trial.accuracy[epoch - 1] > margin
