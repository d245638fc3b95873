"""Runs in child processes that are killed (SIGKILL) at a given moment: for faults.py and for tests/test_resume.py."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from collections import Counter
from dataclasses import replace
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import jpq
from jpq.compression import discretize
from jpq.config import Budget, Config, Run, Task, Train
from jpq.files import atomic
from jpq.results import finish, plots
from jpq.training import checkpoint, phases
from jpq.training.history import NullObserver

HERE = (Path(__file__).parent, Path(__file__).parents[1])
MOMENTS = {  # how often a tiny run comes there: see `tiny`
    "float step": 9,
    "search step": 18,
    "fine-tune step": 18,
    "checkpoint half written": 5,
    "checkpoint not renamed": 5,
    "checkpoint just renamed": 5,
    "landing": 1,
    "BatchNorm's statistics": 1,
    "weights to be written": 2,
    "packing": 1,
    "export": 1,
    "verification": 1,
    "report": 1,
    "all written": 1,
}


def tiny(out: Path, seed: int = 0, every: int = 0) -> Config:
    """A run of two seconds: 150 digits, 9 steps an epoch; one epoch of float training, two search, two fine-tune."""
    return Config(
        task=Task(limit=150),
        budget=Budget(target_bops="5%"),
        train=Train(epochs=4, float_epochs=1, batch_size=16, lr=3e-3),
        run=Run(seed=seed, device="cpu", threads=1, out=out, checkpoint_every=every),
    )


def again(config: Config) -> Config:
    """The same run, to be gone on with."""
    return replace(config, run=replace(config.run, resume=True))


class Steps(NullObserver):
    """Tells of every step of a phase."""

    def __init__(self, killer: Killer) -> None:
        self.killer, self.name = killer, ""

    def phase(self, name: str, epochs: int, steps: int) -> None:
        self.name = name

    def step(self, loss: float, bops_share: float, aim_share: float) -> None:
        self.killer(f"{self.name} step")


class Killer:
    """Kills this process when a moment comes for the n-th time."""

    def __init__(self, moment: str, n: int) -> None:
        self.at, self.seen = (moment, n), Counter()

    def __call__(self, moment: str) -> None:
        self.seen[moment] += 1
        if (moment, self.seen[moment]) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, owner: object, name: str, moment: str) -> None:
        """Let a function tell of the moment before it is called."""
        plain = getattr(owner, name)

        def told(*args: object, **kwargs: object) -> object:
            self(moment)
            return plain(*args, **kwargs)

        setattr(owner, name, told)

    def after(self, owner: object, name: str, moment: str) -> None:
        """Let a function tell of the moment after it has returned."""
        plain = getattr(owner, name)

        def told(*args: object, **kwargs: object) -> object:
            done = plain(*args, **kwargs)
            self(moment)
            return done

        setattr(owner, name, told)

    def watch_renames(self) -> None:
        """Tell of the moments in which a checkpoint is put in its place."""
        plain = os.replace

        def told(part: Path, path: Path) -> None:
            ours = Path(path).name == checkpoint.NAME
            if ours and self.at == ("checkpoint half written", self.seen["checkpoint half written"] + 1):
                os.truncate(part, os.path.getsize(part) // 2)
            if ours:
                self("checkpoint half written")
                self("checkpoint not renamed")
            plain(part, path)
            if ours:
                self("checkpoint just renamed")

        atomic.os.replace = told  # type: ignore[assignment]


def run(config: Config, moment: str = "", n: int = 0) -> None:
    """One run of `jpq optimize`, killed when it comes to `moment` for the n-th time."""
    kill = Killer(moment, n)
    kill.watch_renames()
    kill.before(discretize, "land", "landing")
    kill.before(phases, "reestimate", "BatchNorm's statistics")
    kill.before(checkpoint, "save_tensors", "weights to be written")
    kill.before(finish, "pack", "packing")
    kill.before(finish.onnx, "export", "export")
    kill.before(finish.verify, "verify", "verification")
    kill.before(plots, "write", "report")
    kill.after(plots, "write", "all written")
    jpq.optimize(config, Steps(kill))


class Remover(NullObserver):
    """Removes the run's folder in the second epoch of its search."""

    def __init__(self, config: Config) -> None:
        self.folder, self.name, self.done = config.run.out / config.hash(), "", 0

    def phase(self, name: str, epochs: int, steps: int) -> None:
        self.name, self.done = name, 0

    def step(self, loss: float, bops_share: float, aim_share: float) -> None:
        self.done += 1
        if (self.name, self.done) == ("search", 11):
            shutil.rmtree(self.folder)


def removing(config: Config) -> None:
    """One run whose folder is removed meanwhile; its sentence goes to a file beside the folder of runs."""
    try:
        jpq.optimize(config, Remover(config))
    except jpq.JpqError as error:
        (config.run.out.parent / "said").write_text(str(error))
        sys.exit(2)


def context() -> multiprocessing.context.ForkServerContext:
    """Children of a process that has imported everything, and done nothing else."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload([__name__])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, HERE), *([before] if before else [])])  # for the preload
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    return made


def child(config: Config, moment: str = "", n: int = 0, seconds: float | None = None) -> BaseProcess:
    """A finished child: killed at a moment, after so many seconds, or at its end."""
    process = context().Process(target=run, args=(config, moment, n))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process
