"""BatchNorm that keeps the float model's statistics: the marks, and the choice by what batches cost."""

import copy
from dataclasses import replace
from itertools import islice

import pytest
import torch
from bright_images import Identity, images
from convnet import EXAMPLE, ranked
from runs import config
from safetensors.torch import save_file
from torch import nn

import jpq
from jpq.allocation.ranking.rank import rank_units
from jpq.compression.batchnorm import keep_statistics, moving_norms, start_training
from jpq.compression.calibration import reestimate_batchnorm
from jpq.config import Train
from jpq.methods.scores import SCORES
from jpq.tracing.forward import eval_mode
from jpq.training.batchnorm_choice import MEASURED, BatchStatistics, choose_batchnorm, compare_statistics
from jpq.types import JpqError


def test_kept_statistics_stay_in_training_and_in_copies():
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))
    assert moving_norms(net) == [net[1]]
    keep_statistics(net)
    copied = copy.deepcopy(net)
    assert moving_norms(copied) == []
    start_training(copied)
    assert (copied.training, copied[1].training, copied[2].training) == (True, False, True)
    batches = [(3 + torch.rand(4, 1, 5, 5), None)]
    copied(batches[0][0]).sum().backward()
    assert copied[1].weight.grad is not None  # norms go on learning
    reestimate_batchnorm(copied, batches)
    assert torch.equal(copied[1].running_mean, torch.zeros(4))


def test_modules_that_stay_in_evaluation_mode_do_so_after_a_while_in_it():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()).train()
    net[1].eval()
    with eval_mode(net):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == [True, True, False, True]


def test_rankings_and_discretization_amid_an_epoch_leave_kept_statistics_alone():
    net = ranked()
    keep_statistics(net)
    start_training(net)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    before = copy.deepcopy(norms[0].running_mean)
    for work in (lambda: rank_units(net, SCORES["l1"]), lambda: net.freeze(net.plan())):
        work()
        net(EXAMPLE)
        assert net.training
        assert not any(norm.training for norm in norms)
        assert torch.equal(norms[0].running_mean, before)


def test_norms_without_a_mark_train_and_are_measured_anew():
    net = nn.Sequential(nn.BatchNorm2d(1))
    start_training(net)
    assert net[0].training
    x = 3 + torch.rand(4, 1, 5, 5)
    reestimate_batchnorm(net, [(x, None)])
    assert torch.allclose(net[0].running_mean, x.mean()[None])


def test_small_batches_cost_the_model_its_metric_and_large_ones_do_not():
    few, many = (compare_statistics(Identity(), images(size)) for size in (2, 80))
    assert few.own - few.batches > 3
    assert few.are_harmful
    assert many.own - many.batches < 1.2
    assert not many.are_harmful


def test_statistics_that_are_measured_on_the_same_batches_score_the_same():
    model, data = Identity(), images(2)
    reestimate_batchnorm(model, list(islice(data.train.epoch(0), MEASURED)))
    found = compare_statistics(model, data)
    assert found.own == found.batches


def test_the_largest_batch_is_named_where_the_last_one_is_smaller():
    assert compare_statistics(Identity(), images(100)).samples == 100  # of 160: 100 and 60


@pytest.mark.parametrize(
    ("own", "batches", "chance", "harmful"),
    [
        (0.9, 0.83, 0.1, False),
        (0.9, 0.81, 0.1, True),
        (0.05, 0.01, 0.1, False),
        (5.0, 1.0, float("-inf"), False),
        (-0.5, -0.54, None, False),  # an error of 0.5, which has no chance level
        (-0.5, -0.56, None, True),
    ],
)
def test_a_tenth_above_chance_is_the_limit(own, batches, chance, harmful):
    assert BatchStatistics(own, batches, chance, 4).are_harmful is harmful


@pytest.mark.parametrize(
    ("setting", "size", "kept"), [("auto", 2, 1), ("auto", 80, 0), ("batch", 2, 0), ("frozen", 80, 1)]
)
def test_the_setting_decides_or_leaves_it_to_the_measurement(tmp_path, setting, size, kept):
    net, before = Identity(), Identity().state_dict()
    found = choose_batchnorm(net, images(size), config(tmp_path, train=Train(batchnorm=setting)))
    assert len(moving_norms(net)) == 1 - kept
    assert (found is not None) == (setting == "auto" and bool(kept))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_an_unknown_setting_is_one_sentence(tmp_path):
    with pytest.raises(JpqError, match="Did you mean frozen"):
        config(tmp_path, train=Train(batchnorm="frosen")).check()


@pytest.mark.parametrize(("setting", "moving"), [("auto", 0), ("batch", 1)])
def test_a_run_on_small_batches_keeps_the_statistics_and_says_so(tmp_path, monkeypatch, setting, moving):
    fine_tuned = []
    monkeypatch.setattr("jpq.training.phases.reestimate_batchnorm", lambda net, _: fine_tuned.append(moving_norms(net)))
    save_file(Identity().state_dict(), tmp_path / "identity.safetensors")
    asked = config(tmp_path / "runs", "uniform", Train(epochs=2, lr=1e-3, batchnorm=setting), target_bops="5%")
    source = replace(asked.task, model="bright_images:identity", data="bright_images:images", limit=None)
    result = jpq.optimize(replace(asked, task=replace(source, weights=tmp_path / "identity.safetensors")))
    assert [len(norms) for norms in fine_tuned] == [moving]
    sentence = "BatchNorm keeps the float model's statistics: measured anew on batches of 2 images they change its PSNR"
    assert (sentence in " ".join(result.notes)) == (moving == 0)
