"""`study()`: a hyper-parameter study over `optimize` with Optuna, shared by any number of workers."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import fail_stale_trials
from optuna.trial import TrialState

from jpq.config import Config, expand_homes
from jpq.files.lock import exclusive
from jpq.files.model_files import tokenizer_checksum
from jpq.recipe import check_sensitivity
from jpq.results.accuracy_limit import check_limit, read_limit
from jpq.results.front import front, plots
from jpq.results.front.points import read_points
from jpq.tasks import task_record
from jpq.training.environment import restored_threads
from jpq.trials.attributes import REASON, RULED_OUT, SAME, is_counted
from jpq.trials.objectives import objective_direction, objective_unit
from jpq.trials.preview import Preview, prepare_float_weights, tidy_refusal
from jpq.trials.samplers import build_sampler
from jpq.trials.settings import (
    CHANCE,
    STUDY_FILE,
    TOKENIZER,
    WEIGHTS,
    Study,
    check_agreement,
    check_directions,
    check_is_ours,
    is_recorded,
    record_settings,
    with_absolute_paths,
    write_study,
)
from jpq.trials.space import Space, check_names
from jpq.trials.status import FULL, meets_limits
from jpq.trials.storage import open_storage, without_password
from jpq.trials.trial import NullStudyObserver, StudyObserver, TrialFailed, TrialRunner, upload_pictures
from jpq.types import JpqError

DRAWN = "drawn"  # user attribute of the study: counted trials that its pictures show

POLL = 1.0  # seconds between two polls of the other workers' trials

MAX_REPEATS = 25  # repeated trials in a row, after which the space is used up

MAX_RULED_OUT = 250  # ruled-out trials in a row, after which hardly any decisions keep the limits


@dataclass(frozen=True)
class TrialCounts:
    """Numbers of trials by kind."""

    done: int  # trained, or failed by themselves
    running: int
    waiting: int
    repeats: int  # since the last one that is done
    ruled_out: int  # by a limit, since the last one that is done

    @classmethod
    def of(cls, shared: optuna.Study) -> TrialCounts:
        """Count the trials of a study, over all workers."""
        trials = shared.get_trials(deepcopy=False)
        states = [t.state for t in trials]
        last = max((i for i, t in enumerate(trials) if is_counted(t)), default=-1)
        since = [t.user_attrs for t in trials[last + 1 :]]
        return cls(
            sum(map(is_counted, trials)),
            states.count(TrialState.RUNNING),
            states.count(TrialState.WAITING),
            sum(SAME in attrs for attrs in since),
            sum(RULED_OUT in attrs for attrs in since),
        )


@restored_threads()
def study(
    config: Config | None = None, settings: Study | None = None, observer: StudyObserver | None = None
) -> optuna.Study:
    """Run trials until the study has `settings.trials`, and return it; call it again to go on.

    Args:
        config: the task and how each trial trains; its decisions are the trials'. The study's folder is OUT/NAME.
        settings: what trials vary, objectives and limits.
        observer: receives trials and epochs.

    Raises JpqError for settings that cannot work, for a study of other settings under the same name, and where every
    trial failed.
    """
    settings, observer = settings or Study(), observer or NullStudyObserver()
    asked = expand_homes(config or Config())
    config = asked.without_accuracy_target()  # which chooses among trials, once they ended
    check_names(settings.check(config))
    check_sensitivity(config)
    if asked.budget.has_accuracy_target:
        check_limit(asked)
    folder = config.run.out / settings.name
    started = with_absolute_paths(config)  # which may be spelled otherwise when the study goes on
    with tidy_refusal(folder) as kept:
        runner = None
        if config.task.weights is not None or not kept.exists():  # what cannot work is refused before a folder is made
            runner = _set_up(started, asked, settings, folder, observer)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JpqError(f"Cannot write to {folder}: {error.strerror}. Choose another folder with --out.") from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logging.getLogger("optuna").setLevel(logging.CRITICAL)  # failed trials: their reasons are kept in the study
        with exclusive(folder / "lock"):
            storage = open_storage(settings.storage, folder, settings.dead_after)
            weights, digest = prepare_float_weights(config, kept, observer)
        if runner is None or config.task.weights is None:
            started = replace(started, task=replace(started.task, weights=weights.resolve()))
            runner = _set_up(started, asked, settings, folder, observer)
        with exclusive(folder / "lock"):
            shared = _open_study(settings, runner.space, config, digest, runner.preview, storage)
            if not (folder / STUDY_FILE).exists():
                write_study(config, settings, folder / STUDY_FILE)
    try:
        _run_trials(shared, runner, settings, observer)
    except StorageInternalError as error:
        where = without_password(settings.storage) or "the study's journal"
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise JpqError(
            f"{where} does not answer any more ({cause}). Start this worker again when it does: what was "
            "finished is kept, and its last trial will be run again."
        ) from error
    with exclusive(folder / "lock"):
        _write_front(shared, settings, folder)
    failed = [t for t in shared.get_trials(deepcopy=False) if t.state == TrialState.FAIL and REASON in t.user_attrs]
    if failed and len(failed) == TrialCounts.of(shared).done:
        raise JpqError(
            f"Every trial of study '{settings.name}' failed ({len(failed)}). The last one: "
            f"{failed[-1].user_attrs[REASON]}"
        )
    return shared


def _set_up(started: Config, asked: Config, settings: Study, folder: Path, observer: StudyObserver) -> TrialRunner:
    """What runs the trials. Raises JpqError for settings, limits and tables that cannot work."""
    preview = Preview(started)
    if asked.budget.has_accuracy_target:
        read_limit(asked.budget, preview.task)
    space = Space.of(settings, started, preview.network, preview.prepared.sites)
    runner = TrialRunner(settings, started, space, preview, folder, observer)
    runner.check_limits_reachable()
    preview.check_sensitivity()
    return runner


def _open_study(
    settings: Study, space: Space, config: Config, digest: str, preview: Preview, storage: optuna.storages.BaseStorage
) -> optuna.Study:
    """The study in its storage; the first worker creates it and queues its anchors."""
    objective_names = settings.objective_names()
    directions = [objective_direction(name, preview.task) for name in objective_names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shared = optuna.create_study(
            storage=storage,
            study_name=settings.name,
            load_if_exists=True,
            sampler=build_sampler(settings, config.run.seed),
            directions=directions,
        )
        check_is_ours(shared, directions)
        if not is_recorded(shared):  # also where the first worker was killed on its way through here
            shared.set_user_attr(WEIGHTS, digest)
            shared.set_user_attr(TOKENIZER, tokenizer_checksum(config.task.model))
            for key, value in task_record(preview.task, preview.classes).items():
                shared.set_user_attr(key, value)
            shared.set_user_attr(CHANCE, preview.task.score(preview.task.chance(preview.classes)))
            shared.set_user_attr(FULL, preview.full)
            shared.set_metric_names([objective_unit(name, preview.task)[0] for name in objective_names])
            for values in space.anchors():
                shared.enqueue_trial(values, skip_if_exists=True)
            if not is_recorded(shared):
                record_settings(config, settings, shared)
        check_agreement(config, settings, digest, shared)  # another worker may have recorded its own last
        check_directions(shared, directions)
    return shared


def _run_trials(shared: optuna.Study, runner: TrialRunner, settings: Study, observer: StudyObserver) -> None:
    """Run trials until enough have ended, over all workers."""
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fail_stale_trials(shared)
        now = TrialCounts.of(shared)
        observer.tally(shared)
        if now.done >= settings.trials or now.repeats >= MAX_REPEATS or now.ruled_out >= MAX_RULED_OUT:
            return
        if now.done + now.running >= settings.trials:
            time.sleep(POLL)  # others are at the last ones; one may die, is then failed above, and leaves its place
            continue
        _run_trial(shared, runner)


def _run_trial(shared: optuna.Study, runner: TrialRunner) -> None:
    """Run one trial; another worker may have taken it for dead meanwhile and ended it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            shared.optimize(runner, n_trials=1, catch=(TrialFailed,))
    except UpdateFinishedTrialError:
        return
    except ValueError as error:
        if "Cannot tell" not in str(error):
            raise


def _write_front(shared: optuna.Study, settings: Study, folder: Path) -> None:
    """Write pareto.csv, pareto.png and layers.png of the runs in this folder that keep the limits."""
    done = TrialCounts.of(shared).done
    drawn = shared.user_attrs.get(DRAWN) == done and (folder / "pareto.csv").exists()
    if drawn or not any(folder.glob("trials/*/result.json")):
        return
    costs = [name for name in settings.objective_names() if name != "accuracy"][: front.MAX_COSTS]
    over = {t.user_attrs.get("run_folder") for t in shared.get_trials(deepcopy=False) if not meets_limits(t)}
    points = [p for p in read_points(folder).points if p.folder and f"trials/{p.folder.name}" not in over]
    if not points:
        return
    plots.write_front_files(front.build_front(points, costs), folder)
    upload_pictures(shared, folder, folder / "artifacts")
    shared.set_user_attr(DRAWN, done)
