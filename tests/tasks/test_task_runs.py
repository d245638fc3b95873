"""Every task through a whole run: training, budget, export, verification, reports, fronts and runtimes."""

import json
import math
from dataclasses import replace

import pytest
import torch
from runs import config

import jpq
from jpq.cli.main import main
from jpq.config import Train
from jpq.results.front.front import build_front
from jpq.results.front.points import read_points
from jpq.types import JpqError

TRAIN = Train(epochs=6, float_epochs=12, lr=1e-2)

SLOW = pytest.mark.slow

RUNS = [  # task, name of data and network in tests/support/tiny_tasks.py, smallest metric of float and compressed model
    pytest.param("multi-label", "labels", 0.95, 0.9, "mean AP", "F1", marks=SLOW),
    ("segmentation", "maps", 0.9, 0.7, "mIoU", "pixel accuracy"),
    pytest.param("regression", "table", 0.8, 0.5, "R²", "RMSE", marks=SLOW),
    pytest.param("restoration", "noisy", 22.0, 19.0, "PSNR", "SSIM", marks=SLOW),
    ("text-classification", "texts", 0.9, 0.8, "are right", ""),
    pytest.param("sequence-classification", "series", 0.9, 0.8, "are right", "", marks=SLOW),
]


def optimize(tmp_path, name, task="", train=TRAIN, target="5%"):
    asked = config(tmp_path, train=train, target_bops=target)
    parts = replace(asked.task, model=f"tiny_tasks:{name}_net", data=f"tiny_tasks:{name}", task=task, limit=None)
    return jpq.optimize(replace(asked, task=parts))


@pytest.mark.parametrize(("task", "name", "whole", "small", "metric", "other"), RUNS)
def test_a_task_runs_through_training_export_reports_and_runtimes(
    task, name, whole, small, metric, other, tmp_path, capsys
):
    result = optimize(tmp_path, name)
    assert result.task.name == task
    assert json.loads((result.folder / "result.json").read_text())["data"]["task"] == task
    assert result.float.accuracy > whole
    assert result.compressed.accuracy > small
    assert result.compressed.bops_share <= 0.05
    agreement = result.verified["rebuilt_vs_onnxruntime"]
    assert (agreement["images"], agreement["argmax_differs"]) == (40, 0)

    capsys.readouterr()
    assert main(["evaluate", str(result.folder), "--run-code", "--runtime", "onnxruntime"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count(metric) == 2  # of the PyTorch model and of the file
    assert other in printed
    total = agreement["decisions"]
    assert f"for {total:,} of {total:,} as the PyTorch model" in printed

    front = build_front(read_points(tmp_path).points)
    assert (front.task.name, front.points[0].accuracy) == (task, result.held_out["compressed"])
    assert main(["pareto", str(tmp_path), "--out", str(tmp_path / "front")]) == 0
    assert f"on the front of held-out {front.task.metric_name} and BOPs" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_search_weighs_the_loss_of_restoration_against_the_budget(tmp_path):
    """By plain squared errors of 0.002 the budget decides alone: half of the MACs go, and 3.4 dB."""
    result = optimize(tmp_path, "noisy", train=Train(epochs=12, float_epochs=20, lr=5e-3), target="1.5%")
    assert result.held_out["compressed"] > result.held_out["float"] - 1
    assert sum(layer.macs for layer in result.layers) > 0.8 * result.float.macs


@pytest.mark.slow
def test_a_detector_runs_through_training_export_and_runtimes(tmp_path, capsys):
    train = Train(epochs=4, float_epochs=14, lr=3e-3)
    result = optimize(tmp_path, "boxes", train=train, target="6%")
    assert result.float.accuracy > 0.15
    assert result.compressed.accuracy > 0.05
    check = result.verified["rebuilt_vs_onnxruntime"]
    assert (check["decisions"], check["argmax_differs"]) == (40 * 64, 0)  # 64 anchors an image
    capsys.readouterr()
    assert main(["evaluate", str(result.folder), "--run-code", "--runtime", "onnxruntime"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("AP50") == 2
    assert "The same box for 2,560 of 2,560 as the PyTorch model." in printed


def test_a_task_of_the_users_own_whose_metric_falls(tmp_path, capsys):
    result = optimize(tmp_path, "table", "tiny_tasks:absolute_error")
    assert result.task.name == "absolute-error"
    assert -0.4 < result.float.accuracy < 0  # the score is the negative error
    assert result.held_out["compressed"] < 0

    from rich.console import Console

    from jpq.cli.optimize import print_result

    print_result(result, Console(width=160))
    assert f"MAE {-result.float.accuracy:.4g} K" in " ".join(capsys.readouterr().out.split())
    assert main(["evaluate", str(result.folder)]) == 2
    assert "add --run-code" in " ".join(capsys.readouterr().err.split())
    assert main(["evaluate", str(result.folder), "--run-code"]) == 0
    assert f"MAE {-result.compressed.accuracy:.4g} K on 40 test rows of table" in " ".join(
        capsys.readouterr().out.split()
    )

    assert main(["list", str(tmp_path)]) == 0
    assert f"MAE {-result.compressed.accuracy:.4g} K" in " ".join(capsys.readouterr().out.split())
    front = ["pareto", str(tmp_path), "--out", str(tmp_path / "front"), "--min-metric"]  # reads none of the user's code
    assert main([*front, "10K"]) == 0
    assert "K held-out" in " ".join(capsys.readouterr().out.split())
    assert main([*front, "0.0001 K"]) == 2
    assert "the lowest MAE is" in " ".join(capsys.readouterr().err.split())
    assert main([*front, "good"]) == 2
    assert "'good' is not a number of MAE. Write it like 0.4K." in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "task", "words"),
    [
        ("table", "segmentation", "Task 'segmentation' reads maps of class numbers"),
        ("maps", "regression", "Task 'regression' reads rows of 3 real numbers"),
        ("table", "regresion", "Unknown task 'regresion'. Did you mean regression or"),
        ("table", "tiny_tasks:nothing", "nothing"),
        ("table", "tiny_tasks:noisy", "Task 'tiny_tasks:noisy' returned Data; it must return a jpq.tasks.base.Task"),
    ],
)
def test_a_task_that_does_not_match_is_one_sentence(name, task, words, tmp_path):
    with pytest.raises(JpqError) as error:
        optimize(tmp_path, name, task)
    assert words in str(error.value)


def test_a_metric_that_is_no_number_is_one_sentence(monkeypatch):
    import tiny_tasks

    data = tiny_tasks.table()
    with pytest.raises(JpqError, match=r"The R² of 2 batches is not a number; look for NaN"):
        data.task.evaluate(lambda x: torch.full((len(x), 1), math.nan), data.test)
    with pytest.raises(JpqError, match="A split without a single batch has no R²"):
        data.task.evaluate(lambda x: x, [])
