"""The .pt2 file: it loads without jpq, and a model that cannot be exported is named with the reason."""

import subprocess
import sys

import pytest
from quantized_nets import EXAMPLE, Residual, Small, quantized

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
