"""Metrics and losses of each task against computations by hand."""

import math

import pytest
import torch
from made_runs import folder
from torch import Tensor

from jpq.cli.pareto import describe_front
from jpq.results.accuracy_limit import drop_interval
from jpq.results.formatting import format_change, format_metric, metric_scale
from jpq.results.front.front import build_front
from jpq.results.front.points import read_points
from jpq.results.intervals import is_near_chance, is_within_noise, metric_interval
from jpq.tasks import TASKS, Restoration, Segmentation, Task, task_record
from jpq.tasks.metric_text import parse_score
from jpq.types import JpqError

LABELS, MAPS, NUMBERS, IMAGES = (TASKS[n] for n in ("multi-label", "segmentation", "regression", "restoration"))


def evaluated(task: Task, *pairs: tuple[Tensor, Tensor]) -> tuple[float, dict[str, tuple[float, str]]]:
    """Score and other metrics of a network that gives the first of each pair for the second."""
    outputs = iter([output for output, _ in pairs])
    return task.evaluate_all(lambda _: next(outputs), [(torch.zeros(1), target) for _, target in pairs])


def test_mean_average_precision_is_that_of_the_labels_that_occur_over_the_whole_split():
    scores = torch.tensor([[3.0, 1.0, 0.0], [2.0, 2.0, 0.0], [1.0, 3.0, 0.0], [0.5, 4.0, 0.0]])
    target = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]])
    first = (1 / 1 + 2 / 3) / 2  # hits at ranks 1 and 3
    second = (1 / 1 + 2 / 3) / 2  # ranks from the best on: 4.0 hit, 3.0 no, 2.0 hit
    score, others = evaluated(LABELS, (scores[:2], target[:2]), (scores[2:], target[2:]))
    assert score == pytest.approx((first + second) / 2)  # the third label never occurs
    all_above = 2 * 2 / (2 * 2 + 2)  # every score says yes: two hits, two false alarms
    assert others["F1"] == (pytest.approx((2 * all_above + 0) / 3), "%")


def test_binary_cross_entropy_and_divergence_of_labels():
    output, target = torch.tensor([[0.0, 2.0]]), torch.tensor([[1, 0]])
    expected = (math.log(2) + math.log(1 + math.exp(2))) / 2
    assert float(LABELS.loss(output, target)) == pytest.approx(expected)
    p, q = (1 / (1 + math.exp(-v)) for v in (1.0, 0.0))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    found = LABELS.divergence(torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 3.0]]))
    assert float(found) == pytest.approx(kl, rel=1e-5)
    assert LABELS.same_decision(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 1.0]])).tolist() == [[True, False]]


def test_miou_is_over_all_pixels_of_the_split_and_leaves_out_void_and_absent_classes():
    target = torch.tensor([[[0, 0, 1, 255]], [[1, 1, 0, 255]]])
    said = torch.tensor([[[0, 1, 1, 2]], [[1, 1, 1, 0]]])
    output = torch.nn.functional.one_hot(said, 4).permute(0, 3, 1, 2).float()
    # class 0: 1 hit of 3 in the union; class 1: 3 hits of 5; class 2 only at a void pixel, class 3 nowhere
    score, others = evaluated(MAPS, (output[:1], target[:1]), (output[1:], target[1:]))
    assert score == pytest.approx((1 / 3 + 3 / 5) / 2)
    assert others["pixel accuracy"] == (pytest.approx(4 / 6), "%")


def test_the_loss_of_segmentation_is_a_mean_over_pixels_that_have_a_class():
    output = torch.tensor([[[[2.0, 0.0]], [[0.0, 0.0]]]])
    target = torch.tensor([[[0, 11]]])
    assert float(Segmentation(void=11).loss(output, target)) == pytest.approx(math.log(1 + math.exp(-2)))
    assert float(Segmentation(void=0).loss(output, torch.zeros_like(target))) == 0.0
    with pytest.raises(JpqError, match=r"a map of 1 x 2 pixels per sample, as the outputs have.*\[1, 2, 4\]"):
        MAPS.loss(output, torch.zeros(1, 2, 4, dtype=torch.long))
    assert MAPS.chance(2) == pytest.approx(1 / 3)  # a quarter of the pixels in both, three quarters in one


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.bool])
def test_masks_may_be_integers_of_any_type(kind):
    output, target = MAPS.example_batch(2, 2)
    target = target % 2
    MAPS.check_target(target.to(kind), 2)
    assert MAPS.loss(output, target.to(kind)) == MAPS.loss(output, target)
    assert evaluated(MAPS, (output, target.to(kind))) == evaluated(MAPS, (output, target))


@pytest.mark.parametrize("unit", [1e-9, 1e-3, 1.0, 1e6])
def test_r2_does_not_depend_on_the_unit_of_the_targets(unit):
    target = torch.tensor([[1.0, 5.0], [2.0, 6.0], [4.0, 9.0]])
    output = target + torch.tensor([[0.5, -1.0], [-0.5, 0.0], [0.0, 1.0]])
    assert NUMBERS.summarize([(unit * output, unit * target)]) == pytest.approx(0.83104, abs=1e-4)


def test_r2_is_that_of_the_split_and_rmse_is_shown_beside_it():
    target, output = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([[1.0], [2.0], [4.0], [6.0]])
    score, others = evaluated(
        NUMBERS, (output[:3], target[:3]), (output[3:], target[3:])
    )  # targets [B] stand for [B, 1]
    assert score == pytest.approx(1 - 1 / (4 + 1 + 0 + 9))
    assert others["RMSE"] == (pytest.approx(0.5), "")
    assert float(NUMBERS.loss(output, target)) == pytest.approx(0.25)
    with pytest.raises(JpqError, match=r"numbers \[4, 1\], as the outputs are, and the targets of a batch are .*\[3\]"):
        NUMBERS.loss(output, target[:3])
    with pytest.raises(JpqError, match="R² of 1 batch is not a number"):
        evaluated(NUMBERS, (output, torch.ones(4)))


def test_psnr_is_the_mean_over_clipped_images():
    target = torch.full((2, 1, 12, 12), 0.5)
    output = target + torch.tensor([0.1, 0.01])[:, None, None, None]
    score, others = evaluated(IMAGES, (output, target))
    assert score == pytest.approx((20 + 40) / 2, abs=1e-3)
    assert others["SSIM"][0] == pytest.approx(1.0, abs=0.05)
    assert evaluated(IMAGES, (target, target))[0] == 100.0
    white = torch.ones(1, 1, 12, 12)
    assert evaluated(IMAGES, (3 * white, white))[0] == 100.0  # what is brighter than white is white
    border = target.clone()
    border[:, :, 0] = 0
    assert evaluated(Restoration(border=1), (border, target))[0] == 100.0
    assert float(Restoration(error="l1").loss(output, target)) == pytest.approx(0.055 / 0.001**0.5)
    at_30_db = target + 0.001**0.5
    for task, of in ((IMAGES, 1), (Restoration(peak=2.0), 4), (Restoration(error="l1"), 1)):
        assert float(task.loss(at_30_db, target)) == pytest.approx(1 / of if task.error == "mse" else 1, rel=1e-4)
    assert float(IMAGES.distill(at_30_db, target, 2.0)) == pytest.approx(1, rel=1e-4)
    assert float(IMAGES.divergence(at_30_db, target)) == pytest.approx(0.001, rel=1e-4)
    assert IMAGES.same_decision(target, target + 0.019).all()
    assert not IMAGES.same_decision(target, target + 0.021).any()
    assert evaluated(IMAGES, (target[..., :8, :8], target[..., :8, :8]))[1] == {}  # too small for SSIM


@pytest.mark.parametrize(
    ("task", "target", "words"),
    [
        (TASKS["text-classification"], torch.tensor([0, 3]), "is 3, and its 3 classes are numbered from 0 to 2"),
        (TASKS["text-classification"], torch.tensor([[0, 1]]), "class numbers, an integer per sample"),
        (TASKS["text-classification"], torch.tensor([0.0]), "class numbers, an integer per sample"),
        (LABELS, torch.tensor([[0, 1, 2]]), "a row of 3 zeros and ones"),
        (LABELS, torch.tensor([[0, 1]]), "a row of 3 zeros and ones"),
        (
            MAPS,
            torch.tensor([[[0, 7]]]),
            "is 7, and its 3 classes are numbered from 0 to 2, and 255 where there is none",
        ),
        (MAPS, torch.tensor([[[0, -1]]]), "is -1"),
        (MAPS, torch.tensor([0, 1]), "maps of class numbers"),
        (NUMBERS, torch.tensor([[1, 2, 3]]), "rows of 3 real numbers"),
        (NUMBERS, torch.tensor([[1.0, 2.0]]), "rows of 3 real numbers"),
        (NUMBERS, torch.tensor([[1.0, 2.0, math.nan]]), "finite numbers, without NaN"),
        (IMAGES, torch.rand(1, 3, 4, 4) + 1, "between 0 and 1"),
        (IMAGES, [1, 2], "the targets of a batch are list"),
    ],
)
def test_wrong_targets_are_one_sentence(task, target, words):
    with pytest.raises(JpqError) as error:
        task.check_target(target, 3)
    assert words in str(error.value)


def test_a_missing_package_is_one_sentence(monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchmetrics" else found(name))
    words = r"mIoU of task 'segmentation' needs a package that is missing \(torchmetrics\): pip install .jpq\[metrics\]"
    with pytest.raises(JpqError, match=words):
        MAPS.evaluate(lambda x: x, [(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long))])


class Error(Task):
    """A share of errors, which is better where it is lower."""

    name, metric_name, metric_unit, metric_bounds, higher_is_better = "error", "error rate", "%", (0.0, 1.0), False

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Not used."""
        raise NotImplementedError

    def metric(self, output: Tensor, target: Tensor) -> Tensor:
        """Whether the largest output is not that of the target, [B]."""
        return output.argmax(1) != target


def test_a_lower_metric_is_a_larger_score():
    task = Error()
    score, _ = evaluated(task, (torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])))
    assert score == -0.5
    assert task.score_bounds == (-1.0, 0.0)
    assert (format_metric(task, -0.25), format_change(task, -0.01)) == ("25.00 %", "+1.00 points")
    assert metric_scale(task) == -100.0
    assert metric_interval(task, -0.1, 100) == metric_interval(TASKS["classification"], 0.1, 100)
    assert is_within_noise(task, -0.10, -0.11, 100)
    assert not is_within_noise(task, -0.10, -0.5, 100)
    assert is_near_chance(task, -0.5, 100, -0.5)
    assert not is_near_chance(task, -0.4, 100, -0.5)
    drop, mirrored = drop_interval(task, -0.10, -0.14, 200), drop_interval(TASKS["classification"], 0.90, 0.86, 200)
    assert drop == pytest.approx(mirrored)
    assert drop[0] < 0.04 < drop[1]


def test_chance_is_unknown_where_the_default_says_nothing_of_the_metric():
    class Likelihood(Error):
        higher_is_better, metric_bounds = True, (-math.inf, 0.0)

    class WithChance(Likelihood):
        def chance(self, classes: int) -> float:
            return -1.0

    assert not Error().knows_chance
    assert not Likelihood().knows_chance
    assert WithChance().knows_chance
    assert all(task.knows_chance for task in TASKS.values())


def test_a_front_without_a_chance_level_has_no_hypervolume(tmp_path):
    data = {"name": "mine:data", **task_record(Error(), 2)}
    for error, share in ((0.3, 0.01), (0.2, 0.02), (0.1, 0.04)):
        folder(tmp_path, -error, share, held_out={"float": -0.05, "compressed": -error}, data=data)
    front = build_front(read_points(tmp_path).points)
    assert len(front.front_indices) == 3
    text = " ".join(describe_front(front))
    assert "No hypervolume: no run has a held-out error rate better than 0.00 %, the task's chance level, and" in text
    assert "Hypervolume 0" not in text


def test_metrics_that_are_no_means_over_samples_have_no_interval():
    assert metric_interval(MAPS, 0.5, 100) is None
    assert metric_interval(TASKS["text-classification"], 0.5, 100) is not None
    assert is_near_chance(MAPS, 0.05, 100, MAPS.chance(10))
    assert not is_near_chance(IMAGES, 28.0, 10, IMAGES.chance(1))


@pytest.mark.parametrize(
    ("task", "text", "score"),
    [
        (MAPS, "60%", 0.6),
        (MAPS, "0.6", 0.6),
        (IMAGES, "29.5dB", 29.5),
        (IMAGES, "29.5 dB", 29.5),
        (NUMBERS, "0.9", 0.9),
        (Error(), "5%", -0.05),
    ],
)
def test_metrics_are_read_from_text(task, text, score):
    assert parse_score(task, text, "--min-metric") == pytest.approx(score)


@pytest.mark.parametrize(
    ("task", "example"), [(MAPS, "91% or 0.91"), (IMAGES, "11.3dB"), (NUMBERS, "0.5"), (Error(), "9% or 0.09")]
)
def test_a_metric_of_another_form_is_one_sentence(task, example):
    with pytest.raises(JpqError, match=f"min_metric 'good' .* {task.metric_name}. Write it like {example}."):
        parse_score(task, "good", "--min-metric")
