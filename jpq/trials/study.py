"""`jpq.study`: a study over `jpq.optimize`, from the shared float weights to the last trial, beside other workers."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import fail_stale_trials
from optuna.study import StudyDirection
from optuna.trial import TrialState

from jpq.config import Config
from jpq.results.front import front, plots
from jpq.results.front.points import read
from jpq.tasks import task_record
from jpq.trials.preview import Preview, float_weights
from jpq.trials.samplers import sampler
from jpq.trials.settings import CHANCE, STUDY_FILE, WEIGHTS, Study, agree, begun, note, require_own, write_study
from jpq.trials.space import Space, require_names
from jpq.trials.status import FULL, fits
from jpq.trials.storage import alone, open_storage, without_password
from jpq.trials.trial import (
    REASON,
    SAME,
    Failed,
    NullStudyObserver,
    OneTrial,
    StudyObserver,
    counts,
    keep_pictures,
    objective_unit,
)
from jpq.trials.trial import RULED_OUT as BROKEN
from jpq.types import JpqError

T = TypeVar("T")

DRAWN = "drawn"  # user attribute of the study: how many trials its pictures show

POLL = 1.0  # seconds between looks at the trials of other workers

REPEATS = 25  # in a row: the space is used up

RULED_OUT = 250  # in a row: hardly any decisions keep the limits


@dataclass(frozen=True)
class Tally:
    """How many trials there are of each kind."""

    done: int  # that count
    running: int
    waiting: int
    repeats: int  # trials that repeat others since the last one that counts
    ruled_out: int  # and those that a limit ruled out

    @classmethod
    def of(cls, shared: optuna.Study) -> Tally:
        """Of a study as it stands."""
        trials = shared.get_trials(deepcopy=False)
        states = [t.state for t in trials]
        last = max((i for i, t in enumerate(trials) if counts(t)), default=-1)
        since = [t.user_attrs for t in trials[last + 1 :]]
        return cls(
            sum(map(counts, trials)),
            states.count(TrialState.RUNNING),
            states.count(TrialState.WAITING),
            sum(SAME in attrs for attrs in since),
            sum(BROKEN in attrs for attrs in since),
        )


def study(
    config: Config | None = None, settings: Study | None = None, watch: StudyObserver | None = None
) -> optuna.Study:
    """Run trials until the study has as many as were asked for, and return it; call it again to go on.

    Args:
        config: the task and how each trial trains; its decisions are the trials'. The study's folder is OUT/NAME.
        settings: what varies, and what is wanted.
        watch: hears of every trial and epoch.

    Raises JpqError for settings that cannot work, for a study of other settings under the same name, and where every
    trial failed.
    """
    settings, config, watch = settings or Study(), config or Config(), watch or NullStudyObserver()
    require_names(settings.check(config))
    folder = config.run.out / settings.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JpqError(f"Cannot write to {folder}: {error.strerror}. Choose another folder with --out.") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("optuna").setLevel(logging.CRITICAL)  # failed trials: their reasons are kept in the study
    with alone(folder):
        storage = open_storage(settings.storage, folder, settings.dead_after)
        weights, digest = float_weights(config, folder / "float.safetensors", watch)
    started = replace(config, task=replace(config.task, weights=weights.resolve()))  # --out may be spelled otherwise
    preview = Preview(started)
    space = Space.of(settings, started, preview.network, preview.sites)
    one = OneTrial(settings, started, space, preview, folder, watch)
    one.require_possible()
    with alone(folder):
        shared = _created(settings, space, config, digest, preview, storage)
        if not (folder / STUDY_FILE).exists():
            write_study(config, settings, folder / STUDY_FILE)
    try:
        _work(shared, one, settings, watch)
    except StorageInternalError as error:
        where = without_password(settings.storage) or "the study's journal"
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise JpqError(
            f"{where} does not answer any more ({cause}). Start this worker again when it does: what was "
            "finished is kept, and its last trial will be run again."
        ) from error
    with alone(folder):
        _draw(shared, settings, folder)
    failed = [t for t in shared.get_trials(deepcopy=False) if t.state == TrialState.FAIL and REASON in t.user_attrs]
    if failed and len(failed) == Tally.of(shared).done:
        raise JpqError(
            f"Every trial of study '{settings.name}' failed ({len(failed)}). The last one: "
            f"{failed[-1].user_attrs[REASON]}"
        )
    return shared


def _created(
    settings: Study, space: Space, config: Config, digest: str, preview: Preview, storage: optuna.storages.BaseStorage
) -> optuna.Study:
    """The study in its storage; made, with its anchors queued, by the first worker."""
    asked = settings.asked()
    directions = [StudyDirection.MAXIMIZE if n == "accuracy" else StudyDirection.MINIMIZE for n in asked]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shared = optuna.create_study(
            storage=storage,
            study_name=settings.name,
            load_if_exists=True,
            sampler=sampler(settings, config.run.seed),
            directions=directions,
        )
        require_own(shared, directions)
        if not begun(shared):  # also where the first worker was killed on its way through here
            shared.set_user_attr(WEIGHTS, digest)
            for key, value in task_record(preview.task).items():
                shared.set_user_attr(key, value)
            shared.set_user_attr(CHANCE, preview.task.chance(preview.classes))
            shared.set_user_attr(FULL, preview.full)
            shared.set_metric_names([objective_unit(name, preview.task)[0] for name in asked])
            for values in space.anchors():
                shared.enqueue_trial(values, skip_if_exists=True)
            if not begun(shared):
                note(config, settings, shared)
        agree(config, settings, digest, shared)  # with whoever noted them last
    return shared


def _work(shared: optuna.Study, one: OneTrial, settings: Study, watch: StudyObserver) -> None:
    """Run trials until enough have ended, over all workers."""
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fail_stale_trials(shared)
        now = Tally.of(shared)
        watch.tally(shared)
        if now.done >= settings.trials or now.repeats >= REPEATS or now.ruled_out >= RULED_OUT:
            return
        if now.done + now.running >= settings.trials:
            time.sleep(POLL)  # others are at the last ones; one may die, is then failed above, and leaves its place
            continue
        _quietly(lambda: shared.optimize(one, n_trials=1, catch=(Failed,)))


def _draw(shared: optuna.Study, settings: Study, folder: Path) -> None:
    """The front of the runs in this folder that keep to the limits, as pareto.csv, pareto.png and layers.png."""
    done = Tally.of(shared).done
    drawn = shared.user_attrs.get(DRAWN) == done and (folder / "pareto.csv").exists()
    if drawn or not any(folder.glob("trials/*/result.json")):
        return
    costs = [name for name in settings.asked() if name != "accuracy"][: front.MOST]
    over = {t.user_attrs.get("run_folder") for t in shared.get_trials(deepcopy=False) if not fits(t)}
    points = [p for p in read(folder).points if p.folder and f"trials/{p.folder.name}" not in over]
    if not points:
        return
    plots.write_front_files(front.make(points, costs), folder)
    keep_pictures(shared, folder, folder / "artifacts")
    shared.set_user_attr(DRAWN, done)


def _quietly(run: Callable[[], T]) -> T | None:
    """Run a trial; None where another worker took this one for dead meanwhile and ended it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return run()
    except UpdateFinishedTrialError:
        return None
    except ValueError as error:
        if "Cannot tell" not in str(error):
            raise
        return None
