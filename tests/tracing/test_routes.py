"""Products in modules' own code as plain layers: equal outputs, all quantized, and equal after cutting and export."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from carried import through_torch_save
from outputs import gap
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.own_products import (
    Bare,
    CastLinear,
    Filters,
    GPTConv,
    Packed,
    SameConv,
    ScaledConv,
    Several,
    StandardConv,
    TransposedConv,
)

import jpq
from jpq.config import Budget, Config, Run, Task, Train
from jpq.export.float_equivalence import check_equivalence
from jpq.export.packed import unpack_model
from jpq.export.rebuild import build_from_plan, complete_plan
from jpq.export.runtimes import Session
from jpq.plan import LayerRoute, Plan, RoutedCall, WeightSource, from_json
from jpq.tracing.find_routes import find_routes
from jpq.tracing.routes import applied_routes, apply_routes
from jpq.types import JpqError


def between(layer: nn.Module, i: int = 8, o: int = 12) -> nn.Module:
    """The layer between two plain convolutions."""
    return nn.Sequential(nn.Conv2d(3, i, 3), nn.Softplus(), layer, nn.Softplus(), nn.Conv2d(o, 4, 1), nn.Flatten())


def between_rows(*layers: nn.Module) -> nn.Module:
    """The layers between two nn.Linear, on [batch, tokens, 12]."""
    return nn.Sequential(nn.Linear(12, 12), nn.Softplus(), *layers, nn.Softplus(), nn.Flatten())


IMAGE, ROWS = (2, 3, 9, 9), (2, 5, 12)

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {  # model, shape of its input, layers
    "standardised": (lambda: between(StandardConv(8, 12, 3)), IMAGE, 3),
    "standardised, grouped": (lambda: between(StandardConv(8, 12, 3, groups=2, stride=2)), IMAGE, 3),
    "standardised, depthwise": (lambda: between(StandardConv(8, 8, 3, groups=8, bias=False), 8, 8), IMAGE, 3),
    "gain": (lambda: between(nn.Sequential(ScaledConv(8, 12, 3), ScaledConv(12, 12, 3, padding=1))), IMAGE, 4),
    "padded by hand": (lambda: between(SameConv(8, 12, 3, dilation=2)), IMAGE, 3),
    "padded by hand, grouped": (lambda: between(SameConv(8, 12, 3, groups=4, dilation=2)), IMAGE, 3),
    "padded by hand, depthwise": (lambda: between(SameConv(8, 8, 3, groups=8), 8, 8), IMAGE, 3),
    "transposed": (lambda: between(TransposedConv(8, 12, 3, stride=2, output_padding=1)), IMAGE, 3),
    "transposed, dilated": (lambda: between(TransposedConv(8, 12, 3, padding=1, dilation=2)), IMAGE, 3),
    "1d": (
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), Bare(F.conv1d, 10, 8, 3), nn.ReLU(), nn.Conv1d(10, 4, 1)),
        (2, 3, 12),
        3,
    ),
    "3d": (
        lambda: nn.Sequential(
            nn.Conv3d(2, 6, 1), nn.ReLU(), Bare(F.conv3d, 8, 6, 3, 3, 3), nn.ReLU(), nn.Conv3d(8, 4, 1)
        ),
        (2, 2, 4, 4, 4),
        3,
    ),
    "expanded buffer": (lambda: between(Filters(8), 8, 8), IMAGE, 3),
    "cast": (lambda: between_rows(CastLinear(12, 20), nn.Softplus(), CastLinear(20, 6)), ROWS, 3),
    "addmm": (lambda: between_rows(GPTConv(12, 20), nn.Softplus(), GPTConv(20, 6)), ROWS, 3),
    "x @ W": (lambda: between_rows(Bare(lambda x, w: x @ w, 12, 20), nn.Linear(20, 6)), ROWS, 3),
    "x @ W.t()": (lambda: between_rows(Bare(lambda x, w: x @ w.t(), 20, 12), nn.Linear(20, 6)), ROWS, 3),
    "x.matmul(W.T)": (lambda: between_rows(Bare(lambda x, w: x.matmul(w.T), 20, 12), nn.Linear(20, 6)), ROWS, 3),
    "W @ x": (lambda: between_rows(Bare(lambda x, w: w @ x, 7, 5), nn.Linear(12, 6)), ROWS, 3),
    "F.linear": (lambda: between_rows(Bare(F.linear, 20, 12), nn.Linear(20, 6)), ROWS, 3),
    "mm": (lambda: between_rows(nn.Flatten(), Bare(torch.mm, 60, 8), nn.Linear(8, 6)), ROWS, 3),
    "tensordot": (
        lambda: between_rows(Bare(lambda x, w: torch.tensordot(x, w, dims=([2], [1])), 20, 12), nn.Linear(20, 6)),
        ROWS,
        3,
    ),
    "einsum": (
        lambda: between_rows(Bare(lambda x, w: torch.einsum("btd,dk->btk", x, w), 12, 20), nn.Linear(20, 6)),
        ROWS,
        3,
    ),
    "einsum with an ellipsis": (
        lambda: between_rows(Bare(lambda x, w: torch.einsum("kd,...d->...k", w, x), 20, 12), nn.Linear(20, 6)),
        ROWS,
        3,
    ),
    "einsum over tokens": (
        lambda: between_rows(Bare(lambda x, w: torch.einsum("btd,ts->bsd", x, w), 5, 7), nn.Linear(12, 6)),
        ROWS,
        3,
    ),
    "einsum to heads": (
        lambda: between_rows(
            Bare(lambda x, w: torch.einsum("btd,dhk->bhtk", x, w), 12, 2, 8),
            Bare(lambda x, w: torch.einsum("bhtk,hkd->btd", x, w), 2, 8, 6),
        ),
        ROWS,
        3,
    ),
    "packed": (Packed, (2, 12), 4),
    "several": (lambda: nn.Sequential(nn.Linear(12, 12), Several(), nn.Linear(12, 4)), (2, 12), 5),
    "several calls": (lambda: TwiceCalled(), (2, 12), 2),
    "helper": (lambda: nn.Sequential(InHelper(), nn.Linear(20, 4)), (2, 12), 2),
}


class TwiceCalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.out = nn.Parameter(torch.randn(12, 12) / 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(torch.tanh(x @ self.w) @ self.w))


class InHelper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 20))

    def project(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.w)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape, _ = MODELS[name]
    return build().double().eval(), torch.randn(shape, dtype=torch.double)


@pytest.mark.parametrize("name", MODELS)
def test_products_become_layers_with_equal_outputs(name: str) -> None:
    model, x = made(name)
    expected = model(x)
    state = copy.deepcopy(model.state_dict())
    plain = jpq.decompose(model, x)
    assert gap(expected, plain(x)) < 1e-12
    assert gap(expected, model(x)) == 0.0, "the model itself must stay as it is"
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    network = jpq.trace(plain, x)
    assert len(network.layers) == MODELS[name][2]
    assert all(type(plain.get_submodule(layer.name)).__module__.startswith("torch.nn.") for layer in network.layers)
    assert (
        sum(p.numel() for p in plain.parameters())
        <= sum(p.numel() for p in [*model.parameters(), *model.buffers()]) + 72
    )
    plain.train()(x).sum().backward()
    assert all(p.grad is not None for p in plain.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", MODELS)
def test_masked_is_rebuilt(name: str) -> None:
    model, x = made(name)
    plain = jpq.decompose(model, x)
    network = jpq.trace(plain, x)
    sites = jpq.channels(network)
    check = check_equivalence(plain, network, sites, x, seed=0)
    assert check.difference < 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_routes_are_applied_again_from_json(name: str) -> None:
    model, x = made(name)
    routes = find_routes(model, x)
    plan = from_json(Plan("djpq", {}, {}, routes=routes).to_json(), "plan")
    assert plan.routes == routes
    again = build_from_plan(plan, model)
    assert applied_routes(again) == routes
    routed = jpq.decompose(model, x)
    again.load_state_dict(routed.state_dict())
    assert gap(routed(x), again(x)) == 0.0
    if all(route.weight.size for route in routes):
        assert gap(model(x), apply_routes(copy.deepcopy(model), routes)(x)) < 1e-12, "views need no values"
    assert len(applied_routes(apply_routes(routed, routes))) == len(routes), "what is there is not made twice"


def compressed(name: str) -> tuple[Any, nn.Module, Tensor]:
    model, x = made(name)
    model, x = model.float(), x.float()
    net = jpq.compress(model, x, bops="6%", steps=2)
    net.train()
    optimizer = torch.optim.Adam(net.groups())
    (net(x).square().mean() + net.pressure()).backward()
    optimizer.step()
    net.step()
    return net, net.finalize(), x


FAST = ["gain", "padded by hand, grouped", "einsum to heads", "packed"]


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_compress_to_a_runtime(name: str, tmp_path: Path) -> None:
    net, small, x = compressed(name)
    plan = complete_plan(net.net)
    assert set(plan.layers) == {layer.name for layer in net.net.network.layers}, "every layer is quantized"
    assert net.share() <= 0.06
    assert gap(copy.deepcopy(net.net).double().eval()(x.double()), copy.deepcopy(small).double()(x.double())) < 1e-9
    assert jpq.measure(small, x)["bops"] == jpq.costs.bops(net.net.exact_usage())
    jpq.export_onnx(small, x, tmp_path / "small.onnx")
    assert gap(small(x), Session(tmp_path / "small.onnx", optimised=False)(x)) < 1e-4
    rebuilt = build_from_plan(from_json(plan.to_json(), "plan"), jpq.decompose(made(name)[0].float()))
    rebuilt.load_state_dict(small.state_dict())
    assert gap(small(x), rebuilt.eval()(x)) == 0.0


def test_a_small_model_is_carried() -> None:
    _, small, x = compressed("gain")
    for carry in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save):
        carried = carry(small)
        assert gap(small(x), carried(x)) == 0.0
        assert set(carried.state_dict()) == set(small.state_dict())


@pytest.mark.slow  # tests of own calls do the same with a smaller model
def test_a_small_model_is_exported_and_compiled() -> None:
    _, small, x = compressed("gain")
    assert gap(small(x), torch.export.export(small, (x,), strict=False).module()(x)) < 1e-6
    assert gap(small(x), torch.compile(small, backend="eager")(x)) < 1e-6


def test_moved_parameters_can_be_read() -> None:
    model, x = made("addmm")
    plain = jpq.decompose(model, x)
    assert torch.equal(plain[2].weight, model[2].weight)
    assert torch.equal(plain[2].bias, model[2].bias)
    assert "2.layer.weight" in plain.state_dict()
    assert plain[2].layer.weight.shape == (20, 12)
    packed = jpq.decompose(*made("packed"))
    assert packed.w.shape == (24, 12)
    assert not hasattr(packed, "other")


class Tied(nn.Module):  # a decoder with the encoder's weight
    def __init__(self) -> None:
        super().__init__()
        self.e, self.m = nn.Linear(12, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.m(F.relu(self.e(x)))), self.e.weight.t())


class Shared(nn.Module):  # the weight is added, too
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + self.w.sum()


class Halves(nn.Module):  # two products read overlapping parts of one weight
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w[:8]).sum(1) + F.linear(x, self.w[4:]).sum(1)


class Returned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.w, self.w


class InTraining(nn.Module):  # a regulariser reads it, in training alone
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + (self.w.square().sum() if self.training else 0.0)


class Noisy(nn.Module):  # DropConnect: another weight in training
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        return x @ F.dropout(self.w, 0.5, self.training)


class Swapped(nn.Module):  # the calls differ in training
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(12, 12)), nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.a, self.b) if self.training else (self.b, self.a)
        return (x @ first).relu() @ second


class Hidden(nn.Module):  # a custom op reads what is a slice elsewhere, which no mode sees
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            total = self.w.sum()
        return F.linear(x, self.w[:6]) + F.linear(x, self.w[6:]) + total


def test_readers_that_cannot_be_observed_are_noticed() -> None:
    model, x = Hidden(), torch.randn(3, 12)
    assert len(find_routes(model, x)) == 2
    plain = jpq.decompose(model, x)
    assert applied_routes(plain) == ()
    assert gap(model(x), plain(x)) == 0.0


@pytest.mark.parametrize("kind", [Tied, Shared, Halves, Returned, InTraining, Noisy, Swapped])
def test_what_is_read_elsewhere_or_differs_in_training_stays(kind: type[nn.Module]) -> None:
    assert find_routes(kind(), torch.randn(3, 12)) == ()


def test_finding_leaves_the_model_and_random_numbers_alone() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.bn = nn.Parameter(torch.randn(12, 12)), nn.BatchNorm1d(12)
            self.register_buffer("steps", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            self.last = x
            return self.bn(F.dropout(x @ self.w, 0.5, self.training))

    model, x = Counting(), torch.randn(4, 12)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert len(find_routes(model, x)) == 1
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    assert model.training
    assert model.bn.training
    assert not hasattr(model, "last")


def test_an_example_that_does_not_fit_is_reported_by_trace() -> None:
    model, x = Several(), torch.randn(2, 7)
    assert find_routes(model, x) == ()
    with pytest.raises(JpqError, match="does not run on the example"):
        jpq.compress(model, x, bops="50%")


def test_another_product_than_was_read_is_refused() -> None:
    class Resized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, self.bias, padding=x.shape[-1] % 2)

    plain = jpq.decompose(Resized(3, 4, 3), torch.randn(1, 3, 8, 8))
    with pytest.raises(JpqError, match="was read with conv2d"):
        plain(torch.randn(1, 3, 9, 9))


def test_a_sum_along_the_other_operand_is_no_bias() -> None:
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, self.weight, x)

    class Rows(Columns):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias[:, None], x.t(), self.weight.t())

    for model in (Columns(), Rows()):  # zeros hide it in the outputs
        assert find_routes(model, torch.randn(5, 6)) == ()


def test_routes_of_another_model_are_refused() -> None:
    model, x = made("addmm")
    routes = find_routes(model, x)
    for other in (nn.Sequential(nn.Linear(12, 12)), between_rows(GPTConv(12, 9), nn.Softplus(), GPTConv(9, 6))):
        with pytest.raises(JpqError, match="is it the same model"):
            apply_routes(other, routes)
    bad = [
        LayerRoute("0", "a b", "Linear", (2, 2), WeightSource(("weight",)), None, {}),
        LayerRoute("2", "weight", "Linear", (2, 2), WeightSource(("weight",)), None, {}),
        LayerRoute("2", "layer", "Identity", (2, 2), WeightSource(("weight",)), None, {}),
        LayerRoute("2", "layer", "Linear", (2, 2), WeightSource(("weight",), (2, 2), (400, 1)), None, {}),
        LayerRoute("2", "layer", "Linear", (2, 2), WeightSource(("forward",)), None, {"mm:0": RoutedCall()}),
        LayerRoute("2", "layer", "Linear", (2**20, 2**20), WeightSource(("weight",)), None, {}),
        LayerRoute("2", "layer", "Linear", (), WeightSource(()), None, {}),
    ]
    for route in bad:
        with pytest.raises(JpqError, match="is it the same model"):
            apply_routes(copy.deepcopy(model), [route])


def test_plans_without_routes_are_written_as_before() -> None:
    text = Plan("djpq", {}, {}).to_json()
    assert "routes" not in text
    assert from_json(text, "plan").routes == ()
    routes = find_routes(*made("addmm"))
    text = Plan("djpq", {}, {}, routes=routes).to_json()
    for old, new in (('"operand": 0', '"operand": 2'), ('"kind": "Linear"', '"kind": 3'), ("-1", "1")):
        assert old in text
        with pytest.raises(JpqError, match="not a plan"):
            from_json(text.replace(old, new), "plan")


def test_optimize_saves_every_form_and_loads_it(tmp_path: Path) -> None:
    config = Config(
        task=Task(model="zoo.own_products:OwnProducts", limit=200),
        budget=Budget(target_bops="3%", target_macs="60%"),
        train=Train(epochs=2, float_epochs=1, lr=3e-3),
        run=Run(out=tmp_path, device="cpu", formats="onnx,qonnx,pt2"),
    )
    result = jpq.optimize(config)
    assert result.verified["masked_vs_rebuilt_float64"] <= 1e-9
    small, plan = jpq.load(result.folder, run_code=True)
    assert len(plan.layers) == 8
    assert [route.module for route in plan.routes] == [f"body.{i}" for i in (2, 4, 5, 7, 11, 13, 15)]
    x = jpq.tasks.data.load("digits").example
    assert gap(small(x), Session(result.folder / "model.onnx", optimised=False)(x)) < 1e-3
    assert gap(small(x), torch.export.load(result.folder / "model.pt2").module()(x)) < 1e-3
    assert gap(small(x), unpack_model(small, result.folder / "model.packed")(x)) < 1e-3
