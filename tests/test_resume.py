"""A run that is stopped anywhere, by force or politely, and resumed gives the same bits as one that never stopped."""

from __future__ import annotations

import os
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
import kills
from kills import MOMENTS, again

import jpq
from jpq import checkpoint
from jpq.config import Config
from jpq.methods import METHODS
from jpq.result import Row, Silent

STEPS = 9  # optimiser steps of an epoch of kills.tiny
FAST = ("djpq", "admm", "dais")


class Killed(BaseException):
    """Nothing in the library may catch it: what is on the disk by then is all that is left, as after kill -9."""


class After(Silent):
    """Raises something, or does something, after so many steps of a phase."""

    def __init__(self, phase: str, steps: int, error: type[BaseException] | None = None, number: int = 0) -> None:
        self.at, self.error, self.number = (phase, steps), error, number
        self.name, self.done, self.steps = "", 0, 0
        self.epochs: list[tuple[str, int]] = []

    def phase(self, name: str, epochs: int, steps: int) -> None:
        self.name, self.done, self.steps = name, 0, steps

    def step(self, loss: float, bops_share: float, aim_share: float) -> None:
        self.done += 1
        if (self.name, self.done) == self.at:
            if self.number:
                os.kill(os.getpid(), self.number)
            if self.error:
                raise self.error

    def epoch(self, row: Row) -> None:
        self.epochs.append((row.phase, row.epoch))


def told(folder: Path) -> tuple[object, ...]:
    """Everything that two runs must agree on: plan, weights, packed and exported model, history but its seconds."""
    lines = (folder / "history.csv").read_text().splitlines()
    names = ("plan.json", "model.safetensors", "model.packed", "model.onnx", "layers.csv")
    files = [(folder / name).read_bytes() for name in names if (folder / name).is_file()]
    return [line.rpartition(",")[0] for line in lines], files


def folder_of(asked: Config) -> Path:
    return asked.run.out / asked.hash()


@pytest.mark.parametrize("method", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_every_method_resumes_in_the_midst_of_an_epoch(method: str, tmp_path: Path) -> None:
    def asked(out: str, every: int = 0) -> Config:
        tiny = kills.tiny(tmp_path / out, every=every)
        return replace(tiny, decide=replace(tiny.decide, method=method, density=0.6))

    whole, stopped = asked("whole"), asked("stopped", 4)
    rows = jpq.optimize(whole, final=False).history
    searches = any(row.phase == "search" for row in rows)
    if searches:  # killed six steps into the second epoch: what is left is the checkpoint of its fourth step
        with pytest.raises(Killed):
            jpq.optimize(stopped, After("search", STEPS + 6, Killed), final=False)
        saved = torch.load(folder_of(stopped) / checkpoint.NAME)
        assert (saved["phase"], saved["done"], len(saved["losses"])) == ("search", 1, 4)
    with pytest.raises(KeyboardInterrupt):  # and stopped politely: saved at this very step
        jpq.optimize(again(stopped) if searches else stopped, After("fine-tune", 3, KeyboardInterrupt), final=False)
    saved = torch.load(folder_of(stopped) / checkpoint.NAME)
    assert (saved["phase"], saved["done"], len(saved["losses"])) == ("fine-tune", 0, 3)
    jpq.optimize(again(stopped), final=False)
    assert told(folder_of(stopped)) == told(folder_of(whole))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    asked = kills.tiny(tmp_path_factory.mktemp("whole"))
    assert kills.child(asked).exitcode == 0
    return folder_of(asked)


def random_kills(count: int) -> list[tuple[str, int]]:
    """Every moment at least once, at a random one of its occurrences; then any."""
    draw = random.Random(0)
    moments = [*MOMENTS, *draw.choices(list(MOMENTS), k=count - len(MOMENTS))]
    return [(moment, draw.randint(1, MOMENTS[moment])) for moment in moments]


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "n"), random_kills(20))
def test_kill_9_loses_nothing_but_time(moment: str, n: int, whole: Path, tmp_path: Path) -> None:
    asked = kills.tiny(tmp_path, every=n % 2 and 4)
    assert kills.child(asked, moment, n).exitcode == -signal.SIGKILL
    assert kills.child(again(asked)).exitcode == 0
    assert told(folder_of(asked)) == told(whole)
    assert {p.name for p in folder_of(asked).iterdir()} == {p.name for p in whole.iterdir()}, "nothing is left over"


@pytest.mark.slow
def test_killed_again_and_again(whole: Path, tmp_path: Path) -> None:
    asked, draw, killed = kills.tiny(tmp_path, every=3), random.Random(1), 0
    process = kills.child(asked, seconds=draw.uniform(0.5, 1.5))
    while process.exitcode == -signal.SIGKILL:
        killed += 1
        assert killed < 30, "every run comes further than the last"
        process = kills.child(again(asked), seconds=draw.uniform(1.0, 2.0) + 0.1 * killed)
    assert process.exitcode == 0
    assert killed >= 2
    assert told(folder_of(asked)) == told(whole)
