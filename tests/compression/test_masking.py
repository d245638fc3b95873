"""Noise of gates: one number per sample and channel, in grouped and transposed layers and without a batch dim."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import jpq
from jpq.compression.masking import GateSample
from jpq.export.runtimes import Session
from jpq.methods.gates import VIB
from jpq.types import JpqError


def conv_net(groups: int, transposed: bool) -> nn.Sequential:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), kind(16, 32, 2, 2, groups=groups), nn.ReLU(), nn.Conv2d(32, 2, 1)
    )


@pytest.mark.parametrize("method", ["djpq", "l0"])
@pytest.mark.parametrize("groups", [1, 2, 4, 16])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_channel_of_a_grouped_layer_gets_the_noise_of_its_unit(
    method: str, groups: int, transposed: bool
) -> None:
    net = jpq.compress(
        conv_net(groups, transposed), torch.randn(4, 3, 8, 8), method=method, bops="10%", steps=2
    ).train()
    net(torch.randn(4, 3, 8, 8)).sum().backward()
    layer = net.net.network.layers[1]
    quantizers = net.net.quantizers(layer.name)
    assert quantizers is not None
    if layer.depthwise:
        assert quantizers[1].noise is None
        return
    x = torch.ones(5, 16, 4, 4)
    noise = quantizers[1].noise(x)
    if method == "l0":
        assert noise is None, "its sample is a mask"
        return
    assert noise.shape == (5, 16, 1, 1)
    site = next(s for s in net.net.sites if layer.name in [tap.layer for tap in s.taps])
    unit = {label: i for i, label in enumerate(site.labels.tolist())}
    drawn = next(d for d, s in zip(net.net.draws, net.net.sites, strict=True) if s is site).noise(5)
    assert drawn is not None
    for channel, label in enumerate(layer.inputs.tolist()):
        assert torch.equal(noise[:, channel, 0, 0], drawn[:, unit[label]])


UNBATCHED = {
    "image": (nn.Conv2d, torch.randn(3, 9, 7), (8, 9, 7), (8, 1, 1)),
    "square image": (nn.Conv2d, torch.randn(3, 8, 8), (8, 8, 8), (8, 1, 1)),
    "signal": (nn.Conv1d, torch.randn(3, 8), (8, 8), (8, 1)),
    "vector": (nn.Linear, torch.randn(3), (8,), (8,)),
}


def unbatched_net(kind: type[nn.Module]) -> nn.Sequential:
    size = () if kind is nn.Linear else (1,)
    return nn.Sequential(kind(3, 8, *size), nn.ReLU(), kind(8, 8, *size), nn.ReLU(), kind(8, 4, *size))


@pytest.mark.parametrize("name", UNBATCHED)
def test_noise_without_a_batch_dim_lies_on_channels(name: str, tmp_path: Path) -> None:
    kind, x, shape, expected = UNBATCHED[name]
    net = jpq.compress(unbatched_net(kind), x, bops="20%", steps=2).train()
    quantizers = net.net.quantizers("2")
    assert quantizers is not None
    noise = quantizers[1].noise(torch.ones(shape))
    assert noise.shape == expected
    assert noise.std() > 0
    net(x).sum().backward()
    small = net.finalize()
    if kind is nn.Linear:
        with pytest.raises(JpqError, match="a sample without a batch dim"):
            jpq.export_onnx(small, x, tmp_path / "m.onnx")
    else:
        jpq.export_onnx(small, x, tmp_path / "m.onnx")
        assert torch.allclose(Session(tmp_path / "m.onnx", optimised=False)(x), small(x), atol=1e-5)


def test_a_sample_without_a_batch_dim_trains_in_one_of_several_processes() -> None:
    x: Tensor = torch.randn(3, 8, 8)
    net = jpq.compress(unbatched_net(nn.Conv2d), x, bops="20%", steps=2).train()
    for draw in net.net.draws:
        draw.part = (8, 4, 8)  # samples 4 to 8 of a batch of 8
    assert net(x).shape == (4, 8, 8)


@pytest.mark.parametrize("each", [1, 2])
def test_parts_of_a_batch_get_their_rows_of_the_noise_that_the_whole_batch_would(each: int) -> None:
    """Where a layer splits each sample into several rows, these lie behind each other."""
    draw = GateSample(VIB(1, 5))

    def noise(part: tuple[int, int, int] | None, rows: int) -> Tensor:
        draw.part = part
        draw.resample()
        torch.manual_seed(7)
        found = draw.noise(rows * each)
        assert found is not None
        assert found is draw.noise(rows * each)  # one draw for all consumers
        return found

    whole = noise(None, 8)
    assert whole.shape == (8 * each, 5)
    assert torch.equal(torch.cat([noise((8, 0, 3), 3), noise((8, 3, 8), 5)]), whole)
