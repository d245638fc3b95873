"""Files of version 0.1 are read by this version, with the same numbers (tests/assets/v0.1)."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import jpq
from jpq.config import read_toml
from jpq.export import Session
from jpq.export.packed import unpack_model
from jpq.export.timing import read_table
from jpq.results import read_run
from jpq.training import checkpoint
from jpq.trials.storage import open_storage

ASSETS = Path(__file__).parents[1] / "assets" / "v0.1"
EXPECTED = json.loads((ASSETS / "expected.json").read_text("utf-8"))
X = torch.linspace(0, 1, 128).reshape(2, 1, 8, 8)
RUNS = {name: ASSETS / "runs" / EXPECTED[name]["hash"] for name in ("run", "coded", "checkpoint")}


@pytest.fixture(autouse=True)
def users_code(monkeypatch):
    """The module of which version 0.1 took a model, `tiny_v01:build`."""
    monkeypatch.syspath_prepend(str(ASSETS))


@torch.no_grad()
def check_output(model, name, key="output"):
    torch.testing.assert_close(model(X), torch.tensor(EXPECTED[name][key]), rtol=1e-5, atol=1e-6)


def test_assets_are_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 300_000


@pytest.mark.parametrize("name", ["run", "coded"])
def test_run_folders_load(name):
    small, plan = jpq.load(RUNS[name], run_code=name == "coded")
    check_output(small, name)
    result = read_run(RUNS[name])
    assert result.compressed.accuracy == EXPECTED[name]["accuracy"]
    assert result.compressed.bops == EXPECTED[name]["bops"] == sum(row.bops for row in result.layers)
    assert {row.name for row in result.layers} == set(plan.layers)
    assert jpq.measure(small, X)["bops"] == EXPECTED[name]["bops"]
    check_output(Session(RUNS[name] / "model.onnx", optimised=False), name)


def test_packed_file_is_unpacked():
    small, _ = jpq.load(RUNS["run"])
    for p in small.parameters():
        p.data.zero_()
    check_output(unpack_model(small, RUNS["run"] / "model.packed"), "run", "unpacked")


def test_settings_give_the_same_hash():
    for name, folder in RUNS.items():
        assert read_toml(folder / "config.toml").hash() == EXPECTED[name]["hash"] == folder.name


def test_latency_table_is_read():
    path = ASSETS / "table.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    table = read_table(path)
    assert len(table.entries) == len(rows) == 58
    assert sum(entry.ms for entry in table.entries) == pytest.approx(sum(float(row["ms"]) for row in rows), rel=1e-9)


def test_runs_make_a_front():
    rows = jpq.front([RUNS["run"]])
    assert rows["bops"].tolist() == [EXPECTED["run"]["bops"]]


def test_interrupted_run_is_resumed(tmp_path):
    folder = tmp_path / "runs" / RUNS["checkpoint"].name
    shutil.copytree(RUNS["checkpoint"], folder)
    state = checkpoint.load(folder)
    assert state["phase"] == "search"
    assert state["done"] == 1
    config = read_toml(folder / "config.toml")
    result = jpq.optimize(replace(config, run=replace(config.run, out=tmp_path / "runs", resume=True)))
    assert result.folder == folder
    earlier = [
        (row["phase"], float(row["loss"])) for row in csv.DictReader((RUNS["checkpoint"] / "history.csv").open())
    ]
    assert [(row.phase, row.loss) for row in result.history[:2]] == earlier
    assert [(row.phase, row.epoch) for row in result.history[2:]] == [("search", 2), ("fine-tune", 1), ("fine-tune", 2)]
    assert result.targets["bops"]["used"] <= 1


def test_study_is_read_and_goes_on(tmp_path):
    import optuna

    folder = Path(shutil.copytree(ASSETS / "studies" / "digits", tmp_path / "studies" / "digits"))
    study = optuna.load_study(study_name="digits", storage=open_storage("", folder, 60))
    assert [t.values for t in study.trials] == EXPECTED["study"]["values"]
    assert [t.number for t in study.best_trials] == EXPECTED["study"]["best"]
    rows = jpq.front(folder)
    assert len(rows) == 3
    best = EXPECTED["study"]["values"][EXPECTED["study"]["best"][0]]
    assert rows["bops_share"].min() * 100 == pytest.approx(best[1])
