"""Status of a study: trials by kind, the best value of each objective, the front and its hypervolume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from jpq.costs.latency import NS
from jpq.results.front import pareto
from jpq.tasks import CLASSIFICATION, recorded_task
from jpq.tasks.base import Task
from jpq.trials.attributes import REASON, RULED_OUT, SAME, STOPPED, is_counted
from jpq.trials.objectives import objective_direction, objective_unit
from jpq.trials.settings import CHANCE, Study

OptunaStudy = optuna.Study

FULL = "fp32 costs"  # user attribute of the study


@dataclass(frozen=True)
class StudyStatus:
    """Trials by kind, best values and front of a study, over all workers."""

    trials: tuple[FrozenTrial, ...]
    names: tuple[str, ...]  # of the objectives
    done: int  # trained, or failed by themselves
    running: int
    stopped: int  # stopped early
    failed: int
    interrupted: int  # whose worker was stopped or died; each was queued again, as another trial
    spare: int  # repeated, ruled out or too many
    best: dict[str, float]  # objective -> its best value
    front: tuple[FrozenTrial, ...]  # by their second objective
    hypervolume: float | None  # of the front, as `jpq.results.front.pareto.hypervolume_of` has it

    @classmethod
    def of(cls, study: optuna.Study, settings: Study) -> StudyStatus:
        """The status of a study that these settings describe."""
        trials = study.get_trials(deepcopy=False)
        completed = [
            t for t in trials if t.state == TrialState.COMPLETE and SAME not in t.user_attrs and meets_limits(t)
        ]
        task = recorded_task(study.user_attrs)
        signs = [_sign(name, task) for name in settings.objective_names()]
        points = [[s * v for s, v in zip(signs, t.values, strict=True)] for t in completed]
        front = [t for t, on in zip(completed, pareto.non_dominated(points), strict=True) if on] if completed else []
        names = tuple(objective_unit(name, task)[0] for name in settings.objective_names())
        best = {n: s * min(p[i] for p in points) for i, (n, s) in enumerate(zip(names, signs, strict=True)) if points}
        done = sum(map(is_counted, trials))
        states = [t.state for t in trials]
        open_ = states.count(TrialState.RUNNING) + states.count(TrialState.WAITING)
        failed = sum(t.state == TrialState.FAIL and REASON in t.user_attrs for t in trials)
        interrupted = states.count(TrialState.FAIL) - failed
        full, chance = (study.user_attrs.get(key) for key in (FULL, CHANCE))
        hypervolume = (
            study_hypervolume(completed, settings.objective_names(), full, chance or 0.0, task)
            if completed and full and len(names) <= 3
            else None
        )
        return cls(
            tuple(trials),
            names,
            done,
            states.count(TrialState.RUNNING),
            sum(t.state == TrialState.PRUNED and STOPPED in t.user_attrs for t in trials),
            failed,
            interrupted,
            len(trials) - done - open_ - interrupted,
            best,
            tuple(sorted(front, key=lambda t: t.values[1])),
            hypervolume,
        )

    def counts_text(self, total: int) -> str:
        """`12/40 done, 2 running, 3 stopped early`."""
        kinds = {
            "running": self.running,
            "stopped early": self.stopped,
            "failed": self.failed,
            "interrupted": self.interrupted,
            "repeated or ruled out": self.spare,
        }
        return ", ".join([f"{self.done}/{total} done", *(f"{n} {kind}" for kind, n in kinds.items() if n)])

    def hypervolume_text(self) -> str:
        """The hypervolume, where there is one: 0 says only that no model is better than chance, or none is known."""
        return f"hypervolume {self.hypervolume:.3f}" if self.hypervolume else ""

    def outcome(self, number: int) -> str:
        """Values of a trial as text, or the reason why it has none."""
        trial = next((t for t in self.trials if t.number == number), None)
        if trial is None:
            return ""
        reasons = [name for name in (SAME, RULED_OUT, STOPPED, REASON) if name in trial.user_attrs]
        if reasons:
            name, text = reasons[0], trial.user_attrs[reasons[0]]
            return f"{name.replace('_', ' ')} {text}"
        if trial.values is None:
            return trial.state.name.lower()
        return ", ".join(f"{name} {value:.4g}" for name, value in zip(self.names, trial.values, strict=True))


def _sign(name: str, task: Task) -> float:
    """Factor by which smaller values of an objective are better."""
    return 1.0 if objective_direction(name, task) == StudyDirection.MINIMIZE else -1.0


def meets_limits(trial: FrozenTrial) -> bool:
    """Whether a trial keeps every limit."""
    return all(over <= 0 for over in trial.user_attrs.get("limits", {}).values())


def study_hypervolume(
    trials: Sequence[FrozenTrial],
    names: Sequence[str],
    full: Mapping[str, float],
    chance: float,
    task: Task = CLASSIFICATION,
) -> float:
    """Hypervolume of trials, in metric above chance x decades of each cost (`pareto.hypervolume_of`).

    Args:
        trials: finished ones.
        names: the objectives, in the order of the trials' values.
        full: costs of the fp32 model; size and latency in bytes and nanoseconds.
        chance: metric of guessing.
        task: of the study.
    """
    columns = {name: [t.values[i] / objective_unit(name, task)[1] for t in trials] for i, name in enumerate(names)}
    to_share = {"size": full.get("size", 1.0), "latency": full.get("latency", NS) / NS}  # the others are shares already
    shares = [[v / to_share.get(name, 1.0) for v in columns[name]] for name in names if name != "accuracy"]
    return pareto.hypervolume_of(columns["accuracy"], *shares, chance=chance)
