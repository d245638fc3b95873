"""Limits of verification: the same for every network, however unstable it is itself."""

import copy

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
    assert record["rebuilt_float32_vs_float64"]["argmax_differs"] > 200  # for information

    other = copy.deepcopy(model)
    other.bias += torch.tensor([0.05, 0, 0, 0])  # a few decisions change
    share = verify.compare(model, other, batches)["argmax_differs"] / 400
    assert verify.RARE < share < 0.05
    export_float(other, batches[0][0], path)
    with pytest.raises(JpqError, match=r"decisions come out differently, more than 0\.5%"):
        verify.exported(model, path, batches)

    other.bias.copy_(model.bias + 0.05)  # every decision stays, every number is off
    export_float(other, batches[0][0], path)
    with pytest.raises(JpqError, match=r"400 of 400 samples, more than 20%: this is more than rounding"):
        verify.exported(model, path, batches)
