"""The .pt2 file: it loads without jpq, and a model that cannot be exported is named with the reason."""

import subprocess
import sys

import pytest
import torch
from quantized_nets import EXAMPLE, Residual, Small, quantized
from torch import nn

import jpq
from jpq.export import torch_export
from jpq.export.unconstrained.select import insert_selects
from jpq.types import JpqError


@pytest.mark.slow
def test_pt2_loads_where_jpq_is_not(tmp_path):
    torch_export.export_pt2(quantized(Small, 4, 8).finalize(), EXAMPLE, tmp_path / "m.pt2")
    code = (
        "import sys, torch; out = torch.export.load('m.pt2').module()(torch.randn(5, 3, 12, 12)); "
        "print(tuple(out.shape), 'jpq' in sys.modules, 'brevitas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "(5, 4) False False"


def test_pt2_says_why_a_model_cannot_be_exported(tmp_path):
    model = quantized(Residual, 4).finalize()
    model.relu.forward = lambda x: x.relu() if float(x.sum()) < 1e9 else x  # what it does depends on values
    with pytest.raises(JpqError, match=r"torch.export cannot write this model as .pt2"):
        torch_export.export_pt2(model, EXAMPLE, tmp_path / "m.pt2")


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def test_pt2_of_code_that_reads_sizes_of_its_layers(tmp_path):
    example, x = torch.randn(2, 5, 8), torch.randn(7, 5, 8)
    small = jpq.compress(jpq.decompose(SelfAttention().eval()), example, bops="20%", steps=1).finalize().eval()
    torch_export.export_pt2(small, example, tmp_path / "m.pt2")
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(x), small(x))


class Upsampling(nn.Module):
    """Layers that are called with keywords, as a transposed convolution is that must give an odd size."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 3, stride=2)

    def forward(self, x):
        return self.b(torch.relu(self.a(input=x)), output_size=(12, 12))


def test_layers_that_are_called_with_keywords():
    x = torch.randn(2, 3, 5, 5)
    small = jpq.compress(Upsampling().eval(), x, method="uniform", bops="20%").finalize()
    with torch.no_grad():
        expected = small(x)
        assert expected.shape == (2, 4, 12, 12)
        insert_selects(small, {"a": [0, 1, 2]})  # of all its inputs
        assert torch.equal(small(x), expected)
        assert torch.equal(torch_export.replace_quantizers(small)(x), expected)


class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, *parts):
        return self.b(torch.relu(sum(self.a(part) for part in parts)))


class Named(Sums):
    def forward(self, x, **others):
        return super().forward(x, *others.values())


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(5, 8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x, state):
        y, state = self.cell(x, state)
        return self.head(y[:, -1]), state


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(5, 8)

    def forward(self, x):
        return nn.functional.linear(torch.relu(self.encoder(x)), self.encoder.weight.t())


def check_file(model, example, folder, *others):
    torch_export.export_pt2(model, example, folder / "m.pt2")
    loaded = torch.export.load(folder / "m.pt2").module()
    for inputs in (example, *others):
        torch.testing.assert_close(loaded(*inputs), model(*inputs), rtol=0, atol=0)


def small(model, example):
    return jpq.compress(model.eval(), example, method="uniform", bops="100%", steps=1).finalize()


@torch.no_grad()
def test_arguments_without_names_have_a_free_batch(tmp_path):
    example = torch.randn(2, 5), torch.randn(2, 5)
    check_file(small(Sums(), example), example, tmp_path, (torch.randn(3, 5), torch.randn(3, 5)))


def test_a_file_of_keywords_that_the_signature_lacks_is_refused(tmp_path):
    example = {"x": torch.randn(2, 5), "y": torch.randn(2, 5)}
    with pytest.raises(JpqError, match=r"Named takes 'y' by \*\*keywords"):
        torch_export.export_pt2(small(Named(), example), example, tmp_path / "m.pt2")


@torch.no_grad()
def test_an_example_of_one_sample_with_states_leaves_the_batch_free(tmp_path):
    example, other = (torch.randn(1, 3, 5), torch.randn(2, 1, 8)), (torch.randn(3, 3, 5), torch.randn(2, 3, 8))
    model = small(Steps(), example)
    check_file(model, example, tmp_path, other)
    jpq.save(model, tmp_path / "kept")
    torch.testing.assert_close(jpq.load(tmp_path / "kept")[0](*other), model(*other), rtol=0, atol=0)


@torch.no_grad()
def test_code_that_reads_a_weight_gets_that_of_a_model_trained_further(tmp_path):
    example = (torch.randn(3, 5),)
    model = small(Autoencoder(), example)
    model.encoder.weight.add_(0.01)
    check_file(model, example, tmp_path)


@torch.no_grad()
def test_one_sample_without_a_batch_dim(tmp_path):
    example = (torch.randn(3, 8, 8),)
    check_file(small(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), example), example, tmp_path)
