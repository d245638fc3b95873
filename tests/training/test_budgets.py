"""Several budgets followed down in one run: a folder for each, promises kept at each, and resuming anywhere."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from runs import QUICK, config, outcome, resumed

import jpq
from jpq.cli.main import main
from jpq.config import Budget, Config, Decide, Task, Train
from jpq.methods.compatibility import compose_method
from jpq.tasks import CLASSIFICATION, load
from jpq.training.environment import full_precision
from jpq.training.epochs import all_phases, budget_epochs
from jpq.types import JpqError

TRAIN = replace(QUICK, epochs=8, tune_epochs=2)
LISTED = "2%,1%"


def test_precision_is_as_before_where_the_last_step_fails():
    before, part = torch.backends.cudnn.allow_tf32, torch.backends.cudnn

    def fails():
        with full_precision():
            part.allow_tf32 = not before
            raise JpqError("They differ.")

    with pytest.raises(JpqError, match="differ"):
        fails()
    assert part.allow_tf32 == before


def down(out, method="djpq", train=TRAIN, **budget):
    asked = config(out, method, train, **(budget or {"target_bops": LISTED}))
    return replace(asked, task=Task(limit=200))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    asked = down(tmp_path_factory.mktemp("runs"))
    return asked, jpq.optimize(asked, command="jpq optimize --target-bops 2%,1%")


def test_every_budget_is_a_run_folder_that_keeps_its_promise(finished):
    asked, result = finished
    top = result.folder.parent
    assert top.name == asked.hash()
    assert [p.folder for p in result.front] == ["bops-2pct", "bops-1pct"]
    data = load.read_data(asked, torch.device("cpu"))
    for point in result.front:
        small, plan = jpq.load(top / point.folder)
        assert plan.method == "djpq"
        assert CLASSIFICATION.evaluate(small, data.test) == point.accuracy
        assert CLASSIFICATION.evaluate(small, data.held_out) == point.held_out
        counted = jpq.measure(small, data.example)["bops"]
        assert counted == point.bops
        assert counted <= float(point.budget.strip("%")) / 100 * result.float.bops
        for name in ("model.onnx", "model.packed", "curves.png", "layers.csv"):
            assert (top / point.folder / name).is_file()
    assert result.front[0].bops > result.front[1].bops == result.compressed.bops
    assert sorted(p.name for p in top.iterdir()) == [
        "bops-1pct",
        "bops-2pct",
        "config.toml",
        "float.safetensors",
        "front.csv",
        "front.png",
        "history.csv",
    ]
    table = pd.read_csv(top / "front.csv")
    assert list(table.folder) == ["bops-2pct", "bops-1pct"]
    assert list(table.bops) == [p.bops for p in result.front]


def test_one_float_model_and_one_search_serve_all_budgets(finished):
    _, result = finished
    every = pd.read_csv(result.folder.parent / "history.csv").fillna({"budget": ""})
    order = list(dict.fromkeys(zip(every.phase, every.budget, strict=True)))
    assert order == [("float", ""), ("search", "2%"), ("fine-tune", "2%"), ("search", "1%"), ("fine-tune", "1%")]
    assert [int(((every.phase == p) & (every.budget == b)).sum()) for p, b in order] == [3, 2, 2, 2, 4]
    led = [(r.phase, r.budget) for r in result.history]
    assert ("fine-tune", "2%") not in led  # which is another model's
    assert led.count(("search", "2%")) == 2
    searched = [r.lr for r in result.history if r.phase == "search"]
    assert searched == sorted(searched, reverse=True)  # one curve over both
    assert every.lr.iloc[-1] < 0.1 * TRAIN.lr


def test_what_fine_tuning_does_to_one_budget_stays_with_it(finished, tmp_path):
    """The search goes on from the soft state: bit for bit, however long the model before was fine-tuned."""
    _, result = finished
    other = jpq.optimize(down(tmp_path, train=replace(TRAIN, tune_epochs=1)), final=False)
    assert outcome(other) == outcome(result, tested=False)
    assert untested(other)[1] == untested(result)[1]


def untested(result):
    """The records of all budgets but for their seconds and their accuracy on the test split, which trials leave out."""
    return [replace(record, seconds=0, accuracy=0) for record in result.front]


def test_the_saved_models_are_found_by_the_command_line(finished, capsys):
    _, result = finished
    point = result.front[0]
    table = jpq.front(result.folder.parent)
    assert sorted(table.bops) == sorted(p.bops for p in result.front)
    assert main(["evaluate", str(result.folder.parent / point.folder)]) == 0
    assert f"{100 * point.accuracy:.2f} %" in capsys.readouterr().out.replace("\n", " ")


SLOW = [pytest.param(phase, marks=pytest.mark.slow) for phase in ("float", "search 2%", "search 1%", "fine-tune 1%")]


@pytest.mark.parametrize("phase", ["fine-tune 2%", *SLOW])
def test_resuming_anywhere_gives_the_same_bits(phase, finished, tmp_path):
    asked, whole = finished
    result = resumed(asked, tmp_path, phase, final=False)
    assert outcome(result) == outcome(whole, tested=False)
    assert untested(result) == untested(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "phase"),
    [
        ("uniform", "fine-tune 1%"),
        ("two-stage", "search 1%"),
        ("gdp", "search 1%"),
        ("dpf", "fine-tune 2%"),
        ("taylor", "search 1%"),
    ],
)
def test_every_kind_of_method_goes_down_and_resumes(method, phase, tmp_path):
    asked = down(tmp_path / "whole", method)
    whole = jpq.optimize(asked)
    limits = [0.02, 0.01]
    assert all(0.9 * limit <= p.bops_share <= limit for p, limit in zip(whole.front, limits, strict=True))
    assert outcome(resumed(asked, tmp_path / "stopped", phase)) == outcome(whole)


def test_targets_that_list_as_many_or_hold_throughout(tmp_path):
    both = jpq.optimize(down(tmp_path, target_bops="2%, 1%", target_size="24KB,16KB", target_macs="90%"), final=False)
    assert [p.folder for p in both.front] == ["bops-2pct", "bops-1pct"]
    for point, size in zip(both.front, (24_000, 16_000), strict=True):
        assert point.size_bytes <= size
        assert point.macs <= 0.9 * both.float.macs
    alone = Budget(target_bops="2%", target_size="60 KB,0.03 MB")
    assert list(Config(budget=alone).each()) == ["60 KB", "0.03 MB"]


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ({"target_bops": "1%,2%"}, "target_bops lists 2% after 1%"),
        ({"target_bops": "2%,2.0%"}, "target_bops lists 2.0% after 2%"),
        ({"target_bops": "2%,1%,2%"}, "2% is there twice"),
        ({"target_bops": "2%,,1%"}, "missing beside a comma"),
        ({"target_bops": "2%,1%", "target_size": "30KB,20KB,10KB"}, "2 budgets, and target_size.* has 3"),
        ({"target_bops": "2%,1%", "target_size": "20KB,30KB"}, "target_size lists 30KB after 20KB"),
        ({"target_bops": "2%,0.0001%"}, "smallest possible"),
        ({"target_bops": "2%,x"}, "'x' is not an amount"),
    ],
)
def test_lists_that_make_no_sense_end_before_training(budget, says, tmp_path):
    with pytest.raises(JpqError, match=says):
        jpq.optimize(down(tmp_path, **budget))
    assert not list(Path(tmp_path).rglob("float.safetensors"))


def test_too_few_epochs_for_so_many_budgets(tmp_path):
    with pytest.raises(JpqError, match="1 epochs of search are too few for 2 budgets"):
        jpq.optimize(down(tmp_path, train=replace(QUICK, epochs=2)))
    with pytest.raises(JpqError, match="tune_epochs=0"):
        jpq.optimize(down(tmp_path, train=replace(QUICK, tune_epochs=0)))


def test_the_last_budget_takes_as_many_epochs_as_if_it_were_alone():
    for epochs in (7, 16, 40):
        asked = Config(budget=Budget(target_bops="4%,2%,1%"), decide=Decide(), train=Train(epochs=epochs))
        method = compose_method("djpq")
        parts = list(budget_epochs(asked, method).values())
        assert sum(p.search for p in parts) + parts[-1].tune == epochs
        assert all(p.search >= 1 for p in parts)
        trained = [p for p in all_phases(asked, method) if p.name == "fine-tune"]
        for phase in trained:  # each ends at a rate of 0
            assert phase.rate(phase.epochs) == pytest.approx(0.0, abs=1e-12)
        searches = [p for p in all_phases(asked, method) if p.name == "search"]
        for before, after, tune in zip(searches, searches[1:], trained, strict=False):
            assert before.rate(before.epochs) == pytest.approx(after.rate(0)) == pytest.approx(tune.rate(0))
