"""Models as people bring them: odd names, dataclasses, losses and caches in outputs, checkpoints, a single layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import jpq
from jpq.allocation.measured.table import tensors_checksum
from jpq.export.verify import verify
from jpq.tracing.forward import as_plain_nest, call_model, collect_tensors
from jpq.types import JpqError

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def run_through(model: nn.Module, example: Any, path: Path, steps: int = 1) -> nn.Module:
    """Compress, train a step, finalize, export and verify; gives the small model."""
    net = jpq.compress(model, example, bops="10%", steps=max(steps, 1)).train()
    optimizer = torch.optim.Adam(net.groups())
    for _ in range(steps):
        loss = sum((t.float().square().mean() for t in collect_tensors(call_model(net, example))), net.pressure())
        loss.backward()
        optimizer.step()
        net.step()
    small = net.finalize()
    jpq.export_onnx(small, example, path / "m.onnx")
    record = verify(net.net, small, path / "m.onnx", [(example, None)], example)
    assert "warning" not in record
    assert net.share() <= 0.1
    return small


class Named(nn.Module):
    """A convolution under a name of one's own."""

    def __init__(self, name: str):
        super().__init__()
        self.key, self.first, self.last = name, nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.add_module(name, nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self._modules[self.key](F.relu(self.first(x)))))


@pytest.mark.parametrize(
    "name",
    [
        "0",
        "weight",
        "forward_",
        "a-b",
        "a b",
        "é中",
        "class",
        "w" * 200,
        "model",
        "results",
        "input_quant",
        "weight_quant",
        "T",
    ],
)
def test_any_name_of_a_module_will_do(name: str, tmp_path: Path) -> None:
    small = run_through(Named(name).eval(), IMAGES, tmp_path)
    assert hasattr(small._modules[name], "weight_quant")


class Repeated(nn.Module):
    """One convolution, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        for _ in range(3):
            y = F.relu(self.b(y))
        return self.c(y)


def test_several_calls_of_one_layer(tmp_path: Path) -> None:
    small = run_through(Repeated().eval(), IMAGES, tmp_path)
    assert jpq.measure(small, IMAGES)["layers"] == 5, "calls of three layers"


@dataclass
class Inputs:
    """Inputs as an object."""

    image: Tensor
    scale: float = 2.0
    mask: Tensor | None = None


@dataclass
class Outputs:
    """Outputs as an object, of which one is None."""

    logits: Tensor
    extra: dict[str, Any]
    nothing: Tensor | None = None


class TakesObjects(nn.Module):
    """A dataclass in and a dataclass out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, inputs: Inputs) -> Outputs:
        y = self.b(F.relu(self.a(inputs.image * inputs.scale)))
        return Outputs(y.mean((2, 3)), {"map": y, "list": [y * 2, None]})


def test_dataclasses_in_and_out(tmp_path: Path) -> None:
    example = Inputs(IMAGES)
    network = jpq.trace(TakesObjects().eval(), example)
    assert [layer.name for layer in network.layers] == ["a", "b"]
    assert len(jpq.channels(network)) == 1, "the output's channels stay, those between the layers may go"
    small = run_through(TakesObjects().eval(), example, tmp_path)
    assert isinstance(small(example), Outputs)


class Cache:
    """Tensors in an object that torch does not know."""

    def __init__(self, keys: Tensor):
        self.keys = keys


class Decoder(nn.Module):
    """Logits, a cache, and a loss where labels are given, as decoders of Hugging Face return them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 20)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        h = F.relu(self.inner(self.embed(input_ids)))
        logits = self.head(h)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits, "past_key_values": Cache(h), "hidden_states": None}


@pytest.mark.parametrize("labels", [False, True])
def test_caches_are_no_results_and_losses_are(labels: bool, tmp_path: Path) -> None:
    ids = torch.randint(0, 20, (4, 6))
    example = {"input_ids": ids, "labels": ids} if labels else {"input_ids": ids}
    assert len(collect_tensors(Decoder()(**example))) == 1 + labels
    network = jpq.trace(Decoder().eval(), example)
    assert {site.name for site in jpq.channels(network)} == {"embed", "inner"}, "what only a cache holds is free"
    small = run_through(Decoder().eval(), example, tmp_path)
    assert isinstance(small(**example)["past_key_values"], Cache), "the model itself still gives one"


def test_nests_of_outputs() -> None:
    x = torch.ones(2)
    known = {"a": x, "b": [x, (x, None)], "c": 3}
    assert as_plain_nest(known) is known
    assert as_plain_nest((x, Cache(x)))[1] is None
    assert as_plain_nest(Outputs(x, {"c": Cache(x)}))["extra"] == {"c": None}


def test_an_output_without_tensors_is_a_sentence() -> None:
    class Hidden(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return Cache(super().forward(x))

    with pytest.raises(JpqError, match="holds no tensor that jpq finds"):
        jpq.trace(nn.Sequential(nn.Linear(3, 3), Hidden(3, 3)), torch.randn(2, 3))


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, reentrant: bool | None):
        super().__init__()
        self.reentrant, self.a, self.c = reentrant, nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.b = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(8, 8, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        y = self.b(y) if self.reentrant is None else checkpoint(self.b, y, use_reentrant=self.reentrant)
        return self.c(y)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["djpq", "l0"])
def test_checkpointed_activations_train(reentrant: bool, method: str) -> None:
    """Gates of l0 draw before the forward pass: their gradients are those without a checkpoint."""
    torch.manual_seed(0)
    plain = Checkpointed(None).eval()
    model = copy.deepcopy(plain)
    model.reentrant = reentrant
    gradients = []
    for m in (plain, model):
        torch.manual_seed(1)
        net = jpq.compress(m, IMAGES, method=method, bops="10%", steps=2).train()
        torch.manual_seed(2)
        net(IMAGES).square().sum().backward()
        named = {n: p.grad for n, p in net.named_parameters() if p.requires_grad}
        assert all(g is not None and bool(g.isfinite().all()) for g in named.values())
        gradients.append(named)
    if method == "l0":
        for name, gradient in gradients[0].items():
            assert torch.allclose(gradient, gradients[1][name], atol=1e-4, rtol=1e-4), name


def test_noise_inside_checkpoints_is_new_in_every_step_and_for_every_gate() -> None:
    model = Checkpointed(False).eval()
    net = jpq.compress(model, IMAGES, bops="10%", steps=2).train().net
    drawn = []
    for _ in range(2):
        net(IMAGES).sum().backward()
        drawn += [draw._noise[4] for draw in net.draws if 4 in draw._noise]
    assert len(drawn) > 4
    for i, a in enumerate(drawn):
        assert not any(torch.equal(a, b) for b in drawn[:i])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_are_read_and_exported(reentrant: bool, tmp_path: Path) -> None:
    model = Checkpointed(reentrant).eval()
    assert [layer.name for layer in jpq.trace(model, IMAGES).layers] == ["a", "b.0", "b.3", "c"]
    run_through(model, IMAGES, tmp_path)


class WritesIntoItsInput(nn.Module):
    """Images that the model's own code normalizes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.3
        x *= 4
        return self.b(F.relu(self.a(x)))


def test_inputs_stay_as_they_are_though_the_model_writes_into_them(tmp_path: Path) -> None:
    example = IMAGES.clone()
    small = run_through(WritesIntoItsInput().eval(), example, tmp_path)
    jpq.save(small, tmp_path / "kept")
    graph, _ = jpq.load(tmp_path / "kept")
    assert torch.equal(example, IMAGES)
    assert torch.equal(graph(IMAGES.clone()), small(IMAGES.clone()))


class Rotary(nn.Module):
    """Channels turned by complex factors, as in LLaMA's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 3)
        self.register_buffer("turn", torch.polar(torch.ones(8, 2), torch.arange(16.0).reshape(8, 2)))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.view_as_complex(self.a(x).unflatten(-1, (2, 2))) * self.turn
        return self.b(torch.view_as_real(y).flatten(-2))


def test_complex_buffers_stay_complex(tmp_path: Path) -> None:
    net = jpq.compress(Rotary().eval(), IMAGES, method="uniform", bops="20%")
    small = net.finalize()
    assert torch.equal(small(IMAGES), net.eval()(IMAGES))
    with pytest.raises(JpqError, match="ONNX has no complex numbers"):
        jpq.export_onnx(small, IMAGES, tmp_path / "model.onnx")


def test_checksums_tell_complex_numbers_apart() -> None:
    turn = torch.polar(torch.ones(4), torch.arange(4.0))
    assert tensors_checksum([turn]) == tensors_checksum([turn.clone()])
    assert tensors_checksum([turn]) != tensors_checksum([turn.conj()])  # which differ in the imaginary part alone


SINGLE: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "convolution": (lambda: nn.Conv2d(3, 4, 3), IMAGES),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 2, 2), IMAGES),
    "linear": (lambda: nn.Linear(8, 4), IMAGES),
    "gru": (lambda: nn.GRU(8, 6, batch_first=True), IMAGES[:, 0]),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_model_may_be_one_layer(name: str, tmp_path: Path) -> None:
    make, x = SINGLE[name]
    small = run_through(make().eval(), x, tmp_path)
    assert jpq.measure(small, x)["layers"] >= 1


@pytest.mark.parametrize("target", [{"method": "ranked", "bops": "50%", "density": 0.5}, {"bops": 1}])
def test_a_target_of_a_model_that_can_lose_no_channel_says_so(target: dict[str, Any]) -> None:
    with pytest.raises(JpqError, match=r"cannot be met.*all channels, of which this method can remove none"):
        jpq.compress(nn.Linear(8, 4).eval(), IMAGES, **target)


@pytest.mark.parametrize(
    "model", [nn.ReLU(), nn.BatchNorm2d(3), nn.Sequential(nn.ReLU())], ids=lambda m: type(m).__name__
)
def test_a_model_without_layers_is_a_sentence(model: nn.Module) -> None:
    with pytest.raises(JpqError, match="nothing to compress"):
        jpq.compress(model.eval(), IMAGES, bops="10%", steps=2)


@pytest.mark.slow
def test_a_whole_detector_is_a_sentence() -> None:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    detector = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3).eval()
    with pytest.raises(JpqError, match="whole detector") as raised:
        jpq.trace(detector, ([torch.rand(3, 64, 64)],))
    assert len(str(raised.value)) < 400
    assert "<string>" not in str(raised.value)
