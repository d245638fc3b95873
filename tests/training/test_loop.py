"""The training loop: terms of the loss, parameter groups of the optimizer, learning rate, BatchNorm after training."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import kills
from torch import Tensor, nn

import jpq
from jpq import costs
from jpq.compression.calibration import reestimate_batchnorm
from jpq.methods.quantizers import IntegerQuantizer
from jpq.tasks import data, load
from jpq.tracing.missing_gradients import name_missing_gradient
from jpq.training.epochs import Phase
from jpq.training.history import NullObserver
from jpq.training.loop import Objective, Recorder, build_optimizer, fit, pressure
from jpq.types import JpqError

X, Y = torch.zeros(1, 2), torch.tensor([0])


class Scores(nn.Module):
    """The same class scores whatever the input."""

    def __init__(self, *scores):
        super().__init__()
        self.scores = nn.Parameter(torch.tensor([scores]))

    def forward(self, x):
        return 1.0 * self.scores


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)),
    )


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", limit=300)


def session(method):
    return jpq.compress(small_net(), torch.rand(8, 1, 8, 8), method, bops="2%", steps=10)


# the loss


def test_distillation_counts_its_weight_times_the_square_of_the_temperature():
    """loss = CE + weight * T^2 * KL(teacher || student), both softened by T."""
    student, teacher, weight, temperature = Scores(1.0, 0.0), Scores(0.0, 2.0), 0.7, 2.0
    cross_entropy = math.log(1 + math.exp(-1))
    p, q = 1 / (1 + math.exp(2 / temperature)), 1 / (1 + math.exp(-1 / temperature))
    divergence = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    loss = Objective(teacher, weight, temperature)(student, X, Y, 0.0)
    assert float(loss) == pytest.approx(cross_entropy + weight * temperature**2 * divergence, rel=1e-5)


def test_the_factor_of_a_small_loss_multiplies_that_alone():
    student, teacher = Scores(1.0, 0.0), Scores(0.0, 2.0)
    plain, scaled = (Objective(teacher, 0.7, 2.0, scale=scale)(student, X, Y, 0.0) for scale in (1.0, 5.0))
    assert float(scaled - plain) == pytest.approx(4 * math.log(1 + math.exp(-1)), rel=1e-5)


def test_distillation_teaches_the_student_alone():
    student, teacher = Scores(1.0, 0.0), Scores(0.0, 2.0)
    Objective(teacher, 1.0, 2.0)(student, X, Y, 0.0).backward()
    assert teacher.scores.grad is None
    alone = Scores(1.0, 0.0)
    F.cross_entropy(alone(X), Y).backward()
    pull = student.scores.grad - alone.scores.grad
    assert pull[0, 0] > 0 > pull[0, 1]  # a step against it moves towards the teacher's second class


def test_the_gates_regulariser_is_weighted_by_the_budgets_multiplier():
    joint = session("dpp")
    net, controller = joint.net, joint.controller
    penalty = float(net.penalty())
    assert penalty > 0
    for multiplier in (0.25, 3.0):
        controller.pressure.update(dict.fromkeys(controller.pressure, multiplier))
        state = controller.state()
        with_penalty = pressure(net, controller, 0.5, 0.1)
        controller.restore(state)
        without = pressure(net, controller, 0.5, 0.0)
        assert controller.multiplier() == pytest.approx(multiplier, rel=0.2)  # one step has moved it
        assert float(with_penalty - without) == pytest.approx(0.1 * controller.multiplier() * penalty, rel=1e-3)


def test_a_priced_regulariser_pulls_each_unit_as_hard_as_its_cost_weighs_in_the_loss():
    net, controller = (joint := session("djpq")).net, joint.controller
    controller.pressure.update(dict.fromkeys(controller.pressure, 2.0))
    decisions = net.unit_decisions()
    uses = net.soft_usage(decisions)
    cost = float(costs.bops(net.exact_usage()))
    net.priced_penalty(controller.weighted_cost(uses), decisions).backward()
    for site, gate in zip(net.sites, net.gates, strict=True):
        plan = net.plan()
        without_one = replace(plan, kept={**plan.kept, site.name: (False, *plan.kept[site.name][1:])})
        price = 2.0 * (cost - float(costs.bops(net.exact_usage(without_one)))) / cost
        alpha = gate.margin().exp()
        expected = -0.5 * price * alpha / (1 + alpha)  # KL by ln sigma^2
        assert torch.allclose(gate.log_var.grad, expected, rtol=2e-3)
    assert float(net.penalty()) == 0  # counted once


# the optimizer


def names_of(net, group):
    name_by_id = {id(p): name for name, p in net.named_parameters()}
    return {name_by_id[id(p)] for p in group["params"]}


@pytest.mark.parametrize("method", ["djpq", "gdp", "uniform"])
def test_weights_of_layers_decay_and_nothing_else(method):
    net = session(method).net
    optim = build_optimizer(net, 1e-3, 0.1, gate_lr=0.05, bit_lr=0.02)
    decayed = {name for group in optim.param_groups if group["weight_decay"] for name in names_of(net, group)}
    layers = {f"model.{i}.parametrizations.weight.original" for i in (0, 3, 8)}
    assert decayed <= layers | {f"model.{i}.weight" for i in (0, 3, 8)}
    assert len(decayed) == 3
    others = {name for group in optim.param_groups if not group["weight_decay"] for name in names_of(net, group)}
    assert {"model.1.weight", "model.1.bias", "model.8.bias"} <= others
    assert any("log_threshold" in name for name in others)  # ranges of the quantizers
    assert decayed | others <= set(dict(net.named_parameters()))


def test_decisions_have_their_own_rates_and_no_decay():
    net = session("djpq").net
    groups = build_optimizer(net, 1e-3, 0.1, gate_lr=0.05, bit_lr=0.02).param_groups
    assert [(g["peak"], g["weight_decay"], g["curve"]) for g in groups] == [
        (1e-3, 0.1, True),
        (1e-3, 0.0, True),
        (0.05, 0.0, False),
        (0.02, 0.0, False),
    ]
    decisions = net.decisions()
    assert [len(g["params"]) for g in groups[2:]] == [len(decisions["gates"]), len(decisions["bits"])]
    assert len(build_optimizer(net, 1e-3, 0.1).param_groups) == 2  # decisions that are fixed are not trained


def test_a_rebuilt_models_norms_and_ranges_do_not_decay():
    joint = session("djpq")
    joint.discretize()
    small = joint.finalize()
    optim = build_optimizer(small, 1e-3, 0.1)
    decayed, plain = (names_of(small, group) for group in optim.param_groups)
    assert decayed == {"0.weight", "3.weight", "8.weight"}
    assert {"1.weight", "1.bias", "4.weight", "8.bias"} <= plain
    ranges = {name for name, m in small.named_modules() if isinstance(m, IntegerQuantizer)}
    assert ranges
    assert {f"{name}.log_threshold" for name in ranges} <= plain
    assert (optim.param_groups[0]["weight_decay"], optim.param_groups[1]["weight_decay"]) == (0.1, 0.0)


# the learning rate


class Rates(NullObserver):
    """Notes the rate of every group after each step."""

    def __init__(self, optim):
        self.optim, self.rates = optim, []

    def step(self, loss, bops_share, limit_share):
        self.rates.append([group["lr"] for group in self.optim.param_groups])


def test_the_rate_of_weights_rises_then_falls_to_nothing_and_that_of_decisions_stays(digits):
    joint = session("djpq")
    optim = build_optimizer(joint.net, 1e-3, 0.0, gate_lr=0.05, bit_lr=0.02)
    watch, phase = Rates(optim), Phase("search", 12)
    recorder = Recorder(lambda: 0.0, full_bops=1.0)
    fit(joint.net, digits, phase, Objective(controller=joint.controller), optim, recorder, watch)
    weights, plain, gates, bits = zip(*watch.rates, strict=True)
    steps = len(weights) / phase.epochs
    assert weights == plain == tuple(1e-3 * phase.rate(i / steps) for i in range(len(weights)))
    top = max(weights)
    rising, falling = weights[: weights.index(top) + 1], weights[weights.index(top) :]
    assert list(rising) == sorted(rising)
    assert list(falling) == sorted(falling, reverse=True)
    assert 0.95e-3 < top <= 1e-3
    assert weights[0] < 0.1 * top
    assert weights[-1] < 0.01 * top
    assert weights[len(weights) // 2] == pytest.approx(0.5e-3, rel=0.1)  # a cosine is at its half in the middle
    assert set(gates) == {0.05}
    assert set(bits) == {0.02}
    assert [row.lr for row in recorder.rows] == [weights[i] for i in range(int(steps) - 1, len(weights), int(steps))]


# operators without a gradient


@torch.library.custom_op("loop_test::half", mutates_args=())
def half(x: Tensor) -> Tensor:
    return x / 2


class Half(nn.Module):
    """An operator without register_autograd."""

    def forward(self, x):
        return torch.ops.loop_test.half(x)


def test_an_operator_without_a_gradient_is_named(digits):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Half())
    optim = build_optimizer(net, 1e-3, 0.0)
    with pytest.raises(JpqError, match=r"The operator loop_test\.half has no gradient, which training needs: give it"):
        fit(net, digits, Phase("float", 1), Objective(), optim, Recorder(lambda: 0.0))


@pytest.mark.parametrize(
    ("message", "name"),
    [("the derivative for 'aten::nextafter' is not implemented.", "aten::nextafter"), ("out of memory", None)],
)
def test_only_missing_gradients_are_renamed(message, name):
    with pytest.raises(JpqError if name else RuntimeError, match=name or message), name_missing_gradient():
        raise RuntimeError(message)


# after training


def test_batchnorm_is_measured_anew_after_fine_tuning(tmp_path, monkeypatch):
    """The model has plain averages over training batches, not the moving average of the training.

    Seen before its norms are folded into the layers that they read, which leaves mean 0 and variance 1.
    """
    monkeypatch.setattr("jpq.results.finish.round_weight_steps", lambda model, example: [])
    config = kills.tiny_config(tmp_path)
    small, _ = jpq.load(jpq.optimize(config, final=False).folder)
    before = {n: b.clone() for n, b in small.named_buffers() if "running" in n}
    assert before
    splits = load.read_data(config, torch.device("cpu"))
    reestimate_batchnorm(small, splits.train.epoch(config.train.epochs))
    after = dict(small.named_buffers())
    for name, value in before.items():
        assert torch.allclose(after[name], value, rtol=1e-3, atol=1e-5), name
