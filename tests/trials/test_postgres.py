"""A study of several workers on a real PostgreSQL, which the test starts where Debian's package is installed."""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from study_workers import kill, said, training, until, worker

from jpq.trials.attributes import is_counted

MISSING = "PostgreSQL's server is not installed (Debian: apt-get install postgresql)"


def binaries() -> Path | None:
    """Where initdb and pg_ctl lie; the newest of Debian's versions."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = [*map(str, reversed(debian)), shutil.which("initdb")]
    return next((Path(name).resolve().parent for name in found if name), None)


@pytest.fixture(scope="module")
def server():
    """The address of a database on a fresh server of its own; as root, it runs as an unprivileged user."""
    pytest.importorskip("psycopg", reason="the driver is not installed: python -m pip install 'jpq[postgres]'")
    where = binaries()
    if where is None:
        pytest.skip(MISSING)
    user = getpass.getuser()
    if os.geteuid() == 0:
        user = next((name for name in ("postgres", "nobody") if any(p.pw_name == name for p in pwd.getpwall())), "")
        if not user:
            pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres or nobody")
    own = {"user": user} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # short: the path of a socket has at most 107 bytes
        folder = Path(name)
        if own:
            shutil.chown(folder, user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        rest = {"check": True, "cwd": folder, "stdout": subprocess.DEVNULL, **own}
        subprocess.run([where / "initdb", "-D", folder / "data", "-A", "trust", "-U", "jpq", "-N"], **rest)
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        control = [where / "pg_ctl", "-D", folder / "data", "-w", "-l", folder / "log"]
        subprocess.run([*control, "-o", options, "start"], **rest)
        try:
            yield f"postgresql+psycopg://jpq@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **rest)


@pytest.mark.slow
def test_two_workers_on_postgresql_and_one_is_killed(tmp_path, server):
    flags = ["--trials", "8", "--storage", server]
    first, second = worker(tmp_path, *flags), worker(tmp_path, *flags)
    load = lambda: optuna.load_study(study_name="study", storage=RDBStorage(server)).trials  # noqa: E731
    until(lambda: training(tmp_path, 2), "a trial after the second")
    until(lambda: sum(t.state == TrialState.RUNNING for t in load()) == 2 and training(tmp_path, 2), "both at work")
    before = {t.number: t.values for t in load() if t.state == TrialState.COMPLETE}
    kill(first)
    assert second.wait(timeout=300) == 0, said(tmp_path)
    trials = load()
    assert sum(map(is_counted, trials)) == 8
    assert not [t for t in trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]
    assert all(trials[number].values == values for number, values in before.items())
    lost = [t for t in trials if t.state == TrialState.FAIL]
    again = [t for t in trials if "retry_history" in t.system_attrs]
    assert [t.params for t in again] == [t.params for t in lost]
    assert all(t.state == TrialState.COMPLETE for t in again)
    assert len(lost) == 1, "the killed worker was in the middle of a trial"
