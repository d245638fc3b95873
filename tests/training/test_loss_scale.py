"""Small losses are brought to about 1 beside budget and distillation; runs do not depend on their unit."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from jpq.config import Budget, Config, Run, Train
from jpq.config import Task as TaskSettings
from jpq.recipe import optimize
from jpq.tasks import Task, data, models
from jpq.tasks.batches import Batches
from jpq.tasks.data import load
from jpq.training.loss_scale import choose_loss_scale, loss_scale_note

X = torch.rand(120, 6, generator=torch.Generator().manual_seed(0))
Y = 2 + 3 * X[:, :1] - 2 * X[:, 1:2]


class Temperature(Task):
    """Regression whose loss is counted in a unit of choice."""

    name, metric_name, metric_unit = "temperature", "MAE", "K"
    metric_bounds = (0.0, float("inf"))
    higher_is_better = False
    unit = 1.0

    def loss(self, output, target):
        return self.unit * F.smooth_l1_loss(output, target)

    def metric(self, output, target):
        return (output - target).abs().mean(1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 1))


@pytest.fixture
def served(monkeypatch):
    """The name of a module with data, network and a task, whose loss has the unit that is set on it."""
    module = ModuleType("small_loss")
    module.readings = lambda: [DataLoader(TensorDataset(X, Y), batch_size=30)] * 3  # type: ignore[attr-defined]
    module.network, module.Temperature = network, Temperature  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "small_loss", module)
    return monkeypatch


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        F.mse_loss(model(X), Y).backward()
        optimizer.step()
    file = tmp_path_factory.mktemp("weights") / "float.pth"
    torch.save(model.state_dict(), file)
    return file


def run(folder, weights, unit, monkeypatch):
    monkeypatch.setattr(Temperature, "unit", unit)
    task = TaskSettings(
        model="small_loss:network", data="small_loss:readings", task="small_loss:Temperature", weights=weights
    )
    train = Train(epochs=8, lr=0.01, batch_size=30, distill=0.0)
    return optimize(Config(task=task, budget=Budget(target_bops="3%"), train=train, run=Run(out=folder)))


def test_a_search_does_not_depend_on_the_unit_of_a_small_loss(served, weights, tmp_path):
    """Units that are powers of two change no other bit; unscaled, the budget closes all channels of such a network."""
    one, other = (run(tmp_path / str(power), weights, 2.0**power, served) for power in (-12, -15))
    assert one.layers == other.layers
    assert one.compressed.accuracy == other.compressed.accuracy
    assert ["it is multiplied by" in note for note in one.notes][:1] == [True]  # and no guess is better than this error
    assert -one.compressed.accuracy < 0.3  # guessing the mean is wrong by 0.8


def test_the_factor_makes_the_loss_of_exchanged_outputs_one(served, weights):
    model = network()
    model.load_state_dict(torch.load(weights))
    served.setattr(Temperature, "unit", 1e-4)
    found = load("small_loss:readings", task="small_loss:Temperature")
    scale = choose_loss_scale(model, found)
    x, y = next(iter(found.train))
    assert scale * float(found.task.loss(model(x).roll(1, 0), y)) == pytest.approx(1, rel=1e-5)
    assert f"multiplied by {scale:.3g}" in loss_scale_note(scale, "temperature")


@pytest.mark.parametrize("unit", [1.0, 1e6, -1.0, 0.0])
def test_usual_large_negative_and_empty_losses_stay_as_they_are(served, unit):
    served.setattr(Temperature, "unit", unit)
    assert choose_loss_scale(network(), load("small_loss:readings", task="small_loss:Temperature")) == 1
    assert loss_scale_note(1, "temperature") == ""


class Certain(nn.Module):
    """Says one class, whatever the sample."""

    def forward(self, x):
        return F.one_hot(torch.zeros(len(x), dtype=torch.long), 10) * 20.0


def test_losses_of_classifiers_stay_as_they_are_even_for_batches_of_one_class():
    digits = data.load("digits", limit=100)
    assert choose_loss_scale(models.build("convnet", classes=10), digits) == 1
    x, y = next(iter(digits.train))
    zeros = Batches(x, torch.zeros_like(y), batch_size=len(x))
    assert float(digits.task.loss(Certain()(x).roll(1, 0), torch.zeros_like(y))) < 1e-3
    assert choose_loss_scale(Certain(), replace(digits, train=zeros)) == 1


def test_a_batch_of_one_sample_tells_nothing(served):
    served.setattr(Temperature, "unit", 1e-4)
    found = load("small_loss:readings", task="small_loss:Temperature")
    assert choose_loss_scale(network(), found) > 1
    assert choose_loss_scale(network(), replace(found, train=Batches(X, Y, batch_size=1))) == 1
