"""Runs in child processes that are killed (SIGKILL) at a given moment: for faults.py and for tests of resuming."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import jpq
from jpq.compression import reestimate_batchnorm
from jpq.config import Budget, Config, Run, Task, Train
from jpq.export import compare
from jpq.export.packed import pack_model
from jpq.files import save_tensors
from jpq.results import write_run
from jpq.training import NullObserver
from support.wrapping import wrap_function

PATHS = (Path(__file__).parents[1], Path(__file__).parents[2])  # of the studies, of jpq: for a child's imports
CHECKPOINT = "checkpoint.pt"
MOMENTS = {  # how often a run of `tiny_config` comes there
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


def tiny_config(out: Path, seed: int = 0, every: int = 0) -> Config:
    """A run of two seconds: 150 digits, 9 steps an epoch; one epoch of float training, two search, two fine-tune."""
    return Config(
        task=Task(limit=150),
        budget=Budget(target_bops="5%"),
        train=Train(epochs=4, float_epochs=1, batch_size=16, lr=3e-3),
        run=Run(seed=seed, device="cpu", threads=1, out=out, checkpoint_every=every),
    )


def resumed(config: Config) -> Config:
    """The config of a run that goes on from its checkpoint."""
    return replace(config, run=replace(config.run, resume=True))


class StepReporter(NullObserver):
    """Observer that reports every step of a phase as a moment."""

    def __init__(self, killer: Killer) -> None:
        self.killer, self.phase_name = killer, ""

    def phase(self, name: str, epochs: int, steps: int) -> None:
        self.phase_name = name

    def step(self, loss: float, bops_share: float, limit_share: float) -> None:
        self.killer(f"{self.phase_name} step")


class Killer:
    """Kills this process when a moment comes for the n-th time."""

    def __init__(self, moment: str, n: int) -> None:
        self.target, self.counts = (moment, n), Counter[str]()

    def __call__(self, moment: str) -> None:
        self.counts[moment] += 1
        if (moment, self.counts[moment]) == self.target:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, function: Callable[..., object], moment: str) -> None:
        """Report a moment before every call of a function."""
        wrap_function(function, before=partial(self, moment))

    def watch_renames(self) -> None:
        """Report the moments in which a checkpoint is put in its place."""
        rename = os.replace

        def reporting_rename(part: Path, path: Path) -> None:
            is_checkpoint = Path(path).name == CHECKPOINT
            half = "checkpoint half written"
            if is_checkpoint and self.target == (half, self.counts[half] + 1):
                os.truncate(part, os.path.getsize(part) // 2)
            if is_checkpoint:
                self(half)
                self("checkpoint not renamed")
            rename(part, path)
            if is_checkpoint:
                self("checkpoint just renamed")

        os.replace = reporting_rename  # type: ignore[assignment]


def run(config: Config, moment: str = "", n: int = 0) -> None:
    """One run of `jpq.optimize`, killed when it comes to `moment` for the n-th time."""
    optimize, killer = jpq.optimize, Killer(moment, n)  # which imports all that is wrapped below
    killer.watch_renames()
    killer.before(jpq.discretize, "landing")
    killer.before(reestimate_batchnorm, "BatchNorm's statistics")
    killer.before(save_tensors, "weights to be written")
    killer.before(pack_model, "packing")
    killer.before(jpq.export_onnx, "export")
    killer.before(compare, "verification")
    wrap_function(write_run, before=partial(killer, "report"), after=partial(killer, "all written"))
    optimize(config, StepReporter(killer))


class FolderRemover(NullObserver):
    """Observer that removes the run's folder in the second epoch of its search."""

    def __init__(self, config: Config) -> None:
        self.folder, self.phase_name, self.steps = config.run.out / config.hash(), "", 0

    def phase(self, name: str, epochs: int, steps: int) -> None:
        self.phase_name, self.steps = name, 0

    def step(self, loss: float, bops_share: float, limit_share: float) -> None:
        self.steps += 1
        if (self.phase_name, self.steps) == ("search", 11):
            shutil.rmtree(self.folder)


def run_and_remove_folder(config: Config) -> None:
    """One run whose folder is removed meanwhile; its error message goes to the file `said` beside the runs' folder."""
    try:
        jpq.optimize(config, FolderRemover(config))
    except jpq.JpqError as error:
        (config.run.out.parent / "said").write_text(str(error), encoding="utf-8")
        sys.exit(2)


def context() -> multiprocessing.context.ForkServerContext:
    """Children of a server process that has imported everything and done nothing else."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    paths = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, PATHS), *([paths] if paths else [])])  # for the preload
    forkserver.ensure_running()
    if paths is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = paths
    return server


def run_in_child(config: Config, moment: str = "", n: int = 0, seconds: float | None = None) -> BaseProcess:
    """A finished child process: killed at a moment, after so many seconds, or at its end."""
    process = context().Process(target=run, args=(config, moment, n))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process
