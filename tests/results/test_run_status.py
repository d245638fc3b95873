"""A refused run leaves no folder; a run is not overwritten unasked; `--overwrite` spares foreign files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import jpq
from jpq.cli.main import main
from jpq.config import Budget, Config, Decide, Run, Task, Train, write_toml
from jpq.results.run_status import check_rerun, clear_folder, read_status
from jpq.types import JpqError
from tests.support.commands import refused

Captured = pytest.CaptureFixture[str]

FLAGS = ["--target-bops", "30%", "--limit", "60", "--epochs", "2", "--float-epochs", "1", "--device", "cpu"]
QUICK = Config(
    task=Task(limit=60),
    budget=Budget(target_bops="30%"),
    train=Train(epochs=2, float_epochs=1),
    run=Run(device="cpu"),
)


def here(folder: Path, **run: object) -> Config:
    return replace(QUICK, run=replace(QUICK.run, out=folder, **run))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `runs` of a folder in which one run has finished."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["optimize", *FLAGS]) == 0
    return place / "runs"


@pytest.fixture
def runs(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder of runs; its parent is the working directory."""
    shutil.copytree(finished, tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.mark.parametrize(
    "args",
    [
        ["--data", "nosuch"],
        ["--data", "folder:nowhere"],
        ["--model", "nosuch"],
        ["--model", "vgg7"],  # does not fit images of 8 x 8
        ["--weights", "none.pth"],
        ["--method", "nosuch"],
        ["--method", "pdp", "--structure", "7:4"],
        ["--target-bops", "0.000001%"],
        ["--target-latency", "1ms", "--latency-table", "none.csv"],
        ["--mask", "none.json"],
        ["--name", "a/b"],
    ],
    ids=" ".join,
)
def test_a_refused_run_leaves_no_folder(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(["optimize", *FLAGS, *args], capsys)
    assert not list(tmp_path.iterdir())


def test_a_refused_run_leaves_what_was_there(tmp_path):
    config = here(tmp_path, name="mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(JpqError):
        jpq.optimize(replace(config, budget=Budget(target_bops="0.000001%")))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_the_same_command_twice_names_both_ways_on(runs, capsys):
    (folder,) = (p for p in runs.iterdir() if p.name != "latest")
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    line = refused(["optimize", *FLAGS], capsys)
    assert f"runs/{folder.name} holds a finished run of these settings: --resume shows" in line
    assert "--overwrite removes it and runs anew" in line
    assert main(["optimize", *FLAGS, "--resume"]) == 0
    out = capsys.readouterr().out
    assert f"runs/{folder.name} is finished; its result is shown again." in out
    accuracy = json.loads((folder / "result.json").read_text(encoding="utf-8"))["compressed"]["accuracy"]
    assert f"{100 * accuracy:.2f} %" in out
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    assert "Give one" in refused(["optimize", *FLAGS, "--resume", "--overwrite"], capsys)


def test_overwriting_runs_anew_and_keeps_other_files(runs, capsys):
    (folder,) = (p for p in runs.iterdir() if p.name != "latest")
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    (folder / "model.pt2").write_bytes(b"of an earlier run")
    before = (folder / "result.json").stat().st_mtime_ns
    assert main(["optimize", *FLAGS, "--overwrite"]) == 0
    assert (folder / "result.json").stat().st_mtime_ns != before
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert not (folder / "model.pt2").exists()
    assert "overwrite" not in (folder / "config.toml").read_text(encoding="utf-8")


def test_latest_is_the_run_begun_last_and_evaluate_takes_it(runs, capsys):
    (folder,) = (p for p in runs.iterdir() if p.name != "latest")
    assert (runs / "latest").resolve() == folder
    assert main(["evaluate", "runs/latest"]) == 0
    assert main(["evaluate", *(f"runs/{p.name}" for p in runs.iterdir())]) == 0  # runs/* names it twice
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert folder.name in lines[0]
    assert main(["export", "runs/latest"]) == 0
    assert "is final already" in capsys.readouterr().out
    assert main(["pareto", "runs"]) == 0
    assert "latest" not in capsys.readouterr().out
    _, plan = jpq.load("runs/latest")
    assert plan.method == "djpq"


@pytest.mark.parametrize(
    ("file", "state", "words"),
    [
        ("checkpoint.pt", "unfinished", "unfinished run .* --resume goes on with it, --overwrite"),
        ("result.json", "broken", "a run that cannot be read .* --overwrite"),
        ("front.csv", "finished", "finished run"),
        ("config.toml", "begun", ""),
    ],
)
def test_the_states_of_a_folder(tmp_path, file, state, words):
    config = here(tmp_path)
    folder = config.folder()
    assert read_status(folder).state == "empty"
    folder.mkdir()
    write_toml(config, folder / "config.toml")
    if file != "config.toml":
        (folder / file).write_text("{", encoding="utf-8")
    assert read_status(folder).state == state
    for name in ("resume", "overwrite"):
        assert check_rerun(here(tmp_path, **{name: True})).state == state
    if not words:
        assert check_rerun(config).state == state
        return
    with pytest.raises(JpqError) as caught:
        check_rerun(config)
    assert all(word in caught.value.command_line for word in words.split(" .* "))


def test_a_name_that_other_settings_have_is_refused_in_python_too(tmp_path):
    config = here(tmp_path, name="mine")
    config.folder().mkdir()
    write_toml(replace(config, decide=Decide(method="l0")), config.folder() / "config.toml")
    with pytest.raises(JpqError, match="holds a run of other settings"):
        jpq.optimize(config)
    assert [p.name for p in config.folder().iterdir()] == ["config.toml"]


def test_clearing_spares_inputs_and_foreign_files(tmp_path):
    top, budget = tmp_path / "run", tmp_path / "run" / "bops-1pct"
    budget.mkdir(parents=True)
    (top / "data").mkdir()
    for path in (
        *(top / name for name in ("config.toml", "front.csv", "float.safetensors", "mine.txt", "data/result.json")),
        *(top / name for name in ("events.out.tfevents.1", "model.qonnx.onnx", "model.pt2")),
        *(budget / name for name in ("config.toml", "result.json", "README.md", "mine.txt")),
        *(top / name for name in ("ladder.csv", "pareto.csv", "pareto.png", "README.md")),
    ):
        path.write_text("x", encoding="utf-8")
    clear_folder(top, keep=[top / "float.safetensors"])
    left = {str(p.relative_to(top)) for p in top.rglob("*") if p.is_file()}
    assert left == {"float.safetensors", "mine.txt", "data/result.json", "bops-1pct/mine.txt"}


@pytest.mark.slow
def test_a_finished_run_of_several_budgets_is_shown_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["optimize", *FLAGS, "--target-bops", "40%,30%", "--epochs", "4", "--name", "two"]
    assert main(args) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if "bops-" in line]
    assert len(shown) == 2
    assert "finished run" in refused(args, capsys)
    assert main([*args, "--resume"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "bops-" in line] == shown
