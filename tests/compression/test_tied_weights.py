"""Tied weights: never refused, never pruned, one grid for layers that share one, and the tie is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jpq
from jpq.costs import COSTS
from jpq.export.packed.model import pack_model, unpack_model
from jpq.export.rebuild import build_from_plan, rebuild
from jpq.export.runtimes import Session
from jpq.export.verify import difference


class LanguageModel(nn.Module):
    """An embedding whose table is also the projection back to the vocabulary, and a second name for the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.out = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight
        self.also = nn.Embedding(50, 32)
        self.also.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.out(F.relu(self.inner(self.embed(x) + self.also(x.flip(1))))))


class TwoLinears(nn.Module):
    """Two layers with one weight and biases of their own; the second reads values of another range and sign."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = (nn.Linear(*s) for s in ((8, 32), (32, 32), (32, 32), (32, 4)))
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.b(5 * self.norm(self.a(F.relu(self.first(x)))))))


class TwoConvolutions(nn.Module):
    """Two convolutions with one weight, of which one is dilated and has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.b = nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.b(F.relu(self.a(F.relu(self.first(x)))))))


class Transposed(nn.Module):
    """An autoencoder that decodes with the transposed weight of its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.last = nn.Linear(8, 16), nn.Linear(16, 32), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(F.linear(F.relu(self.a(self.first(x))), self.a.weight.t())))


NETS: dict[str, tuple[type[nn.Module], Any, tuple[str, ...]]] = {
    "embedding": (LanguageModel, lambda: torch.randint(0, 50, (4, 6)), ("embed", "also", "head")),
    "linears": (TwoLinears, lambda: torch.randn(4, 8), ("a", "b")),
    "convolutions": (TwoConvolutions, lambda: torch.randn(4, 3, 8, 8), ("a", "b")),
    "transposed": (Transposed, lambda: torch.randn(4, 8), ("a",)),
}


@pytest.mark.parametrize("method", ["djpq", "l0"])
@pytest.mark.parametrize("name", NETS)
def test_tied_models_are_compressed_and_the_tie_is_kept(name: str, method: str, tmp_path: Path) -> None:
    make, example, tied = NETS[name]
    torch.manual_seed(0)
    model, x = make().eval(), example()
    net = jpq.compress(model, x, method=method, bops="80%" if name == "transposed" else "10%", steps=2).train()
    network = net.net.network
    for site in net.net.sites:
        assert not {tap.layer for tap in site.taps} & set(tied), "no mask lies on a tied weight"
        assert not set(site.producers) & set(tied)
    optimizer = torch.optim.Adam(net.groups())
    (net(x).square().mean() + net.pressure()).backward()
    optimizer.step()
    net.step()
    net.discretize()
    net.eval()
    small, plan = rebuild(net.net, net._dense[0])
    weights = [small.get_parameter(f"{owner}.weight") for owner in tied]
    assert all(weight is weights[0] for weight in weights)
    assert difference(net.net, small, x) < 1e-12
    counted = jpq.measure(small, x)
    assert counted["macs"] == sum(u.macs * u.inputs * u.outputs for u in net.net.exact_usage())
    assert counted["bops"] == COSTS["bops"](net.net.exact_usage())
    if name != "transposed":
        assert all(net.net.quantizers(layer.name) for layer in network.layers), "every layer is quantized"
        reasons = [why for why in network.frozen.values() if "share one weight" in why]
        assert reasons
        size = pack_model(small, plan, x, tmp_path / "m.packed")
        assert size.layers == COSTS["size"](net.net.exact_usage()), "a shared weight is stored once"
        back = unpack_model(build_from_plan(plan, net._dense[0]), tmp_path / "m.packed")
        assert difference(small, back, x) < 1e-5
    jpq.export_onnx(small, x, tmp_path / "m.onnx")
    assert torch.allclose(Session(tmp_path / "m.onnx", optimised=False)(x), small(x), atol=1e-4)
    again = build_from_plan(plan, net._dense[0])
    again.load_state_dict(small.state_dict())
    assert torch.equal(again.eval()(x), small(x))


def test_a_tied_weight_gets_no_mask() -> None:
    model, x = TwoLinears().eval(), torch.randn(4, 8)
    net = jpq.compress(model, x, method="dpf", density=0.5, bops="20%", steps=2)
    assert {site.name for site in net.net.sites} == {"first", "last"}


def test_layers_that_share_a_grid_are_fitted_to_what_both_read() -> None:
    torch.manual_seed(0)
    model, x = TwoLinears().eval(), torch.randn(256, 8)
    net = jpq.compress(model, x, method="uniform", bops="20%", steps=2).net
    a, b = (net.layer(name) for name in "ab")
    assert a.weight_quant.tensor_quant is b.weight_quant.tensor_quant
    pair = net.quantizers("a")
    assert pair is not None
    assert pair[1].signed, "the second reads negative numbers"
    with torch.no_grad():
        largest = (5 * model.norm(model.a(F.relu(model.first(x))))).abs().max()
    assert float(pair[1].threshold) > 0.3 * float(largest)
