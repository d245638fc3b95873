"""How a study stands: trials by kind, the best of each objective, the front and its hypervolume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from jpq import pareto
from jpq.trials.record import CHANCE
from jpq.trials.settings import Study
from jpq.trials.trial import REASON, RULED_OUT, SAME, STOPPED, UNITS, counts

OptunaStudy = optuna.Study


@dataclass(frozen=True)
class Standing:
    """A study as it stands."""

    trials: tuple[FrozenTrial, ...]
    names: tuple[str, ...]  # of the objectives
    done: int  # trials that count
    running: int
    stopped: int  # early
    failed: int
    spare: int  # repeated, ruled out, or of dead workers
    best: dict[str, float]  # objective -> its best value
    front: tuple[FrozenTrial, ...]  # by their second objective
    hypervolume: float | None  # of the front, as `jpq.pareto.covered` has it

    @classmethod
    def of(cls, study: optuna.Study, asked: Study) -> Standing:
        """Counts over all workers."""
        trials = study.get_trials(deepcopy=False)
        own = [t for t in trials if t.state == TrialState.COMPLETE and SAME not in t.user_attrs and fits(t)]
        signs = [-1.0 if name == "accuracy" else 1.0 for name in asked.asked()]
        points = [[s * v for s, v in zip(signs, t.values, strict=True)] for t in own]
        front = [t for t, p in zip(own, points, strict=True) if not any(_dominates(q, p) for q in points)]
        names = tuple(UNITS[name][0] for name in asked.asked())
        best = {n: s * min(p[i] for p in points) for i, (n, s) in enumerate(zip(names, signs, strict=True)) if points}
        done = sum(map(counts, trials))
        states = [t.state for t in trials]
        open_ = states.count(TrialState.RUNNING) + states.count(TrialState.WAITING)
        covered = volume(points, asked, study.user_attrs.get(CHANCE, 0.0))
        return cls(
            tuple(trials), names, done, states.count(TrialState.RUNNING),
            sum(t.state == TrialState.PRUNED and STOPPED in t.user_attrs for t in trials),
            sum(t.state == TrialState.FAIL and REASON in t.user_attrs for t in trials),
            len(trials) - done - open_, best, tuple(sorted(front, key=lambda t: t.values[1])), covered,
        )  # fmt: skip

    def counts(self, wanted: int) -> str:
        """`12/40 done, 2 running, 3 stopped early`."""
        kinds = {"running": self.running, "stopped early": self.stopped, "failed": self.failed,
                 "repeated or ruled out": self.spare}  # fmt: skip
        return ", ".join([f"{self.done}/{wanted} done", *(f"{n} {kind}" for kind, n in kinds.items() if n)])

    def volume_text(self) -> str:
        """The hypervolume, where it is known."""
        return "" if self.hypervolume is None else f"hypervolume {self.hypervolume:.3f}"

    def outcome(self, number: int) -> str:
        """What became of a trial."""
        trial = next((t for t in self.trials if t.number == number), None)
        if trial is None:
            return ""
        said = {name: trial.user_attrs[name] for name in (SAME, RULED_OUT, STOPPED, REASON) if name in trial.user_attrs}
        if said:
            name, text = next(iter(said.items()))
            return f"{name.replace('_', ' ')} {text}"
        if trial.values is None:
            return trial.state.name.lower()
        return ", ".join(f"{name} {value:.4g}" for name, value in zip(self.names, trial.values, strict=True))


def fits(trial: FrozenTrial) -> bool:
    """Whether every limit holds."""
    return all(over <= 0 for over in trial.user_attrs.get("limits", {}).values())


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether `one` is nowhere worse and somewhere better; smaller is better."""
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def volume(points: Sequence[Sequence[float]], asked: Study, chance: float) -> float | None:
    """What the points cover, in accuracy above chance x decades of each cost; None where a cost is no share of fp32's.

    `points`: (-accuracy, costs ...) in per cent, as Optuna has them.
    """
    if not {*asked.asked()} <= {"accuracy", "bops", "macs"}:
        return None
    accuracy, *shares = zip(*points, strict=True) if points else ((), *((),) * (len(asked.asked()) - 1))
    return pareto.covered([-a / 100 for a in accuracy], *([s / 100 for s in share] for share in shares), chance=chance)
