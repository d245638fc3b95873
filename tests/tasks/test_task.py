"""The task axis: laws of every task, the classification formulas, and a second task through a whole run."""

import json
import math
from dataclasses import replace

import pytest
import torch
from regression import Regression, table
from runs import config
from torch import nn

import jpq
from jpq.cli.main import main
from jpq.config import Train
from jpq.results.front.front import build_front
from jpq.results.front.points import read_points
from jpq.tasks import CLASSIFICATION, TASKS, pick_task, recorded_task, task_record
from jpq.testing import check_task
from jpq.types import JpqError

SCORES = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.5]])
CLASSES = torch.tensor([0, 2])


@pytest.mark.parametrize("name", {Regression.name: None, **TASKS})
def test_laws_of_every_task(name):
    """The laws of `jpq.testing`; a new row of TASKS is taken up by itself."""
    check_task(TASKS[name] if name in TASKS else Regression())


def test_classification_is_cross_entropy_accuracy_and_the_largest_score():
    output, target = SCORES, CLASSES
    expected = [
        math.log(sum(math.exp(v) for v in row)) - row[k] for row, k in zip(output.tolist(), target, strict=True)
    ]
    assert float(CLASSIFICATION.loss(output, target)) == pytest.approx(sum(expected) / 2)
    assert CLASSIFICATION.metric(output, target).tolist() == [True, False]
    assert CLASSIFICATION.chance(4) == 0.25
    assert CLASSIFICATION.decision_gap(output, output).tolist() == pytest.approx([1 / 3, 2.5 / 3])


def test_distillation_is_the_divergence_of_softened_scores_times_the_square_of_the_temperature():
    student, teacher, temperature = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), 4.0
    p = 1 / (1 + math.exp(2 / temperature))  # of the teacher's first class
    q = 1 / (1 + math.exp(-1 / temperature))  # of the student's
    divergence = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert float(CLASSIFICATION.distill(student, teacher, temperature)) == pytest.approx(16 * divergence, rel=1e-5)


def test_divergences_of_probabilities_are_in_nats():
    for name in ("classification", "segmentation", "multi-label"):
        assert TASKS[name].divergence_unit == "nats"
    assert "nats" in TASKS["detection"].divergence_unit
    assert "anchors" in TASKS["detection"].divergence_unit
    assert "variance" in TASKS["regression"].divergence_unit
    assert "peak" in TASKS["restoration"].divergence_unit


def test_outputs_without_classes_agree_within_a_tenth_of_their_range():
    a = torch.tensor([[1.0], [10.0], [5.0]])
    b = torch.tensor([[1.9], [11.1], [5.0]])
    assert CLASSIFICATION.same_decision(a, b).tolist() == [True, False, True]
    assert CLASSIFICATION.decision_gap(a, b).tolist() == pytest.approx([0.09, 0.11, 0.0])


def test_one_decision_a_place_where_outputs_are_maps():
    a, b = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    a[:, 0] = b[:, 0] = 1.0
    b[0, 1, 0, 0] = 2.0
    same = CLASSIFICATION.same_decision(a, b)
    assert same.shape == (2, 2, 2)
    assert int((~same).sum()) == 1


def test_the_metric_of_a_split_is_the_mean_over_its_samples_in_evaluation_mode():
    data, net = table(), nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(16, 1)).train()
    measured = data.task.evaluate(net, data.test)
    assert net.training
    net.eval()
    with torch.no_grad():
        rows = [(net(x), y) for x, y in data.test]
    output, target = (torch.cat(parts) for parts in zip(*rows, strict=True))
    assert measured == pytest.approx(float(1 - (output - target).square().mean()), rel=1e-5)


def test_records_name_tasks_but_classification(monkeypatch):
    assert task_record(CLASSIFICATION) == {}
    assert recorded_task({"name": "digits"}) is CLASSIFICATION
    assert task_record(TASKS["segmentation"]) == {"task": "segmentation"}
    with pytest.raises(JpqError, match="Unknown task 'regresion'"):
        pick_task("regresion")
    with pytest.raises(JpqError, match="Unknown task 'table-regression': first import the module that adds it"):
        recorded_task({"task": "table-regression"})
    monkeypatch.setitem(TASKS, "table-regression", Regression())
    assert recorded_task(task_record(Regression())) is TASKS["table-regression"]


def test_a_task_of_the_users_own_is_known_by_its_record():
    record = json.loads(json.dumps(task_record(Regression(), 1)))
    task = recorded_task(record)
    assert (task.name, task.metric_name, task.metric_unit, task.higher_is_better) == (
        "table-regression",
        "R^2",
        "",
        True,
    )
    assert (task.score_bounds, task.chance(7), task.is_mean_over_samples) == ((-math.inf, 1.0), 0.0, True)
    with pytest.raises(JpqError, match="known here by the record of a run alone"):
        task.loss(SCORES, CLASSES)
    for broken in ({"bounds": [0]}, {"name": "[red]R"}, {"chance": "much"}):
        with pytest.raises(JpqError, match="Unknown task 'table-regression'"):
            recorded_task({**record, "metric": {**record["metric"], **broken}})


def test_a_second_task_runs_through_training_verification_reports_and_fronts(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "table-regression", Regression())
    asked = config(tmp_path, train=Train(epochs=12, float_epochs=12, lr=1e-2), target_bops="3%")
    asked = replace(asked, task=replace(asked.task, model="regression:network", data="regression:table", limit=None))
    result = jpq.optimize(asked)
    assert result.data["task"] == "table-regression"
    assert result.task is TASKS["table-regression"]
    assert result.float.accuracy > 0.9
    assert result.compressed.accuracy > 0.7
    assert result.compressed.bops_share <= 0.03
    agreement = result.verified["rebuilt_vs_onnxruntime"]
    assert (agreement["decisions"], agreement["argmax_differs"]) == (200, 0)
    saved = json.loads((result.folder / "result.json").read_text())
    assert saved["data"]["task"] == "table-regression"

    small, _ = jpq.load(result.folder, run_code=True)
    data = table()
    assert data.task.evaluate(small, data.test) == pytest.approx(result.compressed.accuracy)
    assert main(["evaluate", str(result.folder), "--run-code", "--runtime", "onnxruntime"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"R^2 {result.compressed.accuracy:.4g} on 200 test samples of table" in printed
    assert "The same number for 200 of 200 as the PyTorch model." in printed

    front = build_front(read_points(tmp_path).points)
    assert front.task is TASKS["table-regression"]
    assert front.points[0].accuracy == result.held_out["compressed"]
    assert front.points[0].chance == 0.0
    assert main(["pareto", str(tmp_path), "--out", str(tmp_path / "front")]) == 0
    assert "on the front of held-out R^2 and BOPs" in " ".join(capsys.readouterr().out.split())

    monkeypatch.delitem(TASKS, "table-regression")
    assert main(["pareto", str(tmp_path), "--out", str(tmp_path / "front")]) == 0  # by the record of its metric
    assert "on the front of held-out R^2 and BOPs" in " ".join(capsys.readouterr().out.split())


def test_divergence_is_the_kl_divergence_over_dim_1_and_otherwise_the_squared_error_over_the_variance():
    reference, output = torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    p, q = torch.softmax(reference, 1), torch.softmax(output, 1)
    expected = float((p * (p / q).log()).sum(1).mean())
    assert float(CLASSIFICATION.divergence(output, reference)) == pytest.approx(expected, rel=1e-6)
    maps = [t[:, :, None, None].expand(-1, -1, 3, 5) for t in (output, reference)]
    assert float(CLASSIFICATION.divergence(*maps)) == pytest.approx(expected, rel=1e-6)
    numbers = torch.tensor([[1.0], [3.0]])
    for task in (Regression(), CLASSIFICATION):
        assert float(task.divergence(torch.full_like(numbers, 2.0), numbers)) == pytest.approx(1.0)
        assert float(task.divergence(numbers, numbers)) == 0.0
