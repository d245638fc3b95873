"""Several inputs, keywords, dictionaries, tuples out, auxiliary heads: traced, compressed, rebuilt, exported."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch
from rich.console import Console
from thinned import thinned
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import IMAGE, ZOO, Head, Residual, conv

import jpq
from jpq.cli.inspect import show_inspection
from jpq.export.runtimes import Session
from jpq.tracing.forward import call_model, collect_tensors
from jpq.tracing.shrink import remove_channels
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace

G = torch.Generator().manual_seed(5)
IMAGES = torch.randn(8, 3, 8, 8, generator=G)
DEPTHS = torch.randn(8, 2, 8, 8, generator=G)


class Out(NamedTuple):
    score: Tensor
    map: Tensor


class Two(nn.Module):
    """Image and depth map in; a score, a map and something that is no tensor out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(2, 8), conv(8, 6), Head(6)

    def both(self, image: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        x = self.c(self.a(image) + self.b(depth))
        return self.head(x), x.mean(1, keepdim=True)

    def forward(self, image: Tensor, depth: Tensor) -> Any:
        score, place = self.both(image, depth)
        return score, [place, "a note"]


class Named(Two):
    def forward(self, *, image: Tensor, depth: Tensor) -> Any:
        return Out(*self.both(image, depth))


class Batch(Two):
    def forward(self, batch: Mapping[str, Tensor], scale: float = 1.0) -> Any:
        score, place = self.both(batch["image"] * scale, batch["depth"])
        return OrderedDict(score=score, place=place)


class Several(Two):
    def forward(self, parts: list[Tensor]) -> Any:
        return {"all": self.both(*parts)}


class Keyed(Two):  # its layers are called by keyword
    def forward(self, image: Tensor, depth: Tensor) -> Any:
        x = self.a[0](input=image) + self.b[0](input=depth)
        return self.head(self.c(F.softplus(x)))


FORMS: dict[str, tuple[Callable[[], nn.Module], Any, list[str], list[str]]] = {
    "tuple": (Two, (IMAGES, DEPTHS), ["image", "depth"], ["output_0", "output_1"]),
    "list of arguments": (Two, [IMAGES, DEPTHS], ["image", "depth"], ["output_0", "output_1"]),
    "keywords": (Named, {"image": IMAGES, "depth": DEPTHS}, ["image", "depth"], ["output_0", "output_1"]),
    "keywords, other order": (Named, {"depth": DEPTHS, "image": IMAGES}, ["depth", "image"], ["output_0", "output_1"]),
    "dictionary": (Batch, ({"image": IMAGES, "depth": DEPTHS}, 0.5), ["batch_0", "batch_1"], ["score", "place"]),
    "list": (Several, ([IMAGES, DEPTHS],), ["parts_0", "parts_1"], ["all_0", "all_1"]),
    "layers by keyword": (Keyed, (IMAGES, DEPTHS), ["image", "depth"], ["output"]),
}


def doubled(x: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda v: v.double() if isinstance(v, Tensor) else v, x)


@pytest.mark.parametrize("name", FORMS)
def test_read_and_shrunk(name: str) -> None:
    make, example, _, _ = FORMS[name]
    torch.manual_seed(0)
    model = make().double().eval()
    example = doubled(example)
    network = trace(model, example)
    assert sum(layer.macs for layer in network.layers) == 64 * 9 * (3 * 8 + 2 * 8 + 8 * 6) + 24
    sites = channels(network)
    assert "a.0" in [s.name for s in sites]
    gone = [int(c) for s in sites for c in s.labels[1::2]]
    masked = copy.deepcopy(model)
    for site in sites:
        for tap in site.taps:
            weight = masked.get_parameter(network.layer(tap.layer).weight)
            keep = torch.tensor([[float(int(c) not in gone) for c in site.labels]], dtype=torch.double)
            weight.data.mul_(tap.structure.expand(keep, weight.shape))
    small = remove_channels(model, network, gone)
    for a, b in zip(
        collect_tensors(call_model(masked, example)), collect_tensors(call_model(small, example)), strict=True
    ):
        assert float((a - b).abs().max()) < 1e-12 * float(a.abs().max())


SIMILAR = ("list", "list of arguments", "keywords")  # to others of FORMS


@pytest.mark.parametrize("name", thinned(FORMS, lambda _, name: name not in SIMILAR))
def test_compressed_and_exported(name: str, tmp_path: Path) -> None:
    make, example, inputs, outputs = FORMS[name]
    torch.manual_seed(0)
    model = make()
    net = jpq.compress(model, example, bops="8%", steps=4)
    assert all(net.net.quantizers(layer.name) for layer in net.net.network.layers)
    optimizer = torch.optim.Adam(net.groups())
    for _ in range(4):
        loss = sum(t.square().mean() for t in collect_tensors(call_model(net, example))) + net.pressure()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.step()
    small = net.finalize()
    counted = jpq.measure(small, example)
    assert counted["bops"] <= 0.08 * jpq.costs.baseline(net.net.exact_usage())["bops"]
    assert counted["bops"] == jpq.costs.bops(net.net.exact_usage())
    path = tmp_path / "small.onnx"
    jpq.export_onnx(small, example, path)
    session = Session(path, optimised=False)
    assert [i.name for i in session._session.get_inputs()] == inputs
    assert [o.name for o in session._session.get_outputs()] == outputs
    found = jpq.verify(net.net, small, path, [(example, None)], example)
    assert found["masked_vs_rebuilt_float64"] < 1e-9
    assert found["rebuilt_vs_onnxruntime"]["images"] == 8
    half = torch.utils._pytree.tree_map(lambda v: v[:3] if isinstance(v, Tensor) else v, example)
    for a, b in zip(collect_tensors(call_model(small, half)), collect_tensors(call_model(session, half)), strict=True):
        assert a.shape == b.shape, "the batch is dynamic"


def test_decisions_of_a_dense_output_are_counted_place_by_place() -> None:
    from jpq.export.verify import compare
    from jpq.tasks import CLASSIFICATION

    scores = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    other = scores.clone()
    other[0, :, 0, 0] = scores[0, :, 0, 0].flip(0) + torch.tensor([0.0, -9.0, 0.0])
    one: Callable[[Tensor], Any] = lambda x: (scores, x[:, 0, 0, 0])  # noqa: E731
    found = compare(one, lambda x: (other, x[:, 0, 0, 0] * 1.5), [(torch.ones(2, 1, 1, 1), None)], CLASSIFICATION)
    assert found["images"] == found["at_a_rounding_boundary"] == 2
    assert found["decisions"] == 2 * 16 + 2
    assert found["argmax_differs"] == 1 + 2, "one of 32 places, and two numbers that are off by half"
    assert found["argmax_agreement"] == pytest.approx(31 / 34)


class WithAux(nn.Module):
    """A head that only trains, on channels in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 6), conv(6, 7), conv(7, 8), Head(8)
        self.aux = nn.Sequential(conv(7, 5), Head(5))

    def forward(self, x: Tensor) -> Any:
        x = self.b(self.a(x))
        y = self.head(self.c(x))
        return {"out": y, "aux": self.aux(x)} if self.training else y


def test_a_head_that_only_trains_keeps_what_it_reads() -> None:
    torch.manual_seed(0)
    model = WithAux().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    network = trace(model, IMAGE)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {s.name: s.n for s in channels(network)} == {"a.0": 6, "c.0": 8}
    assert {network.frozen[int(c)] for c in network.layer("b.0").outputs} == {
        "read or made by 'aux.0.0', which only runs in training"
    }
    assert network.idle == ("aux.0.0", "aux.0.1", "aux.1.2")
    assert [layer.name for layer in network.layers] == ["a.0", "b.0", "c.0", "head.2"], "it costs nothing when deployed"
    small = remove_channels(model, network, [int(c) for s in channels(network) for c in s.labels[::2]])
    assert set(small.train()(IMAGE)) == {"out", "aux"}
    net = jpq.compress(model, IMAGE, bops="10%", steps=3)
    optimizer = torch.optim.Adam(net.groups())
    for _ in range(3):
        out = net.train()(IMAGE)
        (out["out"].square().mean() + out["aux"].square().mean() + net.pressure()).backward()
        optimizer.step()
        net.step()
    assert torch.is_tensor(net.finalize()(IMAGE))


def test_parameters_that_nobody_reads_are_named() -> None:
    model = Residual()
    model.unused = nn.Linear(3, 3)
    network = trace(model, IMAGE)
    assert network.idle == ("unused",)
    console = Console(width=150)
    with console.capture() as shown:
        console.print(show_inspection("mine", model, network, channels(network), 1.0, False, False))
    assert "only training, or nobody, uses unused" in shown.get()
    assert [s.name for s in channels(network)] == ["stem.0", "a.0"]


def test_a_training_mode_that_cannot_be_read_stops_nobody() -> None:
    class Needs(WithAux):
        def forward(self, x: Tensor) -> Any:
            if self.training and x.sum() > 0:
                return self.aux(x)
            return super().forward(x)

    network = trace(Needs(), IMAGE)
    assert network.idle == ("aux.0.0", "aux.0.1", "aux.1.2")
    assert [s.name for s in channels(network)] == ["a.0", "b.0", "c.0"]


@pytest.mark.slow
def test_googlenet_with_its_auxiliary_heads() -> None:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False, num_classes=10)
    example = torch.randn(2, 3, 64, 64)
    network = trace(model, example)
    assert {name.split(".")[0] for name in network.idle} == {"aux1", "aux2"}
    sites = channels(network)
    plain = channels(trace(torchvision.models.googlenet(weights=None, aux_logits=False, init_weights=False), example))
    kept = {s.name for s in plain} - {s.name for s in sites}
    assert {name.split(".")[0] for name in kept} == {"inception4a", "inception4d"}, "what the two heads read"
    small = remove_channels(model, network, [int(c) for s in sites for c in s.labels[1::2]]).train()
    out = small(example)
    assert [o.shape for o in (out.logits, out.aux_logits1, out.aux_logits2)] == [(2, 10)] * 3


def test_segmentation() -> None:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    example = torch.randn(1, 3, 64, 64)
    network = trace(model, example)
    sites = channels(network)
    small = remove_channels(model, network, [int(c) for s in sites for c in s.labels[1::2]])
    assert small(example)["out"].shape == (1, 21, 64, 64)
    assert sum(p.numel() for p in small.parameters()) < 0.5 * sum(p.numel() for p in model.parameters())


def test_two_outputs_of_the_zoo_export(tmp_path: Path) -> None:
    make, example = ZOO["two_outputs"]
    net = jpq.compress(make(), example, bops="20%", steps=2)
    small = net.finalize()
    jpq.export_onnx(small, example, tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx", optimised=False)
    assert [o.name for o in session._session.get_outputs()] == ["map", "class"]
    a, b = session(example)
    assert a.shape == (2, 5, 4, 4)
    assert torch.allclose(b, small(example)["class"], atol=1e-4)


class Flagged(nn.Module):
    """A flag and a number that the example does not give: torch.onnx takes defaults for inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float = 0.5) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale))


def test_flags_with_defaults_stay_flags_in_the_file(tmp_path):
    x = torch.randn(4, 5, 8, generator=G)
    net = jpq.compress(Flagged().eval(), x, bops="50%", steps=2)
    small = net.finalize()
    jpq.export_onnx(small, x, tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx")
    assert [i.name for i in onnx.load(tmp_path / "model.onnx").graph.input] == ["input"]
    torch.testing.assert_close(session(x), small(x).detach(), rtol=1e-5, atol=1e-5)


class CountsToo(Two):
    def forward(self, image: Tensor, depth: Tensor) -> Any:
        score, place = self.both(image, depth)
        return score, image.shape[0], 1.5, {"place": place, "side": place.shape[-1]}


def test_numbers_among_the_outputs_are_no_outputs_of_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = jpq.compress(CountsToo(), (IMAGES, DEPTHS), "uniform", bops="10%", steps=1).finalize()
    jpq.export_onnx(small, (IMAGES, DEPTHS), tmp_path / "m.onnx")
    assert [o.name for o in onnx.load(tmp_path / "m.onnx").graph.output] == ["output_0", "output_1"]
    for size in (8, 3):
        expected, found = (
            small(IMAGES[:size], DEPTHS[:size]),
            Session(tmp_path / "m.onnx")(IMAGES[:size], DEPTHS[:size]),
        )
        assert [t.shape for t in collect_tensors(found)] == [t.shape for t in collect_tensors(expected)]
        assert torch.allclose(found[0], expected[0], atol=1e-5)


class Gain(nn.Module):
    """A number that multiplies, rows, and an input that is not read."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, gain: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        return self.last(F.relu(self.hidden(rows) * gain))


@pytest.mark.parametrize("by_name", [False, True])
def test_a_file_takes_numbers_and_inputs_that_nothing_reads(by_name: bool, tmp_path: Path) -> None:
    values = {"gain": torch.tensor(2.0), "rows": torch.randn(4, 12, generator=G), "labels": torch.arange(4)}
    example: Any = values if by_name else tuple(values.values())
    small = jpq.compress(Gain(), example, "uniform", bops="30%", steps=1).finalize()
    jpq.export_onnx(small, example, tmp_path / "gain.onnx")
    inputs = onnx.load(tmp_path / "gain.onnx").graph.input
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in inputs}
    assert shapes == {"gain": [], "rows": ["batch", 12], "labels": ["batch"]}
    fewer = {"gain": values["gain"], "rows": values["rows"][:3], "labels": values["labels"][:3]}
    for batch in (values, fewer):
        given: Any = batch if by_name else tuple(batch.values())
        assert torch.allclose(call_model(Session(tmp_path / "gain.onnx"), given), call_model(small, given), atol=1e-6)


class Passes(nn.Module):
    """Gives its mask back under the same name; an input bears the name of a single output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, output: Tensor, mask: Tensor, pair: Any = None) -> Any:
        y = self.layer(output) * mask
        return {"y": y, "mask": 2 * mask} if pair is None else y + pair[0] - pair[1]


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ((), (["output", "mask"], ["y", "mask_1"])),
        ((torch.randn(3, 4, generator=G), torch.randn(3, 4, generator=G)), ([], ["output_1"])),
    ],
)
def test_inputs_and_outputs_of_one_name_are_told_apart(more: Any, names: Any, tmp_path: Path) -> None:
    model, x, mask = Passes().eval(), torch.randn(3, 4, generator=G), torch.rand(3, 4, generator=G)
    example = (x, mask, *([more] if more else []))
    jpq.export_onnx(model, example, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [o.name for o in graph.output] == names[1]
    assert [i.name for i in graph.input] == (names[0] or ["output", "mask", "pair_0", "pair_1"])
    found, expected = Session(tmp_path / "m.onnx")(*example), collect_tensors(model(*example))
    for a, b in zip(collect_tensors(found), expected, strict=True):
        torch.testing.assert_close(a, b.detach())


def test_a_session_takes_positions_beside_keywords_that_hold_several_tensors(tmp_path: Path) -> None:
    model, x, mask = Passes().eval(), torch.randn(3, 4, generator=G), torch.rand(3, 4, generator=G)
    pair = (torch.randn(3, 4, generator=G), torch.randn(3, 4, generator=G))
    jpq.export_onnx(model, (x, mask, pair), tmp_path / "m.onnx")
    with torch.no_grad():
        torch.testing.assert_close(Session(tmp_path / "m.onnx")(x, mask, pair=pair), model(x, mask, pair))
