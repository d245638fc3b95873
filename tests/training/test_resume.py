"""A run that is stopped anywhere, by force or politely, and resumed gives the same bits as one that never stopped."""

from __future__ import annotations

import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import kills
from support.kills import MOMENTS, resumed
from thinned import thinned

import jpq
from jpq.config import Config
from jpq.files.atomic import replace_file
from jpq.methods.table import METHODS
from jpq.results import run_folder
from jpq.training import checkpoint
from jpq.training.history import EpochRecord, NullObserver
from jpq.training.signals import Interrupted, Interruption
from jpq.types import JpqError

STEPS = 9  # optimiser steps of an epoch of kills.tiny_config
FAST = ("djpq",)


class Killed(BaseException):
    """Nothing in the library may catch it: what is on the disk by then is all that is left, as after kill -9."""


class After(NullObserver):
    """Raises something, or does something, after so many steps of a phase."""

    def __init__(self, phase: str, steps: int, error: type[BaseException] | None = None, number: int = 0) -> None:
        self.at, self.error, self.number = (phase, steps), error, number
        self.name, self.done, self.steps = "", 0, 0
        self.epochs: list[tuple[str, int]] = []

    def phase(self, name: str, epochs: int, steps: int) -> None:
        self.name, self.done, self.steps = name, 0, steps

    def step(self, loss: float, bops_share: float, limit_share: float) -> None:
        self.done += 1
        if (self.name, self.done) == self.at:
            if self.number:
                os.kill(os.getpid(), self.number)
            if self.error:
                raise self.error

    def epoch(self, row: EpochRecord) -> None:
        self.epochs.append((row.phase, row.epoch))


def told(folder: Path) -> tuple[object, ...]:
    """Everything that two runs must agree on: plan, weights, packed and exported model, history but its seconds."""
    lines = (folder / "history.csv").read_text().splitlines()
    final = (folder / "model.onnx").is_file()  # a trial is neither exported nor packed
    names = ("plan.json", "model.safetensors", "layers.csv", *(("model.packed", "model.onnx") if final else ()))
    files = [(name, (folder / name).read_bytes()) for name in names]
    seconds = lines[0].split(",").index("seconds")
    rows = [[cell for i, cell in enumerate(line.split(",")) if i != seconds] for line in lines]
    return rows, files


def folder_of(asked: Config) -> Path:
    return asked.run.out / asked.hash()


@pytest.mark.parametrize("method", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_every_method_resumes_in_the_midst_of_an_epoch(method: str, tmp_path: Path) -> None:
    def asked(out: str, every: int = 0) -> Config:
        tiny = kills.tiny_config(tmp_path / out, every=every)
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
        jpq.optimize(resumed(stopped) if searches else stopped, After("fine-tune", 3, KeyboardInterrupt), final=False)
    saved = torch.load(folder_of(stopped) / checkpoint.NAME)
    assert (saved["phase"], saved["done"], len(saved["losses"])) == ("fine-tune", 0, 3)
    jpq.optimize(resumed(stopped), final=False)
    assert told(folder_of(stopped)) == told(folder_of(whole))


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C is heard, also where the tests are a job in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    asked = kills.tiny_config(tmp_path_factory.mktemp("whole"))
    assert kills.run_in_child(asked).exitcode == 0
    return folder_of(asked)


def random_kills(count: int) -> list[tuple[str, int]]:
    """Every moment at least once, at a random one of its occurrences; then any."""
    draw = random.Random(0)
    moments = [*MOMENTS, *draw.choices(list(MOMENTS), k=count - len(MOMENTS))]
    return [(moment, draw.randint(1, MOMENTS[moment])) for moment in moments]


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "n"), random_kills(20))
def test_kill_9_loses_nothing_but_time(moment: str, n: int, whole: Path, tmp_path: Path) -> None:
    asked = kills.tiny_config(tmp_path, every=n % 2 and 4)
    assert kills.run_in_child(asked, moment, n).exitcode == -signal.SIGKILL
    assert kills.run_in_child(resumed(asked)).exitcode == 0
    assert told(folder_of(asked)) == told(whole)
    assert {p.name for p in folder_of(asked).iterdir()} == {p.name for p in whole.iterdir()}, "nothing is left over"


@pytest.mark.slow
def test_killed_again_and_again(whole: Path, tmp_path: Path) -> None:
    asked, draw, killed = kills.tiny_config(tmp_path, every=3), random.Random(1), 0
    process = kills.run_in_child(asked, seconds=draw.uniform(0.5, 1.0))
    while process.exitcode == -signal.SIGKILL:
        killed += 1
        assert killed < 40, "each has more time than the last, however slow the machine"
        process = kills.run_in_child(resumed(asked), seconds=draw.uniform(0.5, 1.0) * 1.25**killed)
    assert process.exitcode == 0
    assert killed >= 2
    assert told(folder_of(asked)) == told(whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number: int, tmp_path: Path) -> None:
    flags = "--target-bops 5% --limit 150 --epochs 40 --float-epochs 1 --batch-size 16 --device cpu --out"
    args = ["optimize", *flags.split(), str(tmp_path / "a folder")]
    command = [sys.executable, "-m", "jpq", *args]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in a shell's background ignores it
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    ) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("search"):
            assert process.poll() is None
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    (line,) = (line for line in err.splitlines() if line.startswith("Stopped"))
    said = shlex.split(line.partition("Go on with: ")[2])
    assert said == ["jpq", *args, "--resume"]
    (folder,) = (tmp_path / "a folder").iterdir()
    saved = torch.load(folder / checkpoint.NAME)
    assert saved["phase"] == "search"
    assert {p.name for p in folder.iterdir() if p.name.startswith(".")} == set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_midst_of_a_step_waits_for_its_end(number: int, tmp_path: Path) -> None:
    asked = kills.tiny_config(tmp_path)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        jpq.optimize(asked, After("search", 2, number=number), final=False)
    assert caught.value.number == number
    assert signal.getsignal(number) is before, "nothing is left behind"
    saved = torch.load(folder_of(asked) / checkpoint.NAME)
    assert (saved["phase"], saved["done"]) == ("search", 0)
    assert len(saved["losses"]) == 2


def test_requests_to_stop() -> None:
    stop, done = Interruption(), []

    def work(*numbers: int) -> None:
        with stop, stop.uninterrupted():
            for number in numbers:
                os.kill(os.getpid(), number)
                done.append(number)

    with pytest.raises(Interrupted, match="SIGTERM"):
        work(signal.SIGTERM, signal.SIGTERM)  # clusters may send it twice
    assert done == [signal.SIGTERM, signal.SIGTERM]
    assert not stop.cut
    stop, done = Interruption(), []
    with pytest.raises(Interrupted, match="SIGINT"):
        work(signal.SIGINT, signal.SIGINT)  # a second Ctrl-C does not wait
    assert done == [signal.SIGINT]
    assert stop.cut


def test_nothing_is_heard_after_the_end() -> None:
    before, done = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], []
    try:
        with Interruption() as stop:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:
                stop.end(for_good=True)
                for number in (signal.SIGINT, signal.SIGTERM) * 3:
                    os.kill(os.getpid(), number)
                    done.append(number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(done) == 6
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_threads_hear_no_signals() -> None:
    said = []

    def work() -> None:
        with Interruption() as stop, stop.uninterrupted():
            said.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == [before]


def test_a_finished_run_says_so(tiny_trial: Path, tmp_path: Path) -> None:
    asked = kills.tiny_config(tmp_path)
    shutil.copytree(tiny_trial, folder_of(asked))
    with pytest.raises(JpqError, match="holds a finished run"):
        jpq.optimize(resumed(asked), final=False)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Config:
    asked = kills.tiny_config(tmp_path_factory.mktemp("stopped"))
    with pytest.raises(KeyboardInterrupt):
        jpq.optimize(asked, After("search", STEPS + 3, KeyboardInterrupt), final=False)
    return asked


Change = Callable[[dict[str, Any]], object]
WRONG: dict[str, Change] = {
    "settings": lambda s: s.pop("settings"),
    "phase": lambda s: s.update(phase="x"),
    "a list of phases": lambda s: s.update(phase=[]),
    "history": lambda s: s["history"][0].pop("loss"),
    "seconds": lambda s: s["history"][0].update(seconds="x"),
    "net": lambda s: s.update(net=3),
    "NaN": lambda s: [v.fill_(math.nan) for v in s["net"].values() if v.is_floating_point()],
    "optimizer": lambda s: s.update(optimizer={}),
    "rates": lambda s: s["optimizer"]["param_groups"][0].update(peak="x"),
    "moments": lambda s: [v.update(exp_avg=torch.zeros(2)) for v in s["optimizer"]["state"].values()],
    "steps": lambda s: [v.update(step="x") for v in s["optimizer"]["state"].values()],
    "random": lambda s: s.update(random=torch.zeros(3)),
    "done": lambda s: s.update(done="x"),
    "too many done": lambda s: s.update(done=99),
    "fewer than none done": lambda s: s.update(done=-1),
    "losses": lambda s: s.update(losses=None),
    "an infinite loss": lambda s: s.update(losses=[math.inf]),
    "too many losses": lambda s: s.update(losses=[1.0] * 1000),
    "controller": lambda s: s.update(controller={}),
    "pressure": lambda s: s["controller"].update(pressure={"bops": math.nan}),
    "budget": lambda s: s.update(budget="x"),
    "another budget": lambda s: s.update(budget=7),
    "soft": lambda s: s.update(soft={"net": 3}),
    "no plan": lambda s: s.update(phase="fine-tune"),
}


FIRST = ("settings", "history", "NaN", "optimizer", "random", "losses", "controller", "no plan")  # in the fast suite


@pytest.mark.parametrize("what", thinned(WRONG, lambda _, what: what in FIRST))
def test_a_checkpoint_with_a_wrong_field_is_one_sentence(what: str, stopped: Config) -> None:
    path = folder_of(stopped) / checkpoint.NAME
    good = path.read_bytes()
    saved = torch.load(path)
    WRONG[what](saved)
    torch.save(saved, path)
    try:
        with pytest.raises(JpqError, match=r"(?i)run without resume\.$"):
            jpq.optimize(resumed(stopped), final=False)
    finally:
        path.write_bytes(good)


def test_other_weights_behind_the_same_name_are_noticed(tiny_trial: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    shutil.copy(tiny_trial / "float.safetensors", path)
    asked = kills.tiny_config(tmp_path)
    asked = replace(asked, task=replace(asked.task, weights=path))
    with pytest.raises(KeyboardInterrupt):
        jpq.optimize(asked, After("search", 3, KeyboardInterrupt), final=False)
    saved = torch.load(folder_of(asked) / checkpoint.NAME)
    torch.save({**saved, "data": "0" * 64}, folder_of(asked) / checkpoint.NAME)
    with pytest.raises(JpqError, match=r"data digits is no longer the one that this run began with"):
        jpq.optimize(resumed(asked), final=False)
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(JpqError, match=r"weights .* is no longer the one that this run began with"):
        jpq.optimize(resumed(asked), final=False)


@pytest.mark.slow
def test_two_processes_agree(tmp_path: Path) -> None:
    found = []
    for seed in ("1", "2"):  # of Python's hashes: no order of a set or dict may matter
        asked = kills.tiny_config(tmp_path / seed)
        code = f"from support.kills import *; run(tiny_config(Path({str(tmp_path / seed)!r})))"
        paths = os.pathsep.join([*map(str, kills.PATHS), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
        found.append((told(folder_of(asked)), run_folder.read_run(folder_of(asked))))
    (files, first), (others, second) = found
    assert files == others
    assert (first.float, first.compressed, first.held_out, first.data) == (
        second.float,
        second.compressed,
        second.held_out,
        second.data,
    )
    assert first.machine["threads"] == 1
    assert first.machine["peak_memory_bytes"] > 10**8
    assert re.fullmatch(r"[0-9a-f]{64}", first.data["checksum"])


def disk(tmp_path: Path, megabytes: float) -> Path:
    """A small disk of its own, where this may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    size = f"size={int(megabytes * 2**20)}"
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small disk takes rights that this process has not")
    return place


class Does(After):
    """Does something after so many steps of a phase, and lets the run go on."""

    def __init__(self, phase: str, steps: int, act: Callable[[], object]) -> None:
        super().__init__(phase, steps)
        self.act = act

    def step(self, loss: float, bops_share: float, limit_share: float) -> None:
        super().step(loss, bops_share, limit_share)
        if (self.name, self.done) == self.at:
            self.act()


def test_a_full_disk_keeps_the_last_good_checkpoint(tiny_trial: Path, tmp_path: Path) -> None:
    place = disk(tmp_path, 16)
    asked = kills.tiny_config(place)
    full = place / "someone else's"

    def fill() -> None:
        with suppress(OSError), full.open("wb") as file:
            while True:
                file.write(bytes(2**12))
                file.flush()

    try:
        with pytest.raises(JpqError, match="No space left on device"):
            jpq.optimize(asked, Does("search", STEPS + 4, fill), final=False)
        kept = torch.load(folder_of(asked) / checkpoint.NAME)
        assert (kept["phase"], kept["done"]) == ("search", 1)
        full.unlink()
        jpq.optimize(resumed(asked), final=False)
        assert told(folder_of(asked)) == told(tiny_trial)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_read_only_disk(tmp_path: Path) -> None:
    place = disk(tmp_path, 16)
    try:
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        with pytest.raises(JpqError, match=r"Read-only file system.*with out"):
            jpq.optimize(kills.tiny_config(place))
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_folder_removed_meanwhile(tmp_path: Path) -> None:
    asked = kills.tiny_config(tmp_path)
    with pytest.raises(JpqError, match="Its folder is gone"):
        jpq.optimize(asked, Does("search", 3, lambda: shutil.rmtree(folder_of(asked))), final=False)


def test_a_folder_that_cannot_be_synced_holds_the_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.fsync

    def refuses_folders(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(22, "Invalid argument")
        plain(handle)

    monkeypatch.setattr(os, "fsync", refuses_folders)
    replace_file(tmp_path / "file", lambda part: part.write_text("new"))
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("limit", [3_000, 100_000])
def test_files_that_may_not_grow(limit: int, tiny_trial: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("what was there")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        for write in (
            lambda part: part.write_bytes(bytes(10**6)),
            lambda part: torch.save({"a": torch.zeros(10**6)}, part),
            lambda part: torch.save({"a": torch.zeros(10**6)}, part.open("wb")),
        ):
            with pytest.raises((JpqError, RuntimeError), match=r"File too large|unexpected pos"):
                replace_file(path, write)
        with pytest.raises(JpqError, match="File too large"):
            checkpoint.save(tmp_path, {"a": torch.zeros(10**6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "what was there"
    assert {p.name for p in tmp_path.iterdir()} == {"file"}
