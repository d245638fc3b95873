"""Learned rounding: blocks, weights that stay on their grid, the optimum where it can be counted out, and bad input."""

import copy
import csv
import itertools

import pytest
import torch
from torch import nn

import jpq
from jpq.allocation.decision_data import PlanEvaluator
from jpq.allocation.prepare import prepare
from jpq.compression.masking import original
from jpq.compression.power_of_two_steps import round_activation_steps
from jpq.config import Budget, Config, Decide, Run, Task, Train
from jpq.training.reconstruction import reconstruct
from jpq.training.reconstruction_blocks import find_blocks


class Residual(nn.Module):
    def __init__(self, width, wider=0):
        super().__init__()
        out = width + wider
        self.first = nn.Conv2d(width, out, 3, padding=1)
        self.norm = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, padding=1, groups=out)
        self.wider = wider

    def forward(self, x):
        out = self.second(self.norm(self.first(x)).relu())
        return out if self.wider else out + x


class Net(nn.Module):
    """A stem, a residual block, one of its class without an addition, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.Sequential(Residual(4), Residual(4, wider=2))
        self.head = nn.Linear(6, 3)
        self.offset = nn.Parameter(torch.zeros(2, 4, 8, 8))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x) + 0).mean((2, 3)))


def attached(model, batches, **decide):
    """The model under decisions by hand, frozen as before a fine-tuning."""
    config = Config(decide=Decide(**decide)).check()
    prepared = prepare(model, batches[0], config.decide, config.budget)
    net = prepared.attach(model, batches)
    evaluator = PlanEvaluator(lambda *_: iter([(x, None) for x in batches]), lambda plan: 0.0, 0, None)
    net.freeze(prepared.procedure.decide(net, (), config.decide, evaluator))
    round_activation_steps(net)
    return net.eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = Net()
    for _ in range(3):
        net(torch.randn(32, 1, 8, 8))
    return net.eval()


@pytest.fixture(scope="module")
def batches():
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(32, 1, 8, 8, generator=draw) for _ in range(4)]


def test_blocks_are_residual_ones_of_their_class_and_single_layers(model, batches):
    layers = ["stem.0", "blocks.0.first", "blocks.0.second", "blocks.1.first", "blocks.1.second", "head"]
    found = {block.name: block.layers for block in find_blocks(model, layers, batches[0])}
    assert list(found) == ["stem.0", "blocks.0", "blocks.1", "head"]
    assert sorted(itertools.chain(*found.values())) == sorted(layers)
    assert found["blocks.1"] == ("blocks.1.first", "blocks.1.second")


def test_a_layer_that_is_called_twice_is_in_no_block():
    shared = nn.Linear(4, 4)
    assert find_blocks(nn.Sequential(shared, nn.ReLU(), shared), ["0"], torch.randn(3, 4)) == ()


def test_learned_weights_lie_on_the_grid_and_blocks_come_nearer(model, batches):
    torch.manual_seed(0)
    net = attached(model, batches, bits="3/6", densities="0.75")
    before = {n: original(net.layer(n), "weight").clone() for n in ("stem.0", "blocks.0.first")}
    steps = {layer.name: net.quantizers(layer.name)[0].scale() for layer in net.network.layers}
    masked = {layer.name: net.layer(layer.name).weight == 0 for layer in net.network.layers}
    assert any(mask.any() for mask in masked.values())
    trainable = [p.requires_grad for p in net.parameters()]
    errors = reconstruct(net, model, batches, steps=60)
    assert [p.requires_grad for p in net.parameters()] == trainable
    assert sum(error.after for error in errors) < sum(error.before for error in errors)
    for layer in net.network.layers:
        grid, weight = net.quantizers(layer.name)[0], net.layer(layer.name).weight
        assert torch.equal(grid.scale(), steps[layer.name])
        torch.testing.assert_close(grid(weight)[0], weight, rtol=1e-6, atol=1e-7)
        assert torch.equal(weight == 0, (weight == 0) | masked[layer.name])
    for name, weight in before.items():
        now, mask = original(net.layer(name), "weight"), masked[name]
        assert torch.equal(now[mask], weight[mask]), "what is behind a mask stays"
        assert not torch.equal(now[~mask], weight[~mask])


def test_it_is_the_same_in_every_run(model, batches):
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        net = attached(model, batches, bits="3/4")
        reconstruct(net, model, batches, steps=10, seed=3)
        states.append(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_models_stay_in_their_modes(model, batches):
    teacher, net = copy.deepcopy(model).train(), attached(model, batches, bits="3/4")
    norm = net.model.get_submodule("stem.1")
    teacher.stem[1].eval()
    net.train()
    norm.eval()
    reconstruct(net, teacher, batches, steps=2)
    assert teacher.training
    assert net.training
    assert not teacher.stem[1].training
    assert not norm.training


def test_the_rounding_of_few_weights_is_far_better_than_nearest():
    """Inputs that go together: nearest is far from the best, which is counted out over all roundings of six weights."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(256, 1, generator=draw) + 0.3 * torch.randn(256, 6, generator=draw)
    model = nn.Sequential(nn.Linear(6, 1, bias=False)).eval()
    net = attached(model, [x[:128], x[128:]], bits="3/8")
    grid = net.quantizers("0")[0]
    step = grid.scale().detach()
    weight = step * torch.tensor([[1.4, 0.4, -0.6, 0.4, 1.4, -1.6]])  # all are rounded down, and errors add up
    for layer in (model[0], net.layer("0")):
        original(layer, "weight").data.copy_(weight)
    rounded = net.model[0].input_quant(x)
    sides = [grid((torch.floor(weight / step) + side) * step)[0][0] for side in (0, 1)]

    def error(w):
        return float((rounded @ w - x @ weight[0]).square().mean())

    picks = itertools.product((0, 1), repeat=6)
    errors = sorted(error(torch.stack([sides[side][i] for i, side in enumerate(pick)])) for pick in picks)
    nearest = error(grid(weight)[0][0])
    assert errors[0] < 0.1 * nearest
    (block,) = reconstruct(net, model, [x], steps=400)
    assert block.before == pytest.approx(nearest, rel=1e-4)
    assert errors[0] * 0.999 <= block.after <= 0.1 * nearest


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": Train(effort="hours")}, "effort"),
        ({"train": Train(warm_start="qat")}, "reconstruction"),
        ({"train": Train(effort="minutes", warm_start="reconstruction")}, "nothing is trained after it"),
        ({"train": Train(effort="minutes"), "decide": Decide(open_norms=True)}, "--open-norms"),
        ({"train": Train(reconstruction_steps=-1)}, "0 or more"),
    ],
)
def test_settings_that_cannot_work(settings, words):
    with pytest.raises(jpq.JpqError) as error:
        Config(budget=Budget(target_bops="1%"), **settings).check()
    assert words in error.value.command_line


def test_methods_that_learn_in_training_are_refused(tmp_path):
    config = Config(
        budget=Budget(target_bops="1%"),
        decide=Decide(method="l0"),
        train=Train(effort="minutes"),
        run=Run(out=tmp_path),
    )
    with pytest.raises(jpq.JpqError, match="decides by training") as error:
        jpq.optimize(config)
    assert "measured" in error.value.command_line
    assert list(tmp_path.iterdir()) == []


def minutes(tmp_path, **decide):
    return Config(
        task=Task(limit=300),
        decide=Decide(**decide),
        train=Train(effort="minutes", float_epochs=4, reconstruction_steps=20, reconstruction_samples=64),
        run=Run(out=tmp_path, name="a"),
    )


@pytest.mark.slow
def test_a_run_of_minutes_is_checked_like_any_other(tmp_path):
    result = jpq.optimize(minutes(tmp_path, bits="4/4", densities="0.75"))
    assert {row.phase for row in result.history} == {"float", "reconstruction"}
    assert result.verified["masked_vs_rebuilt_float64"] <= 1e-9
    assert result.verified["metric"]["file"] == pytest.approx(result.verified["metric"]["model"], abs=0.01)
    with (tmp_path / "a" / "reconstruction.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["0", "3", "6", "11"]
    assert sum(float(row["after"]) for row in rows) < sum(float(row["before"]) for row in rows)


@pytest.mark.slow
def test_a_warm_start_is_fine_tuned(tmp_path):
    config = minutes(tmp_path, bits="4/4")
    train = Train(warm_start="reconstruction", epochs=2, float_epochs=4, reconstruction_steps=10)
    result = jpq.optimize(Config(config.task, config.budget, config.decide, train, config.run), final=False)
    assert [row.phase for row in result.history] == ["float"] * 4 + ["reconstruction"] + ["fine-tune"] * 2


def test_a_session_reconstructs_once_its_decisions_are_final(model, batches):
    torch.manual_seed(0)
    session = jpq.compress(model, batches[0], method="uniform", bops="2%")
    if session.controller is not None or session.second_stage is not None:
        with pytest.raises(jpq.JpqError, match="discretize"):
            session.reconstruct(batches, steps=10)
    session.discretize()
    assert [error.name for error in session.reconstruct(batches, steps=10)] == [
        "stem.0",
        "blocks.0",
        "blocks.1",
        "head",
    ]
    assert session.finalize()(batches[0]).shape == (32, 3)
