"""What a module's own code adds behind a layer: no runtime rounds it as that layer's bias."""

import onnx
import pytest
import torch
from torch import nn

import jpq
from jpq.export.onnx.separate_additions import separate_additions
from jpq.export.runtimes import Session


class Shifted(nn.Module):
    """A layer without a bias, and a vector that is added to its result."""

    def __init__(self, layer, shape):
        super().__init__()
        self.layer, self.shift = layer, nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.layer(x) + self.shift


def linear():
    return [Shifted(nn.Linear(8, 12, bias=False), 12), nn.ReLU(), Shifted(nn.Linear(12, 6, bias=False), 6)]


def convolutions():
    first = Shifted(nn.Conv2d(3, 8, 3, bias=False), (8, 1, 1))
    second = Shifted(nn.ConvTranspose2d(8, 4, 3, bias=False), (1, 4, 1, 1))
    return [first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(4, 2, 1)]


NETS = {"linear": (linear, (8,)), "tokens": (linear, (5, 8)), "convolutions": (convolutions, (3, 6, 6))}


def export(name, path):
    """The small model of a net, its file, and samples."""
    torch.manual_seed(0)
    layers, shape = NETS[name]
    example = torch.randn(32, *shape)
    small = jpq.compress(nn.Sequential(*layers()).eval(), example, bops="1%", steps=1).finalize().eval()
    jpq.export_onnx(small, example, path)
    return small, torch.randn(256, *shape)


@pytest.mark.parametrize("name", NETS)
def test_a_default_session_adds_what_the_model_adds(name, tmp_path):
    small, x = export(name, tmp_path / "m.onnx")
    with torch.no_grad():
        assert torch.equal(Session(tmp_path / "m.onnx")(x), small(x))
    nodes = onnx.load(tmp_path / "m.onnx").graph.node
    assert sum(node.op_type == "Sub" for node in nodes) == 2


def test_biases_of_layers_stay_additions(tmp_path):
    example = torch.randn(32, 5, 8)
    small = jpq.compress(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), example, bops="2%", steps=1).finalize()
    jpq.export_onnx(small, example, tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    separate_additions(model)
    assert [node.op_type for node in model.graph.node].count("Add") == 2
    assert all(node.op_type != "Sub" for node in model.graph.node)


class Centred(nn.Module):
    """x less its mean over positions, and then its mean: nothing is left but rounding errors."""

    def forward(self, x):
        dims = tuple(range(2, x.dim()))
        rest = (x - x.mean(dims, keepdim=True)).mean(dims, keepdim=True)
        return rest if len(dims) > 1 else rest.flatten(1)


NOTHING = {
    "linear": (lambda: [Centred(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6)], (4, 9)),
    "convolution": (lambda: [Centred(), nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1)], (4, 5, 5)),
}


@pytest.mark.parametrize("name", NOTHING)
def test_the_bias_of_a_layer_that_reads_zeros_is_not_counted_in_its_steps(name, tmp_path):
    torch.manual_seed(0)
    layers, shape = NOTHING[name]
    model, x = nn.Sequential(*layers()).eval(), torch.randn(32, *shape)
    bits = {"w_bits": (8, 8), "a_bits": (8, 8)}  # no Clip stands between the layers
    small = jpq.compress(model, x, "uniform", bops="100%", **bits).finalize().eval()
    jpq.export_onnx(small, x, tmp_path / "m.onnx")
    with torch.no_grad():
        expected = small(x)
    assert expected.abs().max() > 0.1
    assert (Session(tmp_path / "m.onnx")(x) - expected).abs().max() < 1e-5
