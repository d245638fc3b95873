"""Restoration of images of unequal sizes: batches, networks that cannot take them, files, and `jpq evaluate`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from readme_nets import denoiser
from runs import config
from torch import nn

import jpq
from jpq.cli.main import main
from jpq.config import Train
from jpq.export.onnx.dynamic_sizes import computes_other_size, takes_any_size
from jpq.export.runtimes import open_session
from jpq.tasks.data import load
from jpq.tasks.load import fit_sizes

SIZES = ((20, 24), (24, 20), (20, 24), (33, 17))


def photos(folder, sizes=SIZES, parts=("train", "test")):
    draw = np.random.default_rng(1)
    for part in parts:
        (folder / part).mkdir(parents=True, exist_ok=True)
        for n, (height, width) in enumerate(sizes):
            image = Image.fromarray(draw.integers(0, 200, (3, 3)).astype(np.uint8))
            image.resize((width, height), Image.Resampling.BICUBIC).save(folder / part / f"{n}.png")
    return f"folder:{folder}"


def shapes(batches):
    return [tuple(y.shape) for _, y in batches]


def test_whole_images_are_batched_by_size_with_the_noise_of_each(tmp_path):
    data = load(photos(tmp_path), noise=25.0, crop=(10,), batch_size=8)
    assert shapes(data.test) == [(2, 1, 20, 24), (1, 1, 24, 20), (1, 1, 33, 17)]
    assert (len(data.test), data.test.size, data.shape, data.notes) == (3, 4, (1, 20, 17), ())
    one_by_one = load(f"folder:{tmp_path}", noise=25.0, crop=(10,), batch_size=1)
    pairs = zip([x for batch, _ in data.test for x in batch], [x[0] for x, _ in one_by_one.test], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert shapes(data.test.first(2)) == [(1, 1, 20, 24), (1, 1, 24, 20)]
    assert {shape[1:] for shape in shapes(data.train)} == {(1, 10, 10)}


def test_large_images_come_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("jpq.tasks.readers.restoration.MOST_PIXELS", 500)
    data = load(photos(tmp_path), noise=25.0, crop=(10,), batch_size=8)
    assert [shape[0] for shape in shapes(data.test)] == [1, 1, 1, 1]


def test_sides_are_multiples_of_the_scale(tmp_path):
    data = load(photos(tmp_path), scale=2, crop=(8,))
    assert [(tuple(x.shape[2:]), tuple(y.shape[2:])) for x, y in data.test] == [
        ((10, 12), (20, 24)),
        ((12, 10), (24, 20)),
        ((16, 8), (32, 16)),
    ]


class Multiples(nn.Module):
    """Halves and doubles images, whose sides must be even."""

    def forward(self, x):
        half = nn.functional.avg_pool2d(x, 2)
        return x + nn.functional.interpolate(half, scale_factor=2.0)


def test_a_network_that_cannot_compute_a_size_gets_all_images_at_one(tmp_path):
    data = load(photos(tmp_path), noise=25.0, crop=(10,))
    assert fit_sizes(data, denoiser(1)) == ()
    assert len({shape[2:] for shape in shapes(data.test)}) == 3
    (sentence,) = fit_sizes(data, Multiples())
    end = "3 sizes of images are cut to 20 x 17 around their centre, as the network cannot compute 33 x 17."
    assert sentence == f"Test split: {end}"
    assert shapes(data.test) == [(4, 1, 20, 17)]
    assert len({shape[2:] for shape in shapes(load(f"folder:{tmp_path}", noise=25.0, crop=(10,)).test)}) == 3


class Fixed(nn.Module):
    """Adds a picture of one size: the file cannot take another."""

    def __init__(self):
        super().__init__()
        self.conv, self.picture = nn.Conv2d(1, 1, 3, padding=1), nn.Parameter(torch.rand(1, 1, 12, 16))

    def forward(self, x):
        return self.conv(x) + self.picture


class Baked(nn.Module):
    """Takes any size in PyTorch; its file holds the mean's number of pixels, as Python computed it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        return self.conv(x) * (1 + x.sum((2, 3), keepdim=True) / float(int(x.shape[2]) * int(x.shape[3])))


@pytest.mark.parametrize(("network", "free"), [(lambda: denoiser(1), True), (Fixed, False), (Baked, False)])
def test_a_file_takes_any_size_where_it_computes_another_alike(tmp_path, network, free):
    torch.manual_seed(0)
    example, path = torch.rand(2, 1, 12, 16), tmp_path / "m.onnx"
    small = jpq.compress(network(), example, bops="10%", steps=1).finalize()
    assert jpq.export_onnx(small, example, path, any_size=True) is free
    assert takes_any_size(path) is free
    assert computes_other_size(path, small, example) is free
    for runtime in ("onnxruntime", "openvino") if free else ("onnxruntime",):
        if runtime == "openvino":
            pytest.importorskip("openvino")
        session = open_session(runtime, path)
        for size in [(3, 1, 12, 16), *([(1, 1, 31, 9)] if free else [])]:
            x = torch.rand(size)
            assert session(x).shape == x.shape
            assert float((session(x) - small(x)).abs().median()) < 1e-4
    assert jpq.export_onnx(small, example, path) is False
    assert not takes_any_size(path)


def test_output_sides_have_names_of_their_own_where_they_differ(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.PixelShuffle(2))
    example = torch.rand(2, 1, 8, 8)
    small = jpq.compress(net, example, bops="10%", steps=1).finalize()
    assert jpq.export_onnx(small, example, tmp_path / "m.onnx", any_size=True)
    graph = onnx.load(str(tmp_path / "m.onnx")).graph
    names = [[dim.dim_param for dim in v.type.tensor_type.shape.dim][2:] for v in (graph.input[0], graph.output[0])]
    assert names == [["height", "width"], ["output_height", "output_width"]]


@pytest.mark.slow
def test_a_run_on_unequal_images_is_evaluated_in_both_runtimes(tmp_path, capsys):
    pytest.importorskip("openvino")
    data = photos(tmp_path / "photos", SIZES * 3)
    asked = config(tmp_path / "runs", "uniform", Train(epochs=2, float_epochs=4, batch_size=16), target_bops="5%")
    source = replace(asked.task, model="readme_nets:denoiser", data=data, noise=25.0, crop=(10,), limit=None)
    result = jpq.optimize(replace(asked, task=source))
    assert result.export["sizes"] == "any"
    assert result.verified["rebuilt_vs_onnxruntime"]["images"] == 12
    capsys.readouterr()
    assert main(["evaluate", str(result.folder), "--run-code", "--runtime", "onnxruntime,openvino"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("PSNR") == 3
    pixels = 3 * sum(height * width for height, width in SIZES)
    assert f"for {pixels:,} of {pixels:,} as the PyTorch model" in printed
    other = photos(tmp_path / "other", ((40, 31), (18, 22), (20, 20), (25, 30)))
    (tmp_path / "alone.onnx").write_bytes((result.folder / "model.onnx").read_bytes())
    assert main(["evaluate", str(tmp_path / "alone.onnx"), "--data", other, "--task", "restoration"]) == 0
    assert "4 test images" in " ".join(capsys.readouterr().out.split())
