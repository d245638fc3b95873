"""One trial of a study: suggest decisions, check limits, run `optimize`, and report the objectives' values."""

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
from jpq.methods.compatibility import compose_method
from jpq.recipe import optimize
from jpq.results import run_folder
from jpq.results.record import LayerRecord, Result
from jpq.training import checkpoint
from jpq.training.history import NullObserver, TrainingObserver
from jpq.trials.attributes import AGAIN, CURVE, DECISIONS, REASON, RULED_OUT, SAME, STOPPED, SURPLUS, is_counted
from jpq.trials.early_stopping import EarlyStoppingObserver
from jpq.trials.objectives import UNITS, objective_unit
from jpq.trials.preview import Costs, Preview
from jpq.trials.samplers import LIMITS, record_limits
from jpq.trials.settings import Study
from jpq.trials.space import Space
from jpq.trials.storage import WORKER, is_disk_error, record_worker
from jpq.types import JpqError


class TrialFailed(JpqError):
    """Failure of a single trial; the study goes on."""


class StudyObserver(TrainingObserver, Protocol):
    """Observer of a study: of every trial, and of the training inside it."""

    def trial(self, number: int) -> None:
        """Receive the start of a trial."""

    def tally(self, study: optuna.Study) -> None:
        """Receive the end of a trial of this or another worker."""


class NullStudyObserver(NullObserver):
    """A `StudyObserver` that does nothing."""

    def trial(self, number: int) -> None:
        """Ignore it."""

    def tally(self, study: optuna.Study) -> None:
        """Ignore it."""


@dataclass
class TrialRunner:
    """Objective function for Optuna: runs one trial, and returns the objectives' values in the units of `UNITS`."""

    study: Study
    config: Config  # shared by all trials; names the float weights
    space: Space
    preview: Preview
    folder: Path
    observer: StudyObserver
    limits: Costs = field(init=False)

    def __post_init__(self) -> None:
        self.limits = self.preview.limits(self.study.limits())

    def check_limits_reachable(self) -> None:
        """Raises JpqError for a limit that even the smallest decisions break."""
        if not (self.limits and self.study.is_manual()):
            return
        least = self.preview.preview_costs(self.space.smallest_config()).costs
        for cost, limit in self.limits.items():
            if least[cost] > limit:
                name, unit = UNITS[cost]
                raise JpqError(
                    f"--max-{cost} {self.study.limits()[cost]} cannot be met: the smallest that trials may decide on "
                    f"has {name} {least[cost] * unit:.4g}. Raise it, or allow fewer bits (--w-bits, --a-bits) or less "
                    "density (--density-range)."
                )

    def __call__(self, trial: Trial) -> list[float]:
        """Values of the objectives. Raises TrialPruned for a trial that is not trained, TrialFailed where it fails.

        A trial that was interrupted, or that this machine has no disk space for, is queued again.
        """
        record_worker(trial)
        self.observer.trial(trial.number)
        other_trials = [t for t in trial.study.get_trials(deepcopy=False) if t.number != trial.number]
        ahead = sum(is_counted(t) or (t.state == TrialState.RUNNING and t.number < trial.number) for t in other_trials)
        if ahead >= self.study.trials:  # two workers saw one place left
            if decisions_of(trial):
                queue_again(trial)
            self._prune(trial, SURPLUS, True)
        try:
            config = self.space.suggest(trial)
            config = replace(config, run=replace(config.run, out=self.folder / "trials", name="", resume=False)).check()
            return self._values(trial, config, other_trials)
        except (KeyboardInterrupt, OSError):
            queue_again(trial)
            raise
        except (JpqError, RuntimeError) as error:  # RuntimeError: torch's, such as too little memory
            if isinstance(error, JpqError) and is_disk_error(error):
                queue_again(trial)
                raise
            reason = error.command_line if isinstance(error, JpqError) else str(error)
            trial.set_user_attr(REASON, " ".join(reason.split())[:500])
            raise TrialFailed(reason) from error

    def _values(self, trial: Trial, config: Config, other_trials: Sequence[FrozenTrial]) -> list[float]:
        """Values of a trial with these decisions: those of an equal trial, or of a run."""
        d = config.decide
        costs: Costs | None = None
        name = replace(config, task=replace(config.task, weights=None)).hash()  # not where this machine has them
        if self.study.is_manual():
            preview = self.preview.preview_costs(config)
            costs, name = preview.costs, preview.name
        else:
            compose_method(d.method, d.structure, d.width, d.score, d.schedule, d.classes)
            check_allocator(d.method, d.allocator)
        trial.set_user_attr(DECISIONS, name)
        equal = self._equal_trial(name, trial, other_trials)
        if equal is not None:
            return self._repeat_values(trial, equal)
        if costs is not None:
            self._apply_limits(trial, costs)
        return self._run(trial, config, costs)

    def _run(self, trial: Trial, config: Config, costs: Costs | None) -> list[float]:
        """Run `optimize`, from its checkpoint where there is one, and record the result."""
        run = config.folder()
        resumed = replace(config, run=replace(config.run, resume=(run / checkpoint.NAME).is_file()))
        observer = EarlyStoppingObserver(trial, self.study, self.observer, costs)
        try:
            result = optimize(resumed, observer, final=False)
        except optuna.TrialPruned:
            if not (run / "result.json").exists():
                shutil.rmtree(run, ignore_errors=True)
            raise
        if self.study.pictures:
            run_folder.draw_run(result, resumed)
            upload_pictures(trial, result.folder, self.folder / "artifacts")
        return self._record_result(trial, result)

    def _equal_trial(self, name: str, trial: Trial, other_trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
        """An earlier trial of the same decisions that has ended, or is still running."""
        same = [t for t in other_trials if t.user_attrs.get(DECISIONS) == name and SAME not in t.user_attrs]
        ended = [t for t in same if is_counted(t) or RULED_OUT in t.user_attrs]
        running = [t for t in same if t.state == TrialState.RUNNING and t.number < trial.number]
        return next(iter([*ended, *running]), None)

    def _repeat_values(self, trial: Trial, equal: FrozenTrial) -> list[float]:
        """The values of an equal trial, reported once more without training."""
        record_limits(trial, equal.user_attrs.get(LIMITS, {}))
        for key, value in equal.user_attrs.items():
            if key not in (AGAIN, SAME, REASON, STOPPED, WORKER):
                trial.set_user_attr(key, value)
        if equal.values is None or equal.state != TrialState.COMPLETE:
            self._prune(trial, SAME, equal.number)
        trial.set_user_attr(SAME, equal.number)
        return list(equal.values)

    def _prune(self, trial: Trial, attribute: str, value: Any) -> None:
        """End a trial before it trains; the attribute says why."""
        trial.set_user_attr(attribute, value)
        raise optuna.TrialPruned(f"{attribute}: {value}")

    def _apply_limits(self, trial: Trial, costs: Costs) -> None:
        """Tell the sampler how far the costs lie from the limits, and end a trial that breaks one.

        The Gaussian process learns limits from finished trials alone, so it gets them trained.
        """
        record_limits(trial, {cost: costs[cost] / limit - 1 for cost, limit in self.limits.items()})
        over = [cost for cost, limit in self.limits.items() if costs[cost] > limit]
        if over and self.study.sampler != "gp":
            text = ", ".join(f"{UNITS[c][0]}: {costs[c] * UNITS[c][1]:.4g}" for c in over)
            self._prune(trial, RULED_OUT, text)

    def _record_result(self, trial: Trial, result: Result) -> list[float]:
        """Record a finished run in the study; returns the objectives' values."""
        now = result.compressed
        costs: Costs = {"bops": now.bops_share, "size": float(now.size_bytes), "macs": now.macs / result.float.macs}
        if now.latency_ms is not None:
            costs["latency"] = now.latency_ms
        if not self.study.is_manual():
            record_limits(trial, {cost: costs[cost] / limit - 1 for cost, limit in self.limits.items()})
        accuracy = result.held_out["compressed"]
        attrs = {
            "run_folder": str(result.folder.relative_to(self.folder)),
            "method": result.method,
            "layers": {row.name: describe_layer(row) for row in result.layers},
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
        values = {"accuracy": accuracy, **costs}
        return [values[name] * objective_unit(name, result.task)[1] for name in self.study.objective_names()]


def decisions_of(trial: Trial) -> dict[str, Any]:
    """Parameters that a trial has suggested so far, and those that it was queued with."""
    queued = trial.storage.get_trial_system_attrs(trial._trial_id).get("fixed_params", {})
    return {**queued, **trial.params}


def queue_again(trial: Trial) -> None:
    """Queue a trial with its decisions and its curve, for this worker or another."""
    kept = {key: value for key, value in trial.user_attrs.items() if key == CURVE}
    trial.study.enqueue_trial(decisions_of(trial), user_attrs={**kept, AGAIN: trial.number})


def describe_layer(row: LayerRecord) -> str:
    """Decisions of one layer in a text: `W4 A3, 24/32 channels`."""
    kept = f", {row.outputs}/{row.outputs_all} channels" if row.outputs_all > row.outputs else ""
    mask = f", density {row.density:.2f} ({row.structure})" if row.density < 1 else ""
    return f"W{row.w_bits} A{row.a_bits}{kept}{mask}"


def upload_pictures(owner: Trial | optuna.Study, folder: Path, store: Path) -> None:
    """Store the pictures of a folder as artifacts of a trial or study, for optuna-dashboard."""
    store.mkdir(exist_ok=True)
    with warnings.catch_warnings():  # Optuna calls artifacts experimental
        warnings.simplefilter("ignore")
        for picture in sorted(folder.glob("*.png")):
            upload_artifact(
                artifact_store=FileSystemArtifactStore(str(store)), file_path=str(picture), study_or_trial=owner
            )
