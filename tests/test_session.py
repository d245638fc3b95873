"""The three-line use, on real data, in somebody else's loop."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from runs import trained
from small_net import trained_small
from torch import nn

import jpq
from jpq.allocation import prepare
from jpq.tasks import TASKS, build_model
from jpq.tasks.data import load
from jpq.tracing.trace import trace
from jpq.types import JpqError


@pytest.fixture(scope="module")
def digits():
    return load("digits", batch_size=64)


@pytest.fixture(scope="module")
def float_model(digits):
    return trained(digits)


def accuracy(model, batches):
    model.eval()
    with torch.no_grad():
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / batches.size


def epochs(data, count):
    """The batches of the first `count` epochs."""
    return [batch for epoch in range(count) for batch in data.train.epoch(epoch)]


def run(net, batches, lr=2e-3):
    optimizer = torch.optim.Adam(net.groups(lr=lr))
    net.train()
    for x, y in batches:
        loss = F.cross_entropy(net(x), y) + net.pressure()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.step()


def land(model, batches, method, search, tuning):
    """(rebuilt model, share of its budget of 1 % that it uses) after training on `search`, then on `tuning`."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    net = jpq.compress(model, batches[0][0], method, bops="1%", steps=len(search), evidence=batches[:1])
    run(net, search)
    net.discretize()
    run(net, tuning)
    small = net.finalize()
    assert isinstance(small, nn.Module)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # the user's model is untouched
    counted = jpq.measure(small, batches[0][0])
    return small, counted["bops"] / (0.01 * jpq.costs.baseline(net.net.exact_usage())["bops"])


@pytest.fixture(scope="module")
def small_task():
    """(net of four layers, its trace, its batches)."""
    batches = list(load("digits", batch_size=32).train.epoch(0))
    model = trained_small(batches)
    return model, trace(model, (batches[0][0],)), batches


@pytest.mark.parametrize("method", sorted(jpq.METHODS))
def test_every_method_lands_on_its_budget_in_a_users_own_loop(method, small_task, monkeypatch):
    model, network, batches = small_task
    monkeypatch.setattr(prepare, "trace", lambda *_, **__: network)
    _, used = land(model, batches, method, batches[:6], batches[:2])
    assert used <= 1
    if method in ("djpq", "l0"):
        assert used >= 0.97


@pytest.mark.parametrize(
    "method", ["djpq", *(pytest.param(method, marks=pytest.mark.slow) for method in ("pdp", "admm"))]
)
def test_methods_keep_the_accuracy_in_a_users_own_loop(method, digits, float_model):
    search, tuning = (epochs(digits, n) for n in (5, 5))  # steps that became powers of two take an epoch or two
    small, used = land(float_model, search, method, search, tuning)
    assert used <= 1
    assert accuracy(small, digits.held_out) > 0.9


def test_pruned_networks_are_physically_smaller(digits, float_model):
    x, _ = next(iter(digits.train.epoch(0)))
    net = jpq.compress(float_model, x, method="djpq", macs="30%", steps=4 * len(digits.train))
    run(net, epochs(digits, 4))
    small = net.finalize()
    weights = lambda m: sum(p.numel() for n, p in m.named_parameters() if n.endswith("weight"))  # noqa: E731
    assert weights(small) < 0.6 * weights(float_model)
    assert jpq.measure(small, x)["macs"] <= 0.3 * jpq.costs.baseline(net.net.exact_usage())["macs"]


def test_pressure_is_zero_once_landed(digits, float_model):
    x, _ = next(iter(digits.train.epoch(0)))
    net = jpq.compress(float_model, x, bops="1%", steps=10)
    assert float(net.pressure().detach()) > 0
    net.discretize()
    assert float(net.pressure()) == 0
    assert net.share() <= 0.01
    with pytest.raises(JpqError, match=r"Unknown cost 'bop'\. Did you mean bops"):
        net.share("bop")
    with pytest.raises(JpqError, match=r"give jpq\.compress a table of latencies"):
        net.share("latency")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "No target"),
        ({"bops": "0"}, "bops=0 "),
        ({"bops": 0.01}, "^bops=0.01 allows nothing. Give an amount above 0, or a share such as 5%.$"),
        ({"bops": True}, "^bops 'True' is not an amount"),
        ({"bops": "1%", "method": "djqp"}, "djpq"),
        ({"bops": "1%", "cost": "bops-structure"}, "bops-structured"),
        ({"bops": "0.00001%"}, "smallest possible"),
        ({"size": "1KB2"}, "^size '1KB2' is not an amount"),
    ],
)
def test_bad_requests(given, says, float_model):
    with pytest.raises(jpq.JpqError, match=says):
        jpq.compress(float_model, torch.rand(8, 1, 8, 8), **given)


def test_numbers_are_amounts(float_model):
    session = jpq.compress(float_model, torch.rand(8, 1, 8, 8), "uniform", bops=300_000_000, steps=1)
    assert [(target.cost, target.limit) for target in session.targets] == [("bops", 300_000_000)]


@pytest.mark.parametrize("method", ["dpf", "pdp", "dsp", "spp"])
def test_landing_before_the_search_ends_keeps_the_density(method, float_model):
    batch = torch.rand(16, 1, 8, 8)
    net = jpq.compress(float_model, batch, method=method, bops="2%", steps=100, density=0.3)
    for _ in range(4):
        net(batch).square().mean().backward()
        net.step()
    plan = net.discretize()
    uses = [u for u in net.net.exact_usage(plan) if u.name in plan.masks]
    kept = sum(u.weights * u.density for u in uses) / sum(u.weights for u in uses)
    assert 0.25 < kept < 0.4


@pytest.mark.parametrize("names", ["conv1", ["conv1"], ("conv1",)])
def test_layers_are_named_by_one_name_or_several(names):
    model = build_model("resnet8", 10).eval()
    x = torch.randn(4, 3, 32, 32)
    net = jpq.compress(model, x, bops="30%", keep_float=names, steps=1)
    assert "conv1" not in net.net.plan().layers
    net = jpq.compress(model, x, bops="30%", skip=names, steps=1)
    assert "conv1" in net.net.plan().layers
    assert not any("conv1" in site.producers for site in net.net.sites)


@pytest.mark.parametrize("method", ["pdp", "dpf", "smart"])
def test_impossible_targets_are_refused_before_training_where_layers_share_a_density(method, float_model):
    batch = torch.rand(16, 1, 8, 8)
    with pytest.raises(jpq.JpqError, match="smallest possible is") as error:
        jpq.compress(float_model, batch, method=method, bops="0.001%", density=0.3)
    least = int(re.search(r"smallest possible is ([\d,]+)", str(error.value))[1].replace(",", ""))
    net = jpq.compress(float_model, batch, method=method, bops=str(least), steps=20, density=0.3)
    assert net.discretize().masks


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"table": "t.csv"}, "jpq.export.timing.read_table"),
        ({"method": "catro", "evidence": torch.zeros(3, 1, 8, 8)}, "batches of"),
        ({"method": "measured", "evidence": [torch.zeros(4, 1, 8, 8)]}, "batches of"),
        (
            {"method": "two-stage", "score": "taylor", "evidence": [(torch.zeros(4, 1, 8, 8), torch.full((4,), 99))]},
            "classes as whole numbers",
        ),
        (
            {"method": "two-stage", "score": "taylor", "evidence": [(torch.zeros(4, 1, 8, 8), torch.zeros(4))]},
            "classes as whole numbers",
        ),
        ({"method": "two-stage", "allocator": "sampled"}, "needs data"),
        ({"method": "djpq", "allocator": "greedy"}, "two-stage or upscale"),
        ({"method": "admm", "structure": "3=channels"}, "for the whole network"),
        ({"w_bits": 4}, "^w_bits=4: give a smallest and a largest bit-width, 2 <= small <= large <= 8.$"),
        ({"a_bits": (2, 4.5)}, r"^a_bits=\(2, 4.5\): give a smallest and a largest bit-width"),
        ({"w_bits": (2, 4, 8)}, r"^w_bits=\(2, 4, 8\): give a smallest"),
        ({"a_bits": "48"}, "give a smallest and a largest bit-width"),
        ({"steps": 0}, "^steps=0: give the number of optimiser steps of the search, a whole number above 0.$"),
        ({"steps": -1}, "^steps=-1: give"),
        ({"steps": 2.5}, "^steps=2.5: give"),
        ({"steps": "10"}, "^steps='10': give"),
        ({"steps": True}, "^steps=True: give"),
    ],
)
def test_arguments_that_make_no_sense_end_in_a_sentence(asked, words):
    model = jpq.tasks.models.build("convnet", 10, 1)
    with pytest.raises(jpq.JpqError, match=words):
        jpq.compress(model, torch.randn(4, 1, 8, 8), bops="1%", **asked)


def test_landing_fits_ranges_to_what_layers_read_when_the_search_has_ended(digits, float_model):
    """What was calibrated at the start is out of date by then: here one layer's input grows to 16 times its size.

    A power of two, as steps of activations are.
    """
    found = {}
    for growth in (1, 16):
        net = jpq.compress(float_model, digits.example, bops="0.5%", steps=2)
        modules = dict(net.net.model.named_modules())
        with torch.no_grad():
            modules["1"].weight.mul_(growth)
            modules["1"].bias.mul_(growth)
        before = net.net.plan().layers["3"].a_bits
        net.discretize()
        assert net.net.plan().layers["3"].a_bits < before
        found[growth] = float(net.net.quantizers("3")[1].threshold)
    assert found[16] == pytest.approx(16 * found[1], rel=1e-5)


def trained_badly(model, images, batches, steps, calls):
    """The warnings of `finalize` after a loop that only makes the given calls."""
    net = jpq.compress(model, images, bops="5%", steps=steps)
    optimizer = torch.optim.Adam(net.groups())
    for _ in range(batches):
        loss = net(images).square().mean() + (net.pressure() if "pressure" in calls else 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if "step" in calls:
            net.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small = net.finalize()
    assert float(jpq.measure(small, images)["bops"]) > 0
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("batches", "steps", "calls", "says"),
    [
        (3, 3, ("step", "pressure"), []),
        (0, 1000, (), []),
        (3, 3, ("pressure",), [r"step\(\) was never called in 3 training passes"]),
        (3, 3, ("step",), [r"pressure\(\) was never called"]),
        (3, 3, (), [r"step\(\) was never called in 3", r"pressure\(\) was never called"]),
        (3, 1000, ("step", "pressure"), [r"ends at step 3 of 1000.*\(steps=3\)"]),
    ],
)
def test_calls_that_a_loop_forgets_are_named(batches, steps, calls, says):
    images = torch.rand(8, 1, 8, 8)
    model = jpq.tasks.models.build("convnet", 10, 1)
    said = [
        text for text in trained_badly(model, images, batches, steps, calls) if "()" in text or "The search" in text
    ]
    assert len(said) == len(says), said
    for text, pattern in zip(said, says, strict=True):
        assert re.search(pattern, text), text


def test_accumulated_gradients_are_no_mistake():
    from jpq.training.loop_use import LoopUse

    assert LoopUse(passes=64, pressures=64, steps=1).describe_mistakes(1, 1) == []
    assert "1 times in 65 training passes" in LoopUse(passes=65, pressures=65, steps=1).describe_mistakes(1, 1)[0]
    assert LoopUse(passes=2, pressures=2, steps=2).describe_mistakes(95, 100) == [], "a loaded state counts"


@pytest.mark.parametrize("steps", [-1, 1.5, True])
def test_steps_of_a_reconstruction_that_cannot_be_are_refused(steps):
    x = torch.randn(8, 4)
    net = jpq.compress(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), x, "uniform", bops="10%")
    with pytest.raises(JpqError, match="0 or more"):
        net.reconstruct([x], steps=steps)


@pytest.mark.parametrize("batches", [[(torch.randn(8, 4), torch.zeros(8))], torch.randn(8, 4)], ids=["pairs", "tensor"])
def test_batches_of_a_reconstruction_are_inputs_without_labels(batches):
    x = torch.randn(8, 4)
    net = jpq.compress(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), x, "uniform", bops="10%")
    with pytest.raises(JpqError, match="without labels"):
        net.reconstruct(batches, steps=1)
    assert len(net.reconstruct([(x,)], steps=0)) == 2


def regressor(outputs=1):
    """A network of 16 hidden units, of which the first four alone reach the output, and samples for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, outputs))
    with torch.no_grad():
        model[2].weight[:, 4:] = 0
    return model, torch.randn(64, 4)


def discretized(net):
    """The plan of a session that has not trained, without the warnings that say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return net.discretize()


@pytest.mark.parametrize("outputs", [1, 2])
def test_scores_of_a_regression_need_its_task(outputs):
    model, x = regressor(outputs)
    pairs = [(x, model(x).detach() + 1)]
    net = jpq.compress(model, x, "taylor", macs="50%", density=0.5, evidence=pairs)
    with pytest.raises(JpqError, match="task="):
        discretized(net)  # its cross entropy says nothing
    net = jpq.compress(model, x, "taylor", macs="50%", density=0.5, evidence=pairs, task=TASKS["regression"])
    kept = discretized(net).kept["0"]
    assert all(kept[:4])
    assert not all(kept)


def test_probabilities_may_be_labels_of_scores():
    model, x = regressor(3)
    pairs = [(x, torch.rand(64, 3).softmax(1))]
    net = jpq.compress(model, x, "taylor", macs="50%", density=0.5, evidence=pairs)
    assert not all(discretized(net).kept["0"])


def test_measuring_is_in_the_distance_of_the_task_that_is_given(tmp_path):
    """Both outputs rise alike with the first unit: classes do not see it, and squared errors see nothing else."""
    model, x = regressor(2)
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].weight[:, 0] = 1
        model[2].weight[0, 1] = 1e-3
    seen = {}
    for name in ("classification", "regression"):
        file = tmp_path / f"{name}.csv"
        table = jpq.sensitivity(model, x, task=TASKS[name], out=file)
        rows = table[(table.what == "weight") & (table["name"] == "0") & (table.value == 2)]
        seen[name] = float(rows.divergence.iloc[0])
        jpq.compress(model, x, "measured", bops="10%", evidence=[(x, None)], task=TASKS[name], sensitivity=file)
    assert seen["regression"] > 100 * seen["classification"]
    with pytest.raises(JpqError, match="for the task 'classification'"):
        jpq.compress(
            model,
            x,
            "measured",
            bops="10%",
            evidence=[(x, None)],
            task=TASKS["regression"],
            sensitivity=tmp_path / "classification.csv",
        )
