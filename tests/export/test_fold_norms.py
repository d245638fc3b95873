"""Norms folded in the ONNX file: nothing changes but the kernels."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import jpq
from jpq.export.onnx.export import export_onnx
from jpq.export.onnx.integer_kernels import UINT8_MIDDLE
from jpq.export.runtimes import Session
from jpq.export.timing.kernels import count_kernels
from jpq.export.verify import compare
from jpq.tasks.models import build

EXAMPLE = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def small(bits, change=lambda norm: None):
    """A quantized convnet whose normalisations do something, and a file of it."""
    torch.manual_seed(0)
    model = build("convnet", 10, 1)
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.weight.data.normal_()  # half of the gains are negative
        norm.bias.data.normal_(0, 0.2)
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
        change(norm)
    joint = jpq.compress(model, EXAMPLE, method="uniform", bops="100%", w_bits=(bits, bits), a_bits=(bits, bits))
    return joint.finalize()


def ops(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_folded_normalisations_change_nothing_but_the_kernels(bits, tmp_path):
    model, path = small(bits), tmp_path / "m.onnx"
    export_onnx(model, EXAMPLE, path)
    assert "BatchNormalization" not in ops(path)
    assert count_kernels(path)["QLinearConv"] == 2  # the last conv meets an average
    found = compare(model, Session(path, optimised=False), [(EXAMPLE, None)])
    assert found["argmax_agreement"] == 1
    assert found["at_a_rounding_boundary"] <= 1
    tensors = [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if len(t.dims) == 4]
    assert [t.dtype for t in tensors] == [np.uint8] * 3
    stored = [t.astype(np.int16) - UINT8_MIDDLE for t in tensors]
    largest = 127 if bits == 8 else 2 ** (bits - 1)  # of the longer side, where all levels are used
    shift = 2 ** int(np.log2(127 / largest))  # as far as 8 bits allow
    assert all((w % shift == 0).all() and abs(w // shift).max() <= largest for w in stored)
    whole = compare(model, Session(path), [(EXAMPLE, None)])
    assert whole["argmax_agreement"] == 1


def test_a_gain_of_zero_is_left_alone(tmp_path):
    model, path = small(8, lambda norm: norm.weight.data[:1].zero_()), tmp_path / "m.onnx"
    export_onnx(model, EXAMPLE, path)
    assert ops(path).count("BatchNormalization") == 3
    assert compare(model, Session(path, optimised=False), [(EXAMPLE, None)])["argmax_agreement"] == 1


class Twice(nn.Module):
    """A layer that is called twice, with a norm behind its second call alone: finalizing cannot fold it."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer, self.norm = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 10, 8)

    def forward(self, x):
        return self.head(self.norm(self.layer(self.layer(self.stem(x)).relu()))).flatten(1)


def test_a_norm_that_finalizing_cannot_fold_stays_as_its_bias_lies_between_the_steps(tmp_path):
    torch.manual_seed(0)
    model, path = Twice(), tmp_path / "m.onnx"
    model.norm.bias.data.fill_(0.3)
    model.norm.weight.data.fill_(1.7)
    joint = jpq.compress(model, EXAMPLE, method="uniform", bops="100%", w_bits=(8, 8), a_bits=(8, 8))
    finalized = joint.finalize()
    export_onnx(finalized, EXAMPLE, path)
    assert ops(path).count("BatchNormalization") == 1
    with torch.no_grad():
        expected = finalized(EXAMPLE)
    assert (Session(path)(EXAMPLE) - expected).abs().max() < 1e-5 * expected.abs().max()
