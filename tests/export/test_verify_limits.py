"""Limits of verification: the same for every network, however unstable it is itself."""

import copy
import re

import pytest
import torch
from torch import nn

from jpq.export import verify
from jpq.export.onnx.export import export_float
from jpq.types import JpqError


class Unstable(nn.Linear):
    """A linear layer that decides otherwise in float64: the least stable network there is."""

    def forward(self, x):
        y = super().forward(x)
        return y if x.dtype == torch.float32 else -y


@torch.no_grad()
def test_an_unstable_network_is_held_to_the_same_limits(tmp_path):
    torch.manual_seed(0)
    model, path = Unstable(8, 4), tmp_path / "m.onnx"
    batches = [(torch.randn(400, 8), None)]
    export_float(model, batches[0][0], path)
    record = verify.exported(model, path, batches)
    assert record["rebuilt_vs_onnxruntime"]["argmax_differs"] == 0
    assert "warning" not in record
    assert record["rebuilt_float32_vs_float64"]["argmax_differs"] > 200  # for information


@pytest.mark.parametrize(
    ("marked", "change", "words", "refused"),
    [
        (8, 50.0, "8 of 400 decisions come out differently, more than 0.5%", False),
        (40, 50.0, "40 of 400 decisions come out differently, more than 5.0%", True),
        (120, 0.1, "120 of 400 samples, more than 20%: this is more than rounding", False),
        (380, 0.1, "380 of 400 samples, more than 20%: this is more than rounding", False),
        (60, 0.1, "", False),
    ],
)
@torch.no_grad()
def test_files_beyond_the_limits_warn_and_wrong_ones_are_refused(marked, change, words, refused, tmp_path):
    """Of 400 samples the marked ones alone have an 8th feature, whose weight for every class is another in the file."""
    torch.manual_seed(0)
    model, path = Unstable(8, 4), tmp_path / "m.onnx"
    model.bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))  # class 0 wins by far
    x = torch.randn(400, 8)
    x[:, 7] = torch.arange(400) < marked
    other = copy.deepcopy(model)
    other.weight[:, 7] += torch.tensor([0.1, change, 0.1, 0.1])
    export_float(other, x, path)
    if refused:
        with pytest.raises(JpqError, match=re.escape(words)):
            verify.exported(model, path, [(x, None)])
    else:
        warning = verify.exported(model, path, [(x, None)]).get("warning", "")
        assert words in warning
        assert bool(warning) == bool(words)


@pytest.mark.parametrize(
    ("changed", "samples", "refused"),
    [(0, 3, False), (2, 400, False), (3, 400, True), (3, 1000, False)],
)
def test_nearly_all_samples_at_a_boundary_are_refused_only_where_decisions_differ_too(changed, samples, refused):
    """`changed` samples of a file whose every sample is rounded otherwise have another class (0.5 % are allowed)."""
    output = torch.tensor([[1.0, 0.97]]).repeat(samples, 1)
    other = output + torch.tensor([0.0, 0.01])
    other[:changed, 1] = 1.03
    outside = verify.compare(lambda _: output, lambda _: other, [(torch.zeros(samples, 1), None)])
    assert outside["at_a_rounding_boundary"] == samples
    if refused:
        with pytest.raises(JpqError, match="more than 90%"):
            verify._beyond_limits(outside, "")
    else:
        assert (f"{samples} of {samples} samples, more than 20%" in verify._beyond_limits(outside, "")) == (samples > 2)


def test_nearly_all_samples_at_a_boundary_are_refused_where_outputs_are_far_off():
    output = torch.tensor([[1.0, 0.2]]).repeat(40, 1)
    outside = verify.compare(lambda _: output, lambda _: 0.7 * output, [(torch.zeros(40, 1), None)])
    assert outside["argmax_differs"] == 0
    with pytest.raises(JpqError, match="more than 90%"):
        verify._beyond_limits(outside, "")
