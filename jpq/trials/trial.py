"""One trial: decisions, what they cost, a run from the shared float weights, and what it leaves in the study."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.trial import FrozenTrial, Trial, TrialState

from jpq.allocation.allocators import check_allocator
from jpq.config import Config
from jpq.methods.compatibility import compose
from jpq.recipe import optimize
from jpq.results import run_folder
from jpq.results.formatting import format_metric, metric_scale
from jpq.results.record import LayerRecord, Result
from jpq.tasks import CLASSIFICATION
from jpq.tasks.base import Task
from jpq.training import checkpoint
from jpq.training.history import EpochRecord, NullObserver, TrainingObserver
from jpq.trials.early_stopping import Curve, should_stop
from jpq.trials.preview import Costs, Preview
from jpq.trials.samplers import LIMITS, hold
from jpq.trials.settings import Study
from jpq.trials.space import Space
from jpq.trials.storage import WORKER, is_disk_error, record_worker
from jpq.types import JpqError

UNITS = {  # objective -> its name in the study, and what one of our units is in the name's
    "accuracy": ("held-out accuracy (%)", 100.0),
    "bops": ("BOPs (% of fp32)", 100.0),
    "size": ("size (KB)", 1e-3),
    "latency": ("latency (ms)", 1.0),
    "macs": ("MACs (% of fp32)", 100.0),
}

# user attributes of a trial, beside those that a finished run leaves
DECISIONS = "decisions"  # a name that equal decisions share

SAME, RULED_OUT, SURPLUS = "same_as", "infeasible", "surplus"  # why a trial did not train, and does not count

STOPPED, REASON = "stopped_early", "reason"  # why it was stopped; why it failed

CURVE, EPOCHS = "held_out_by_epoch", "fine_tuning_epochs"  # of the fine-tuning, and how many it has


class Failed(JpqError):
    """A trial failed for a reason of its own; the study goes on."""


class StudyObserver(TrainingObserver, Protocol):
    """Somebody who watches a study."""

    def trial(self, number: int) -> None:
        """A trial begins."""

    def tally(self, study: optuna.Study) -> None:
        """A trial has ended, here or elsewhere."""


class NullStudyObserver(NullObserver):
    """Nobody watches."""

    def trial(self, number: int) -> None:
        """Ignore it."""

    def tally(self, study: optuna.Study) -> None:
        """Ignore it."""


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of those that were asked for: it trained, or failed for a reason of its own."""
    attrs = trial.user_attrs
    if trial.state == TrialState.COMPLETE:
        return SAME not in attrs
    return (trial.state == TrialState.PRUNED and STOPPED in attrs) or (
        trial.state == TrialState.FAIL and REASON in attrs
    )


@dataclass
class OneTrial:
    """Runs one trial when it is called; what it returns are the objectives' values, in the units of `UNITS`."""

    study: Study
    config: Config  # of all trials: names the float weights
    space: Space
    preview: Preview
    folder: Path
    watch: StudyObserver
    limits: Costs = field(init=False)

    def __post_init__(self) -> None:
        self.limits = self.preview.limits(self.study.limits())

    def require_possible(self) -> None:
        """Raises JpqError for a limit that the smallest decisions break."""
        if not (self.limits and self.study.by_hand()):
            return
        least = self.preview.look(self.space.smallest()).costs
        for cost, limit in self.limits.items():
            if least[cost] > limit:
                name, unit = UNITS[cost]
                raise JpqError(
                    f"--max-{cost} {self.study.limits()[cost]} cannot be met: the smallest that trials may decide on "
                    f"has {name} {least[cost] * unit:.4g}. Raise it, or allow fewer bits (--w-bits, --a-bits) or less "
                    "density (--density-range)."
                )

    def __call__(self, trial: Trial) -> list[float]:
        """Raises TrialPruned where it is not worth its time, and Failed, noted as its reason, where it fails.

        One that was interrupted, or that this machine has no room for, is queued again.
        """
        record_worker(trial)
        self.watch.trial(trial.number)
        others = [t for t in trial.study.get_trials(deepcopy=False) if t.number != trial.number]
        ahead = sum(counts(t) or (t.state == TrialState.RUNNING and t.number < trial.number) for t in others)
        if ahead >= self.study.trials:  # two workers saw one place left
            if decided(trial):
                queue_again(trial)
            self._leave(trial, SURPLUS, True)
        try:
            config = self.space.suggest(trial)
            config = replace(config, run=replace(config.run, out=self.folder / "trials", resume=False)).check()
            return self._values(trial, config, others)
        except (KeyboardInterrupt, OSError):
            queue_again(trial)
            raise
        except (JpqError, RuntimeError) as error:  # RuntimeError: torch's, such as too little memory
            if isinstance(error, JpqError) and is_disk_error(error):
                queue_again(trial)
                raise
            trial.set_user_attr(REASON, " ".join(str(error).split())[:500])
            raise Failed(str(error)) from error

    def _values(self, trial: Trial, config: Config, others: Sequence[FrozenTrial]) -> list[float]:
        d = config.decide
        costs: Costs | None = None
        name = replace(config, task=replace(config.task, weights=None)).hash()  # not where this machine has them
        if self.study.by_hand():
            known = self.preview.look(config)
            costs, name = known.costs, known.name
        else:
            compose(d.method, d.structure, d.width, d.score, d.schedule, d.classes)
            check_allocator(d.method, d.allocator)
        trial.set_user_attr(DECISIONS, name)
        twin = self._twin(name, trial, others)
        if twin is not None:
            return self._same(trial, twin)
        if costs is not None:
            self._hold(trial, costs)
        run = config.run.out / config.hash()
        resumed = replace(config, run=replace(config.run, resume=(run / checkpoint.NAME).is_file()))
        watch = EarlyStoppingObserver(trial, self.study, self.watch, costs)
        try:
            result = optimize(resumed, watch, final=False)
        except optuna.TrialPruned:
            if not (run / "result.json").exists():
                shutil.rmtree(run, ignore_errors=True)
            raise
        if self.study.pictures:
            run_folder.draw_run(result, resumed)
            keep_pictures(trial, result.folder, self.folder / "artifacts")
        return self._report(trial, result)

    def _twin(self, name: str, trial: Trial, others: Sequence[FrozenTrial]) -> FrozenTrial | None:
        """An earlier trial of the same decisions that has ended, or is still running."""
        same = [t for t in others if t.user_attrs.get(DECISIONS) == name and SAME not in t.user_attrs]
        ended = [t for t in same if counts(t) or RULED_OUT in t.user_attrs]
        running = [t for t in same if t.state == TrialState.RUNNING and t.number < trial.number]
        return next(iter([*ended, *running]), None)

    def _same(self, trial: Trial, twin: FrozenTrial) -> list[float]:
        """The values of the earlier trial, which the sampler hears again; nothing is trained."""
        hold(trial, twin.user_attrs.get(LIMITS, {}))
        for key, value in twin.user_attrs.items():
            if key not in (SAME, REASON, STOPPED, WORKER):
                trial.set_user_attr(key, value)
        if twin.values is None or twin.state != TrialState.COMPLETE:
            self._leave(trial, SAME, twin.number)
        trial.set_user_attr(SAME, twin.number)
        return list(twin.values)

    def _leave(self, trial: Trial, why: str, value: Any) -> None:
        """End a trial before it trains."""
        trial.set_user_attr(why, value)
        raise optuna.TrialPruned(f"{why}: {value}")

    def _hold(self, trial: Trial, costs: Costs) -> None:
        """Tell the sampler how the limits are kept, and end a trial that breaks one.

        The Gaussian process learns limits from finished trials alone, so it gets them trained.
        """
        hold(trial, {cost: costs[cost] / limit - 1 for cost, limit in self.limits.items()})
        over = [cost for cost, limit in self.limits.items() if costs[cost] > limit]
        if over and self.study.sampler != "gp":
            shown = ", ".join(f"{UNITS[c][0]}: {costs[c] * UNITS[c][1]:.4g}" for c in over)
            self._leave(trial, RULED_OUT, shown)

    def _report(self, trial: Trial, result: Result) -> list[float]:
        """Leave what was found in the study."""
        now = result.compressed
        found: Costs = {"bops": now.bops_share, "size": float(now.size_bytes), "macs": now.macs / result.float.macs}
        if now.latency_ms is not None:
            found["latency"] = now.latency_ms
        if not self.study.by_hand():
            hold(trial, {cost: found[cost] / limit - 1 for cost, limit in self.limits.items()})
        accuracy = result.held_out["compressed"]
        attrs = {
            "run_folder": str(result.folder.relative_to(self.folder)),
            "method": result.method,
            "layers": {row.name: layer(row) for row in result.layers},
            "held_out": accuracy,
            "bops": now.bops,
            "bops_share": now.bops_share,
            "size_bytes": now.size_bytes,
            "macs": now.macs,
            "latency_ms": now.latency_ms,
            "seconds": result.seconds["total"],
        }
        for key, value in attrs.items():
            if value is not None:
                trial.set_user_attr(key, value)
        values = {"accuracy": accuracy, **found}
        return [values[name] * objective_unit(name, result.task)[1] for name in self.study.asked()]


def objective_unit(name: str, task: Task) -> tuple[str, float]:
    """An objective's name in the study, and the factor from our unit to the name's; "accuracy" is the task's metric."""
    if name != "accuracy":
        return UNITS[name]
    unit = f" ({task.metric_unit})" if task.metric_unit else ""
    return f"held-out {task.metric_name}{unit}", metric_scale(task)


def decided(trial: Trial) -> dict[str, Any]:
    """What a trial has decided so far, and what it was queued with."""
    queued = trial.storage.get_trial_system_attrs(trial._trial_id).get("fixed_params", {})
    return {**queued, **trial.params}


def queue_again(trial: Trial) -> None:
    """Let a trial be run again with its decisions, by this worker or another, and go on with its curve."""
    kept = {key: value for key, value in trial.user_attrs.items() if key == CURVE}
    trial.study.enqueue_trial(decided(trial), user_attrs=kept)


def layer(row: LayerRecord) -> str:
    """One layer as a person reads it: `W4 A3, 24/32 channels`."""
    kept = f", {row.outputs}/{row.outputs_all} channels" if row.outputs_all > row.outputs else ""
    mask = f", density {row.density:.2f} ({row.structure})" if row.density < 1 else ""
    return f"W{row.w_bits} A{row.a_bits}{kept}{mask}"


def keep_pictures(where: Trial | optuna.Study, source: Path, store: Path) -> None:
    """Let optuna-dashboard show the pictures of a folder."""
    store.mkdir(exist_ok=True)
    with warnings.catch_warnings():  # Optuna calls artifacts experimental
        warnings.simplefilter("ignore")
        for picture in sorted(source.glob("*.png")):
            upload_artifact(
                artifact_store=FileSystemArtifactStore(str(store)), file_path=str(picture), study_or_trial=where
            )


class EarlyStoppingObserver:
    """Passes a run's progress on, notes its curve in the study, and stops it where it is hopeless."""

    def __init__(self, trial: Trial, study: Study, watch: TrainingObserver, costs: Costs | None) -> None:
        self.own, self.study, self.watch, self.costs = trial, study, watch, costs
        self.by = [name for name in study.asked() if name != "accuracy"]
        self.accuracy: list[float] = []
        self.task: Task = CLASSIFICATION

    def begin(self, task: Task) -> None:
        """Pass it on."""
        self.task = task
        self.watch.begin(task)

    def phase(self, name: str, epochs: int, steps: int) -> None:
        """Pass it on."""
        self.watch.phase(name, epochs, steps)

    def step(self, loss: float, bops_share: float, aim_share: float) -> None:
        """Pass it on."""
        self.watch.step(loss, bops_share, aim_share)

    def epoch(self, row: EpochRecord) -> None:
        """Note the accuracy. Raises TrialPruned for a hopeless trial."""
        self.watch.epoch(row)
        if row.phase != "fine-tune":
            return
        known = self.own.user_attrs.get(CURVE, []) if not self.accuracy and row.epoch > 1 else self.accuracy  # resumed
        self.accuracy = [*known[: row.epoch - 1], row.accuracy]
        self.own.set_user_attr(CURVE, self.accuracy)
        if EPOCHS not in self.own.user_attrs:
            self.own.set_user_attr(EPOCHS, row.epochs)
        costs = self.costs or ({"bops": row.bops_share} if self.by == ["bops"] else None)
        if not self.study.early_stop or costs is None or row.epoch == row.epochs or len(self.accuracy) < row.epoch:
            return
        mine = Curve(tuple(self.accuracy), row.epochs, tuple(costs[name] * UNITS[name][1] for name in self.by))
        if should_stop(mine, self._finished(), self.study.margin, self.study.patience, self.study.warm_up):
            text = f"after {row.epoch} of {row.epochs} epochs, at {format_metric(self.task, row.accuracy)}"
            self.own.set_user_attr(STOPPED, text)
            raise optuna.TrialPruned(text)

    def _finished(self) -> list[Curve]:
        """The curves of finished trials; not those whose beginning was lost with a worker."""
        done = self.own.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return [
            Curve(tuple(t.user_attrs[CURVE]), len(t.user_attrs[CURVE]), tuple(t.values[1:]))
            for t in done
            if len(t.user_attrs.get(CURVE, [])) == t.user_attrs.get(EPOCHS) and SAME not in t.user_attrs
        ]
