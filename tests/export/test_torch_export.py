"""The .pt2 file: it loads without jpq, and a model that cannot be exported is named with the reason."""

import subprocess
import sys

import pytest
import torch
from quantized_nets import EXAMPLE, Residual, Small, quantized
from torch import nn

import jpq
from jpq.export import torch_export
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
