"""Exact arithmetic: PyTorch, the file as written, and default sessions of both runtimes give the same numbers.

The bounds are checked by integers of any size (Python's own), not by another floating-point computation.
"""

import copy
from fractions import Fraction

import pytest
import torch
from quantized_nets import EXAMPLE, IMAGES, Residual, Small, quantized
from storage import STORAGES
from torch import nn
from zoo import ZOO

import jpq
from jpq.export.exact_steps import DIGITS, EXACT_SUM, foldable_pairs, round_weight_steps
from jpq.export.onnx.export import export_onnx
from jpq.export.runtimes import Session, open_session
from jpq.export.verify import compare, difference
from jpq.methods.quantizers import act_quantizer, result_quantizer, weight_quantizer
from jpq.methods.quantizers.uniform_integer import levels

PIXELS = torch.randint(0, 256, (64, 3, 12, 12), generator=torch.Generator().manual_seed(5))
NORMALISED = [((PIXELS / 255 - 0.45) / 0.22, None)]  # as the users of a file feed them


class Upsampling(nn.Sequential):
    """A grouped transposed convolution with a norm, which cannot be folded, and one without."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 2, 2, groups=2),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3, padding="same", dilation=2),
        )


def layers_of(model):
    return [m for m in model.modules() if hasattr(m, "weight_quant")]


def is_power_of_two(number):
    return Fraction(number).numerator.bit_count() == 1 and Fraction(number).denominator.bit_count() == 1


@pytest.mark.parametrize("kind", [Residual, Small, Upsampling])
@pytest.mark.parametrize(
    ("bits", "output_bits", "weights"), [(8, 0, "int8"), (8, 8, "int8"), (4, 8, "int4"), (2, 0, STORAGES[-1])]
)
def test_file_and_model_give_the_same_numbers(kind, bits, output_bits, weights, tmp_path):
    small = quantized(kind, bits, output_bits).finalize()
    export_onnx(small, EXAMPLE, tmp_path / "m.onnx", weights)
    for optimised in (False, True):
        session = Session(tmp_path / "m.onnx", optimised=optimised)
        for images in (IMAGES, NORMALISED):
            assert compare(small, session, images)["largest_relative_difference"] == 0


@pytest.mark.parametrize("kind", [Residual, Small, Upsampling])
@pytest.mark.parametrize(("bits", "weights"), [(8, "int8"), (4, "int4")])
def test_openvino_gives_the_same_numbers(kind, bits, weights, tmp_path):
    """But where an input of the file lies so near to a boundary that adding a zero point of 128 rounds it over."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    small = quantized(kind, bits).finalize()
    export_onnx(small, EXAMPLE, tmp_path / "m.onnx", weights)
    found = compare(small, open_session("openvino", tmp_path / "m.onnx", 1), NORMALISED)
    assert found["at_a_rounding_boundary"] <= 1


@pytest.mark.parametrize("name", ["grouped", "depthwise", "transposed", "signal", "volume", "concat", "tokens"])
def test_zoo_gives_the_same_numbers(name, tmp_path):
    kind, example = ZOO[name]
    torch.manual_seed(0)
    small = jpq.compress(kind().eval(), example, method="uniform", bops="100%", w_bits=(5, 5), a_bits=(8, 8)).finalize()
    export_onnx(small, example, tmp_path / "m.onnx")
    for optimised in (False, True):
        session = Session(tmp_path / "m.onnx", optimised=optimised)
        assert compare(small, session, [(example, None)])["largest_relative_difference"] == 0


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_every_sum_of_a_layer_fits_in_single_precision(bits):
    """The largest sum, in units of its last digit, is at most 2^24: computed in fractions from the model's numbers."""
    small = quantized(Small, bits).finalize()
    for layer in layers_of(small):
        inputs, step = act_quantizer(layer), weight_quantizer(layer).scale().flatten()
        assert is_power_of_two(float(inputs.scale()))
        largest = int(levels(inputs.width(), inputs.signed))
        for channel, weight in enumerate(layer.weight):
            s = Fraction(float(step[channel]))
            integers = [Fraction(float(w)) / s for w in weight.flatten()]
            assert all(q.denominator == 1 for q in integers)
            mantissa = Fraction(s.numerator)
            assert mantissa < 2**DIGITS or s.denominator == 1
            positive = sum(q for q in integers if q > 0)
            negative = -sum(q for q in integers if q < 0)
            total = (positive + negative if inputs.signed else max(positive, negative)) * largest
            assert total * mantissa <= EXACT_SUM


def test_norms_are_folded_and_the_masked_model_is_still_the_rebuilt_one():
    session = quantized(Residual, 4)
    session.discretize()
    session.net.eval()
    assert foldable_pairs(session.net.model, EXAMPLE) == [("first", "norm")]
    before = session(EXAMPLE).detach()
    small = session.finalize()
    assert difference(session, small, EXAMPLE) < 1e-12
    norm = small.norm
    assert torch.equal(norm(x := torch.randn(2, 8, 4, 4)), x + norm.bias.reshape(-1, 1, 1))  # it only adds a bias
    near = (small(EXAMPLE) - before).abs().max() / before.abs().max()
    assert 0 < near < 0.2  # steps moved by 1.6 % at most; some values crossed a boundary


def test_a_norm_beside_other_readers_is_left_alone():
    class TwoReaders(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.conv(x)
            return self.last(torch.relu(self.norm(x) + x))

    session = quantized(TwoReaders, 8)
    session.discretize()
    session.net.model.norm.running_mean.fill_(0.5)
    assert foldable_pairs(session.net.eval().model, EXAMPLE) == []
    assert difference(session, session.finalize(), EXAMPLE) < 1e-12


def test_rounding_twice_changes_nothing():
    small = quantized(Residual, 4).finalize()
    once = copy.deepcopy(small.state_dict())
    round_weight_steps(small, EXAMPLE)
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(tensor, once[name], rtol=1e-6, atol=1e-7, msg=name)


def test_layers_whose_sums_are_too_large_are_named():
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(40_000, 2)).eval()
    session = jpq.compress(wide, torch.rand(4, 40_000), method="uniform", bops="100%", w_bits=(8, 8), a_bits=(8, 8))
    session.discretize()
    assert round_weight_steps(session.net.eval().model, torch.rand(4, 40_000)) == ["0"]


def test_steps_of_activations_are_the_better_power_of_two():
    """Against all powers of two near it, by the error on the samples that the range is fitted to."""
    session = quantized(Residual, 4, output_bits=8)
    net = session.net
    for layer in net.network.layers:
        grid, samples = net.quantizers(layer.name)[1], net.calibration_samples[layer.name]
        step, high = float(grid.scale()), float(levels(grid.width(), grid.signed))
        low = -high if grid.signed else 0.0
        errors = {
            k: float(((samples / k).round().clamp(low, high) * k - samples).square().sum())
            for k in (step / 2, step, 2 * step)
        }
        assert is_power_of_two(step)
        assert min(errors, key=errors.__getitem__) == step
    ends = [g for m in net.model.modules() if (g := result_quantizer(m)) is not None]
    assert ends
    assert all(is_power_of_two(float(g.scale())) for g in ends)


def test_states_of_older_versions_load():
    small = quantized(Small, 4).finalize()
    old = {k: v for k, v in small.state_dict().items() if not k.endswith(".step")}
    fresh = quantized(Small, 4).net.model
    assert [k for k in fresh.state_dict() if k.endswith(".step")]
    small.load_state_dict(old)  # strict
