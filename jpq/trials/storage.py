"""Storages of a study: Optuna's own, with heartbeats, so that the trial of a dead worker is found.

Optuna's relational storages record heartbeats. Its journal file does not, so `HeartbeatJournalStorage` keeps a file per
running trial beside it, touched by the same thread of Optuna's that would write to the database; whoever starts a
trial first fails those whose file is too old, and queues them again. The journal itself holds nothing of ours.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from jpq.trials.attributes import AGAIN
from jpq.types import JpqError

WORKER = "worker"  # user attribute of a trial: host and process

RETRIES = 3  # how often a trial is queued again after its worker died

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}  # full, over quota, read-only, broken

TrialCallback = Callable[[optuna.Study, FrozenTrial], None]


class HeartbeatJournalStorage(JournalStorage, BaseHeartbeat):
    """Optuna's journal file, with heartbeats: the time stamp of `folder/<id of the trial>`.

    Args:
        file: the journal.
        folder: of the heartbeats; on the same file system, whose clock then serves all machines.
        interval: seconds between heartbeats.
        grace: seconds without a heartbeat after which a trial is dead.
        on_dead: called for a dead trial.
    """

    def __init__(self, file: Path, folder: Path, interval: int, grace: int, on_dead: TrialCallback) -> None:
        super().__init__(JournalFileBackend(str(file)))
        self.folder, self.interval, self.grace, self.on_dead = folder, interval, grace, on_dead
        folder.mkdir(exist_ok=True)

    def record_heartbeat(self, trial_id: int) -> None:
        """Record that a trial is alive."""
        (self.folder / str(trial_id)).touch()

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        clock = self.folder / "now"
        clock.touch()
        now, stale = clock.stat().st_mtime, _never_begun(self, study_id, self.grace)
        for trial in self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,)):
            beat = self.folder / str(trial._trial_id)
            if beat.exists() and now - beat.stat().st_mtime > self.grace:
                stale.append(trial._trial_id)
        return stale

    def get_heartbeat_interval(self) -> int:
        """Seconds between heartbeats."""
        return self.interval

    def get_heartbeat_stale_trial_callback(self) -> TrialCallback:
        """The function that is called for a dead trial."""
        return self.on_dead

    def get_failed_trial_callback(self) -> TrialCallback:
        """`get_heartbeat_stale_trial_callback`, as Optuna before 4.9 names it."""
        return self.on_dead


class HeartbeatDatabaseStorage(RDBStorage):
    """Optuna's relational storage that also finds workers which died before their first heartbeat."""

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        grace = self.grace_period or 0
        return [*super()._get_stale_trial_ids(study_id), *_never_begun(self, study_id, grace)]


def _never_begun(storage: BaseStorage, study_id: int, grace: int) -> list[int]:
    """Trials that were taken `grace` seconds ago and have no worker yet (`record_worker`)."""
    running = storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
    limit = datetime.now() - timedelta(seconds=grace)
    return [
        t._trial_id for t in running if WORKER not in t.user_attrs and t.datetime_start and t.datetime_start < limit
    ]


def requeue(study: optuna.Study, dead: FrozenTrial) -> None:
    """Queue the trial of a dead worker once more with its decisions, at most `RETRIES` times."""
    history = [*dead.system_attrs.get("retry_history", []), dead.number]
    if len(history) <= RETRIES:
        study.add_trial(
            optuna.create_trial(
                state=TrialState.WAITING,
                params=dead.params,
                distributions=dead.distributions,
                user_attrs={**{k: v for k, v in dead.user_attrs.items() if k != WORKER}, AGAIN: dead.number},
                system_attrs={**dead.system_attrs, "failed_trial": history[0], "retry_history": history},
            )
        )


def record_worker(trial: optuna.Trial) -> None:
    """Record the first heartbeat of a trial, then its worker: a trial with a worker has had a heartbeat."""
    storage = trial.storage
    if isinstance(storage, BaseHeartbeat):
        storage.record_heartbeat(trial._trial_id)
    trial.set_user_attr(WORKER, f"{socket.gethostname()} {os.getpid()}")


def open_storage(url: str, folder: Path, dead_after: int) -> BaseStorage:
    """The storage at `url`, or the journal in the study's folder where none is named.

    Raises JpqError for addresses that cannot be read, missing drivers, and servers that do not answer.
    """
    interval = max(1, dead_after // 4)
    if not url:
        return HeartbeatJournalStorage(folder / "journal.log", folder / "heartbeats", interval, dead_after, requeue)
    import sqlalchemy

    shown_url = without_password(url)
    new = hasattr(optuna.storages, "RetryHeartbeatStaleTrialCallback")  # since Optuna 4.9
    callback = "heartbeat_stale_trial_callback" if new else "failed_trial_callback"
    settings: dict[str, Any] = {"heartbeat_interval": interval, "grace_period": dead_after, callback: requeue}
    for attempt in range(3):  # two workers may create the tables at the same moment
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return HeartbeatDatabaseStorage(url, **settings)
        except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
            raise JpqError(_missing_driver(shown_url, error)) from error
        except sqlalchemy.exc.ArgumentError as error:
            raise JpqError(
                f"--storage {shown_url} is not the address of a database. Write it like sqlite:///study.db or "
                "postgresql+psycopg://user@host/database, or leave it out for a journal file."
            ) from error
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            if attempt == 2:
                cause = " ".join(str(getattr(error, "orig", None) or error.__cause__ or error).split())
                raise JpqError(f"--storage {shown_url} does not answer: {cause[:200]}") from error
            time.sleep(0.3 * (attempt + 1))
    raise AssertionError("unreachable")


def is_disk_error(error: BaseException | None) -> bool:
    """Whether an error, or its cause, is a disk that is full, broken or read-only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return True
        error = error.__cause__ or error.__context__
    return False


def without_password(url: str) -> str:
    """The address of a database as it may be shown: its password as ***."""
    return re.sub(r"([?&]password=)[^&#]*", r"\1***", re.sub(r"(://[^/@:]*):.*@", r"\1:***@", url))


def stored_url(url: str) -> str:
    """The address of a database as it may be saved: without password, an SQLite file as an absolute path."""
    if not url:
        return url
    from sqlalchemy import URL, make_url

    u = make_url(url)  # its set(password=None) would keep the password
    query = u.difference_update_query(["password"]).query
    bare = URL.create(u.drivername, u.username, None, u.host, u.port, u.database, query)
    file = bare.database or ""
    if bare.get_backend_name() == "sqlite" and file not in ("", ":memory:") and not file.startswith("file:"):
        bare = bare.set(database=str(Path(file).resolve()))
    return bare.render_as_string(hide_password=False)


def _missing_driver(shown_url: str, error: BaseException) -> str:
    """Error message for a database driver that is not installed."""
    if shown_url.startswith(("postgresql", "postgres")):
        remedy = (
            "Install it with: python -m pip install 'jpq[postgres]', and write postgresql+psycopg://user@host/database"
        )
    else:
        remedy = (
            "Use sqlite:///FILE, postgresql+psycopg://user@host/database, or leave --storage out for a journal file"
        )
    return f"--storage {shown_url}: its driver is not installed ({' '.join(str(error).split())[:120]}). {remedy}."
