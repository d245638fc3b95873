"""User attributes that `jpq study` keeps in a trial of Optuna, beside those of a finished run."""

from __future__ import annotations

from optuna.trial import FrozenTrial, TrialState

DECISIONS = "decisions"  # a digest that equal decisions share

SAME = "same_as"  # number of the equal trial that was not trained again
RULED_OUT = "infeasible"  # the limits that the decisions break
SURPLUS = "surplus"  # the study had enough trials

STOPPED = "stopped_early"  # epoch and metric at which the trial was stopped
REASON = "reason"  # error of a failed trial

AGAIN = "again"  # number of the interrupted trial whose decisions it takes up

CURVE = "held_out_by_epoch"  # metric after each epoch of the fine-tuning
EPOCHS = "fine_tuning_epochs"  # of the whole fine-tuning


def is_counted(trial: FrozenTrial) -> bool:
    """Whether a trial counts as one of --trials: it trained, or failed by itself."""
    attrs = trial.user_attrs
    if trial.state == TrialState.COMPLETE:
        return SAME not in attrs
    return (trial.state == TrialState.PRUNED and STOPPED in attrs) or (
        trial.state == TrialState.FAIL and REASON in attrs
    )
