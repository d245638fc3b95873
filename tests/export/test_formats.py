"""The table of file formats: every row is written and compared, and the settings know its name."""

import pytest
from quantized_nets import EXAMPLE, IMAGES, Residual, quantized
from torch import nn

from jpq.config import FORMS, ONNX_WEIGHTS
from jpq.export import formats, torch_export
from jpq.export.onnx.narrow_weights import WEIGHTS
from jpq.types import JpqError


def test_settings_and_tables_list_the_same_names():
    assert tuple(formats.FORMATS) == FORMS
    assert tuple(WEIGHTS) == ONNX_WEIGHTS
    names = [entry.file_name for entry in formats.FORMATS.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("form", list(formats.FORMATS))
def test_every_form_computes_the_model(form, tmp_path):
    model = quantized(Residual, 3, 8).finalize()
    made = formats.write(model, EXAMPLE, tmp_path, [form], IMAGES)[form]
    assert made["bytes"] == (tmp_path / made["file"]).stat().st_size > 0
    found = made["verified"].get("rebuilt_vs_onnxruntime", made["verified"])
    assert found["images"] == 32
    assert found["argmax_agreement"] >= 1 - 1 / 32


def test_a_form_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    model, other = quantized(Residual, 3).finalize(), quantized(Residual, 3).finalize()
    nn.init.normal_(other.linear.weight)
    write = torch_export.export_pt2
    monkeypatch.setattr(formats, "export_pt2", lambda small, *rest: write(other, *rest))
    with pytest.raises(JpqError, match="differ on"):
        formats.write(model, EXAMPLE, tmp_path, ["pt2"], IMAGES)
