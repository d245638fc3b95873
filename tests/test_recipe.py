"""The main job end to end on the built-in data: files, promises, resuming, and bad input."""

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import onnx
import pandas as pd
import pytest
import torch
from runs import QUICK, Stop, config, outcome, resumed, shortened
from thinned import thinned

import jpq
from jpq import recipe
from jpq.compression import calibration
from jpq.config import Budget, Decide, Run, Task
from jpq.export.runtimes import Session
from jpq.tasks import CLASSIFICATION
from jpq.tasks import load as task_loading
from jpq.tasks.data import load
from jpq.tasks.load import read_data
from jpq.training import checkpoint
from jpq.types import JpqError


@pytest.fixture(scope="module")
def finished(finished_run):
    """(settings, result) of the run that the session shares."""
    return config(finished_run.folder.parent), finished_run


class Closed:
    """A split that may be counted, not read."""

    def __init__(self, batches):
        self.size = batches.size

    def __iter__(self):
        raise AssertionError("the split was read")

    epoch = __iter__

    def one_size(self):
        return self


def test_folder_holds_everything(finished):
    _, result = finished
    names = {p.name for p in result.folder.iterdir()}
    assert names >= {
        "config.toml",
        "history.csv",
        "layers.csv",
        "result.json",
        "model.safetensors",
        "plan.json",
        "model.onnx",
        "curves.png",
        "layers.png",
    }
    assert checkpoint.NAME not in names
    tree = json.loads((result.folder / "result.json").read_text())
    for side in ("float", "compressed"):
        assert 0 <= tree[side]["accuracy"] <= 1
        assert all(tree[side][k] > 0 for k in ("bops", "macs", "size_bytes"))
    assert tree["compressed"]["bops_share"] == tree["compressed"]["bops"] / tree["float"]["bops"]
    assert tree["verified"]["masked_vs_rebuilt_float64"] <= 1e-10
    assert tree["verified"]["rebuilt_vs_onnxruntime"]["images"] == tree["data"]["test"]
    assert tree["command"] == "jpq optimize --target-bops 1%"
    assert tree["seed"] == 0
    assert tree["versions"]["torch"] == version("torch")
    assert tree["seconds"]["total"] > 0
    assert len(pd.read_csv(result.folder / "history.csv")) == 3 + 4


@pytest.mark.parametrize(("method", "times"), [("djpq", 1), ("uniform", 0)])
def test_layers_are_observed_again_where_a_search_has_trained_them(method, times, tmp_path, monkeypatch):
    original, seen = calibration.recalibrate, []
    monkeypatch.setattr(recipe, "recalibrate", lambda net, batches: seen.append(original(net, batches)))
    jpq.optimize(shortened(config(tmp_path, method)), final=False)
    assert len(seen) == times


def test_a_trial_computes_the_same_and_leaves_the_test_split_unread(finished, tmp_path, monkeypatch):
    asked, whole = finished

    def closed(*args, **kwargs):
        data = load(*args, **kwargs)
        return replace(data, test=Closed(data.test))

    monkeypatch.setattr(task_loading, "load_data", closed)
    with pytest.raises(AssertionError, match="the split was read"):
        jpq.optimize(shortened(config(tmp_path / "final")))
    trial = jpq.optimize(replace(asked, run=replace(asked.run, out=tmp_path / "trial")), final=False)
    assert not {p.name for p in trial.folder.iterdir()} & {"model.onnx", "model.packed", "curves.png", checkpoint.NAME}
    tree = json.loads((trial.folder / "result.json").read_text())
    assert tree["final"] is False
    assert tree["compressed"]["accuracy"] is tree["float"]["accuracy"] is None
    assert tree["held_out"] == whole.held_out
    assert outcome(trial) == outcome(whole, tested=False)


def test_budget_is_a_promise_counted_on_the_rebuilt_model(finished):
    _, result = finished
    small, _ = jpq.load(result.folder)
    counted = jpq.measure(small, torch.rand(1, 1, 8, 8))
    limit = result.targets["bops"]["limit"]
    assert 0.97 * limit <= counted["bops"] <= limit
    assert counted["bops"] == result.compressed.bops == pd.read_csv(result.folder / "layers.csv").bops.sum()


def test_saved_model_is_the_reported_one(finished):
    asked, result = finished
    small, plan = jpq.load(result.folder)
    data = read_data(asked, torch.device("cpu"))
    assert CLASSIFICATION.evaluate(small, data.test) == result.compressed.accuracy
    session = Session(result.folder / "model.onnx")
    x, _ = next(iter(data.test))
    assert torch.equal(session(x).argmax(1), small(x).argmax(1))
    assert session(x[:1]).shape == (1, 10)  # the batch is dynamic
    kinds = {node.op_type for node in onnx.load(result.folder / "model.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= kinds
    assert plan.method == "djpq"


LATER = [pytest.param(phase, marks=pytest.mark.slow) for phase in ("search", "fine-tune")]  # fast in test_resume.py


@pytest.mark.parametrize("phase", ["float", *LATER])
def test_resuming_gives_the_same_bits_as_never_stopping(phase, finished, tmp_path):
    asked, whole = finished
    assert outcome(resumed(asked, tmp_path, phase)) == outcome(whole)


# in test_resume.py every method, slowly
@pytest.mark.parametrize("method", thinned(["gdp", "dais", "spp", "dhp", "dsp"], lambda _, m: m in ("dais", "spp")))
def test_everything_that_a_gate_remembers_is_in_the_checkpoint(method, tmp_path):
    asked = shortened(config(tmp_path / "whole", method), limit=100, epochs=3)
    whole = jpq.optimize(asked, final=False)
    assert outcome(resumed(asked, tmp_path / "stopped", "search", final=False)) == outcome(whole)


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        pytest.param("djpq-pow2", {"target_bops": "1.5%"}, marks=pytest.mark.slow),
        pytest.param("l0", {"target_bops": "0.5%"}, marks=pytest.mark.slow),
        ("uniform", {"target_bops": "1%"}),
        ("djpq", {"target_bops": "2%", "target_size": "12KB"}),
        ("djpq", {"target_macs": "40%"}),
    ],
)
def test_methods_and_targets(method, budget, tmp_path):
    result = jpq.optimize(shortened(config(tmp_path, method, **budget)), final=method != "djpq")
    assert all(t["reached"] <= t["limit"] for t in result.targets.values())
    used = max(t["used"] for t in result.targets.values())
    coarse = method in ("uniform", "djpq-pow2")  # steps between their widths leave a rest
    assert used >= (0.7 if coarse else 0.97)
    if method == "djpq-pow2":
        assert {x.w_bits for x in result.layers} | {x.a_bits for x in result.layers} <= {2, 4, 8}
    if method == "uniform":
        assert len({x.w_bits for x in result.layers}) == 1
        assert not any(r.phase == "search" for r in result.history)
    if "target_macs" in budget:
        assert any(x.outputs < x.outputs_all for x in result.layers)


def test_a_composed_method_runs_like_a_named_one(tmp_path):
    asked = shortened(config(tmp_path))
    composed = replace(asked.decide, method="dpf", structure="channels", width="power-of-two")
    result = jpq.optimize(replace(asked, decide=composed))
    assert result.targets["bops"]["reached"] <= result.targets["bops"]["limit"]
    assert {x.w_bits for x in result.layers} | {x.a_bits for x in result.layers} <= {2, 4, 8}
    assert sum(x.outputs for x in result.layers) < sum(x.outputs_all for x in result.layers)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"budget": Budget(target_bops="0.0001%")}, "smallest possible"),
        ({"budget": Budget(target_bops="0%")}, "above 0"),
        ({"budget": Budget(target_bops="120%")}, "more than the fp32 model"),
        ({"budget": Budget(target_bops="0.1%"), "decide": Decide(method="uniform")}, "prunes too"),
        ({"decide": Decide(method="djqp")}, "djpq"),
        ({"decide": Decide(width="bayesian")}, "Unknown width"),
        ({"decide": Decide(method="dhp", structure="2:4")}, "whole channels"),
        ({"task": Task(model="convnett")}, "convnet"),
        ({"task": Task(data="digit")}, "digits"),
        ({"task": Task(weights=Path("nowhere.pth"))}, "nowhere.pth"),
        ({"task": Task(model="vgg7")}, "vgg7|image|channels|8x8|8"),
        ({"run": Run(device="cuda:9")}, "device cuda:9 is not here"),
    ],
)
def test_bad_input_ends_before_training(change, says, tmp_path):
    asked = replace(config(tmp_path), **change)
    asked = replace(asked, run=replace(asked.run, out=tmp_path))
    watch = Stop("float", 1)
    with pytest.raises(JpqError, match=says) as caught:
        jpq.optimize(asked, watch)
    assert len(str(caught.value)) < 500
    assert not hasattr(watch, "next")  # no phase had begun


def test_a_run_leaves_the_number_of_threads_as_it_was(tmp_path, monkeypatch):
    seen = []

    def stop(*_):
        seen.append(torch.get_num_threads())
        raise JpqError("enough")

    monkeypatch.setattr(recipe, "check_all_budgets", stop)
    torch.set_num_threads(2)
    try:
        with pytest.raises(JpqError, match="enough"):
            jpq.optimize(config(tmp_path))
        assert seen == [1]  # a small network
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JpqError, match=r"\bout\b"):
        jpq.optimize(config(tmp_path / "file"))


def test_loss_that_is_not_a_number_names_phase_and_layer(tmp_path):
    asked = config(tmp_path, train=replace(QUICK, float_epochs=2, lr=1e30))
    with pytest.raises(JpqError, match=r"phase float.*(layer|parameter) '"):
        jpq.optimize(asked)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_corrupt_checkpoints_are_refused(content, tmp_path):
    asked = config(tmp_path)
    folder = tmp_path / asked.hash()
    folder.mkdir()
    (folder / checkpoint.NAME).write_bytes(content)
    with pytest.raises(JpqError, match=r"\bresume\b"):
        jpq.optimize(replace(asked, run=replace(asked.run, resume=True)))


def test_foreign_checkpoints_are_refused(tmp_path):
    asked = config(tmp_path)
    folder = tmp_path / asked.hash()
    folder.mkdir()
    resumed = replace(asked, run=replace(asked.run, resume=True))
    for foreign in ({"state_dict": {}}, {"kind": "jpq checkpoint", "settings": "another", "phase": "float"}):
        torch.save(foreign, folder / checkpoint.NAME)
        with pytest.raises(JpqError, match=r"\bresume\b"):
            jpq.optimize(resumed)


@pytest.mark.parametrize("damage", ["plan", "missing", "truncated", "other"])
def test_damaged_run_folders_end_in_a_sentence(damage, finished, tmp_path):
    _, result = finished
    for name in ("plan.json", "model.safetensors"):
        (tmp_path / name).write_bytes((result.folder / name).read_bytes())
    if damage == "plan":
        (tmp_path / "plan.json").write_text("{}")
    elif damage == "missing":
        (tmp_path / "model.safetensors").unlink()
    elif damage == "truncated":
        (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:200])
    else:
        tree = json.loads((tmp_path / "plan.json").read_text())
        tree["layers"]["99"] = next(iter(tree["layers"].values()))
        (tmp_path / "plan.json").write_text(json.dumps(tree))
    with pytest.raises(JpqError):
        jpq.load(tmp_path)
