"""`jpq list`: rows newest first within 80 columns, unfinished and broken runs as such, trials on request, CSV."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jpq.cli.list import read_rows
from jpq.cli.main import main
from jpq.config import Budget, Config, Decide, Run, Task, write_toml
from tests.support.commands import refused

Captured = pytest.CaptureFixture[str]


def run(folder: Path, age: int, result: object = None, config: Config | None = None, **files: str) -> Path:
    """A run's folder, written `age` seconds after 2020."""
    folder.mkdir(parents=True)
    write_toml(config or Config(budget=Budget(target_bops="1%")), folder / "config.toml")
    texts = {**files, **({"result.json": json.dumps(result)} if result is not None else {})}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for path in folder.iterdir():
        os.utime(path, (1_577_836_800 + age,) * 2)
    return folder


def result(accuracy: float | None, final: bool = True, **data: str) -> dict[str, object]:
    held_out = {"float": 0.9, "compressed": 0.75}
    return {
        "final": final,
        "compressed": {"accuracy": accuracy},
        "held_out": held_out,
        "data": {"name": "digits", **data},
    }


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    top = tmp_path / "runs"
    long = Config(
        task=Task(model="torchvision:mobilenet_v3_large", data="folder:/home/somebody/photos of flowers/2026"),
        budget=Budget(target_bops="12.5M", target_size="500KB"),
        decide=Decide(method="bayesian-bits"),
        run=Run(name="a-rather-long-name-of-a-run"),
    )
    run(top / "done", 1, result(0.9876))
    run(top / "a-rather-long-name-of-a-run", 5, result(0.5), long)
    run(top / "stopped", 4, **{"checkpoint.pt": "x"})
    run(top / "damaged", 3, **{"result.json": "{"})
    run(top / "unread", 2)
    (top / "unread" / "config.toml").write_text("[task", encoding="utf-8")
    os.utime(top / "unread" / "config.toml", (1_577_836_802,) * 2)
    run(top / "several", 0, **{"front.csv": "x"})
    run(top / "several" / "bops-1pct", 0, result(0.25))
    run(top / "studies" / "s" / "trials" / "0123", 6, result(None, final=False))
    (top / "studies" / "s" / "study.toml").write_text("", encoding="utf-8")
    run(top / ".hidden", 9, result(0.1))
    (top / "latest").symlink_to("done")
    return top


def test_rows_newest_first_within_80_columns(runs, capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table, below = lines[:7], lines[7:]
    assert max(map(len, table)) <= 80
    assert table[0].split() == ["when", "run", "model", "data", "method", "target", "accuracy", "status"]
    states = [line.split()[-1] for line in table[1:]]
    assert states == ["finished", "unfinished", "broken", "broken", "finished", "finished"]
    assert "98.76 %" in table[5]
    assert "2020-01-01" in table[5]
    assert below[0].startswith("broken damaged: ")
    assert "unread/config.toml is not valid TOML" in below[1]
    assert below[2] == "1 run is a trial of a study and not listed: --all lists it."


def test_rows_hold_what_the_folders_say(runs):
    rows, trials = read_rows([runs])
    assert trials == 1
    assert [row.name for row in rows][:3] == ["a-rather-long-name-of-a-run", "stopped", "damaged"]
    assert "several" not in [row.name for row in rows]  # its budgets are shown
    by_name = {row.name: row for row in rows}
    assert by_name["several/bops-1pct"].metric == "25.00 %"
    assert by_name["a-rather-long-name-of-a-run"].target == "12.5M, 500KB size"
    assert by_name["stopped"].metric == ""
    every, _ = read_rows([runs], with_trials=True)
    trial = next(row for row in every if "trials" in row.name)
    assert (trial.status.state, trial.metric) == ("trial", "75.00 %")
    assert [row.name for row in read_rows([runs / "studies" / "s"])[0]] == ["trials/0123"]
    assert [row.name for row in read_rows([runs / "done", runs])[0]].count("done") == 1


def test_names_have_the_room_and_every_metric_its_name_where_they_differ(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    own = Config(
        task=Task(model="mine:network", data="table:houses.csv"),
        budget=Budget(target_bops="1%"),
        decide=Decide(method="bayesian-bits"),
    )
    run(tmp_path / "runs" / "0123456789ab", 1, result(0.9876))
    run(tmp_path / "runs" / "ba9876543210", 0, result(0.75, task="regression"), own)
    assert main(["list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "run          model        data             target           metric status  ",
        "0123456789ab convnet      digits           1%     accuracy 98.76 % finished",
        "ba9876543210 mine:network table:houses.csv 1%              R² 0.75 finished",
    ]
    row = read_rows([Path("runs")])[0][1]
    assert (row.metric_name, row.metric) == ("R²", "0.75")


def test_csv_shortens_nothing(runs, capsys):
    assert main(["list", "runs", "--csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["status"] for row in table].count("broken") == 2
    long = table[0]
    assert long["folder"] == "runs/a-rather-long-name-of-a-run"
    assert long["data"] == "folder:/home/somebody/photos of flowers/2026"
    assert (long["accuracy"], long["held_out"], long["target"]) == ("0.5", "0.75", "12.5M, 500KB size")


def test_without_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["list"]) == 0
    assert "There are no runs here yet" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert main(["list", "empty"]) == 0
    assert "No runs were found." in capsys.readouterr().out
    assert "nowhere is not there" in refused(["list", "nowhere"], capsys)


def test_metrics_of_other_tasks(tmp_path):
    run(tmp_path / "unknown", 0, result(12.5, task="a task of somebody"))
    run(tmp_path / "odd", 1, {"final": True, "compressed": None, "data": 3})
    assert [row.metric for row in read_rows([tmp_path])[0]] == ["", "12.5"]


def test_a_screen_that_is_not_utf_8_shows_what_it_can(runs, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    done = subprocess.run([sys.executable, "-m", "jpq", "list"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"a-r\S*\?\S*run ", done.stdout.decode("latin-1"))  # the ellipsis of a shortened name
