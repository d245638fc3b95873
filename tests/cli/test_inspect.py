"""`jpq inspect` and what it counts: how far pruning reaches, why the rest stays, long models summed up."""

from __future__ import annotations

import io
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refused
from cuts import cut
from rich.console import Console
from thinned import thinned
from torch import Tensor, nn
from torch.nn import functional as F
from traces import traced_network
from zoo import ZOO

from jpq.cli.inspect import MAX_PARTS, MAX_ROWS, assign_parts, find_float_work, show_inspection
from jpq.cli.main import main
from jpq.tracing.coverage import frozen_channels, halved_share, prunable_share
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace
from jpq.types import NONE

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("name", thinned(ZOO, lambda i, _: i % 2 == 0))  # the others are cut in test_rebuild
def test_reach_is_what_rebuilding_gives(name: str) -> None:
    network, sites, _, again = cut(name, lambda sites: {int(c) for site in sites for c in site.labels[1::2]})
    left = Fraction(again.macs, network.macs)
    assert halved_share(network, sites) == 1 - left
    assert halved_share(network, sites) < prunable_share(network, sites) <= 1


@pytest.mark.parametrize("name", ZOO)
def test_every_channel_can_go_or_has_a_reason(name: str) -> None:
    network = traced_network(f"zoo_{name}")
    sites = channels(network)
    made = np.concatenate([*(layer.outputs for layer in network.layers), *network.embeddings.values()])
    rows = frozen_channels(network, sites)
    assert sum(row.channels for row in rows) + sum(site.n for site in sites) == len(set(made.tolist()) - {NONE})
    assert all(row.reason and row.producers for row in rows)


def test_prunable_share_by_hand() -> None:
    network = trace(*[part() if callable(part) else part for part in ZOO["two_outputs"]])
    sites = channels(network)  # a feeds b and c; b is an output, c feeds the head
    assert [site.name for site in sites] == ["a.0", "c.0"]
    assert prunable_share(network, sites) == 1
    only = [site for site in sites if site.name == "c.0"]
    macs = {layer.name: layer.macs for layer in network.layers}
    assert prunable_share(network, only) == Fraction(macs["c.0"] + macs["head.2"], sum(macs.values()))
    assert prunable_share(network, []) == 0


def test_stages() -> None:
    few = [f"a.{i}" for i in range(MAX_ROWS)]
    many = ["stem", *(f"body.{i}.{j}" for i in range(5) for j in range(8)), "head.fc"]
    assert assign_parts(few, False) == {name: name for name in few}
    assert assign_parts(many, True) == {name: name for name in many}
    cut = assign_parts(many, False)
    assert (cut["stem"], cut["body.3.7"], cut["head.fc"]) == ("stem", "body.3", "head.fc")
    deep = assign_parts([f"m.{i}.{j}" for i in range(MAX_PARTS + 1) for j in range(2)], False)
    assert set(deep.values()) == {"m"}


def test_what_stays_at_32_bits_is_listed_with_share_and_reason() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.scale = nn.Linear(8, 8), nn.Linear(8, 2), nn.Parameter(torch.ones(2, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return F.linear((y @ y.mT) @ y, self.last.weight * self.scale)

    model, example = Net().eval(), torch.randn(3, 5, 8)
    network = trace(model, example)
    found = find_float_work(network, model)
    product = "a product of two computed tensors"
    computed = ("last", "its weight is computed from 'last.weight'", 80)
    assert found == [computed, ("matmul", product, 200), ("matmul_2", product, 200)]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(show_inspection("net", model, network, channels(network), 0.1, True, False))
    lines = console.export_text()
    assert re.search(r"matmul, matmul_2 +400 +50\.0 % +a product of two computed tensors", lines)
    assert re.search(r"last +80 +10\.0 % +its weight is computed", lines)
    assert re.search(r"2 products +400 +50\.0 %", lines)


def shown(args: list[str], capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["inspect", *args]) == 0
    return capsys.readouterr().out


DENSE = "torchvision:densenet121 --input-shape 3 64 64"


@pytest.mark.parametrize(
    ("model", "part", "inner", "layers", "words"),
    [
        (
            "resnet56",
            r"layer2 +18 layers",
            r"layer\d\.\d\.conv\d",
            54,
            "1072 units (channels, heads or groups) in 30 sites",
        ),
        pytest.param(
            DENSE,
            r"features\.denseblock1 +12 layers",
            r"denselayer\d+\.conv2",
            58,
            "10240 units (channels, heads or groups) in 120 sites",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["resnet56", "densenet121"],
)
def test_a_long_model_is_summed_up(
    model: str, part: str, inner: str, layers: int, words: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--model", *model.split()]
    short = shown(args, capsys, monkeypatch)
    assert re.search(part, short)
    assert not re.search(inner, short)
    assert re.search(r"\d+ +reaches the model's output +(classifier|linear)", short)
    assert words in " ".join(short.replace("│", " ").split())
    every = shown([*args, "--all"], capsys, monkeypatch)
    assert len(re.findall(rf"{inner} +conv", every)) == layers
    totals = [re.findall(r"total .*", out)[0].split() for out in (short, every)]
    assert totals[0] == totals[1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["convnet, 1 x 8 x 8", "4 layers"]),
        (["--data", "digits", "--classes", "7"], ["convnet, 1 x 8 x 8", "7 reaches the model's output"]),
        (["--model", "torchvision:alexnet"], ["3 x 224 x 224", "1000 reaches the model's output"]),
        pytest.param(
            ["--model", "torchvision:convnext_tiny", "--input-shape", "3", "32", "32"],
            ["3 x 32 x 32", "--open-norms lets the 1440 channels inside a"],
            marks=pytest.mark.slow,
        ),
        (
            ["--model", "torchvision:convnext_tiny", "--open-norms", "--input-shape", "3", "32", "32"],
            ["1440 of the units lie inside averages", "is not the masked one, and fine-tuning must repair it"],
        ),
        (["--model", "lenet5", "--open-norms"], ["0 of the units lie inside averages"]),
        pytest.param(
            ["--model", "torchvision:r3d_18", "--input-shape", "3", "2", "16", "16"],
            ["3 x 2 x 16 x 16", "400 reaches"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--model", "torchvision:lraspp_mobilenet_v3_large", "--input-shape", "3", "64", "64"],
            ["3 x 64 x 64", "21 reaches the model's output"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: " ".join(value[:4]),
)
def test_inspect(args: list[str], words: list[str], capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    out = " ".join(shown(args, capsys, monkeypatch).replace("│", " ").split())
    for text in words:
        assert text in out, text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "torchvision:ssd300_vgg16"], "give torchvision:ssd300_vgg16.backbone"),
        (["--model", "torchvision:s3e"], "Did you mean s3d"),
        (["--model", "mine:net"], "Say what mine:net takes"),
        (["--model", "convnett"], "Unknown model 'convnett'. Did you mean convnet"),
        (["--model", "convnet", "--classes", "0"], "at least 1 class"),
        (["--model", "convnet", "--noise", "25"], "--noise says how --data are read, and there are none. Leave it out"),
        (["--model", "resnet20", "--input-shape", "3", "8"], "cannot take a batch of shape [2, 3, 8]"),
    ],
)
def test_bad_input(args: list[str], words: str, capsys: Captured) -> None:
    assert words in refused(["inspect", *args], capsys)


def test_data_that_need_flags_are_inspected_with_them(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("a,b,price\n" + "".join(f"{i},{i % 7},{i * 1.5}\n" for i in range(40)))
    Path("rowsnet.py").write_text(
        "from torch import nn\ndef net(classes, channels):\n"
        "    return nn.Sequential(nn.Linear(channels, 8), nn.ReLU(), nn.Linear(8, classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    args = ["inspect", "--model", "rowsnet:net", "--data", "table:t.csv"]
    assert "--target-column price" in refused(args, capsys)
    assert main([*args, "--target-column", "price"]) == 0
    assert "rowsnet:net, 2" in capsys.readouterr().out


@pytest.mark.slow
def test_a_detector_is_inspected_with_the_boxes_that_it_is_for(tmp_path: Path, capsys: Captured) -> None:
    from support.shapes import EASY
    from support.shapes_coco import write_coco

    name = write_coco(tmp_path, {"train": (6, 1), "test": (2, 2)}, EASY)
    detector = "torchvision:ssdlite320_mobilenet_v3_large"
    assert main(["inspect", "--model", detector, "--data", name, "--image-size", "64"]) == 0
    assert f"{detector}, 3 x 64 x 64" in capsys.readouterr().out
