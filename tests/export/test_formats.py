"""The table of file formats: every row is written and compared, wrong files are refused, and the settings know it."""

import pytest
import torch
from quantized_nets import EXAMPLE, IMAGES, Residual, quantized
from thinned import thinned
from torch import nn

from jpq.config import ONNX_WEIGHTS, parse_formats
from jpq.export import formats
from jpq.export.onnx.narrow_weights import WEIGHTS
from jpq.export.verify import compare
from jpq.files.formats import FORMATS, Format
from jpq.tasks import Classification
from jpq.types import JpqError


class ChangesTheModel:
    """Batches whose first reading, after the file was written, gives the model other weights than the file has."""

    def __init__(self, batches, model):
        self.batches, self.model, self.is_changed = batches, model, False

    def __iter__(self):
        if not self.is_changed:
            nn.init.normal_(self.model.linear.weight)
            self.is_changed = True
        return iter(self.batches)


class Indifferent(Classification):
    """Takes any two outputs for the same decision."""

    def same_decision(self, a, b):
        return torch.ones(len(a), dtype=torch.bool)


class Strict(Classification):
    """Takes no two outputs for the same decision."""

    def same_decision(self, a, b):
        return torch.zeros(len(a), dtype=torch.bool)


def write_state(small, example, path, batches, weights, task):
    torch.save(small.state_dict(), path)
    return compare(small, small, batches, task)


def test_settings_and_tables_list_the_same_names():
    assert tuple(WEIGHTS) == ONNX_WEIGHTS
    names = [entry.file_name for entry in FORMATS.values()]
    assert len(set(names)) == len(names)


def test_a_new_row_is_a_form_of_the_settings(monkeypatch, tmp_path):
    with pytest.raises(JpqError, match="Unknown form 'state'"):
        parse_formats("state")
    monkeypatch.setitem(FORMATS, "state", Format("model.pth", write_state))
    assert parse_formats("state,pt2") == ("onnx", "pt2", "state")
    record = formats.write(quantized(Residual, 3, 8).finalize(), EXAMPLE, tmp_path, ["state"], IMAGES)["state"]
    assert record["file"] == "model.pth"


@pytest.mark.parametrize("form", list(FORMATS))
def test_every_form_computes_the_model(form, tmp_path):
    model = quantized(Residual, 3, 8).finalize()
    made = formats.write(model, EXAMPLE, tmp_path, [form], IMAGES)[form]
    assert made["bytes"] == (tmp_path / made["file"]).stat().st_size > 0
    found = made["verified"].get("rebuilt_vs_onnxruntime", made["verified"])
    assert found["images"] == 32
    assert found["argmax_agreement"] >= 1 - 1 / 32


@pytest.mark.parametrize("form", list(FORMATS))
def test_a_form_that_computes_something_else_is_refused(form, tmp_path):
    torch.manual_seed(0)
    model = quantized(Residual, 3).finalize()
    with pytest.raises(JpqError, match="differ"):
        formats.write(model, EXAMPLE, tmp_path, [form], ChangesTheModel(IMAGES, model))


@pytest.mark.parametrize("form", thinned(FORMATS, lambda _, form: form != "qonnx"))  # as onnx; it is loaded above
def test_the_task_says_which_outputs_agree(form, tmp_path):
    model = quantized(Residual, 3, 8).finalize()
    record = formats.write(model, EXAMPLE, tmp_path, [form], IMAGES, task=Indifferent())[form]["verified"]
    assert record.get("rebuilt_vs_onnxruntime", record)["argmax_differs"] == 0
    with pytest.raises(JpqError, match="differ"):
        formats.write(model, EXAMPLE, tmp_path, [form], IMAGES, task=Strict())
