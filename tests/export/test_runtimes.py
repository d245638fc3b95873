"""Runtimes by name: OpenVINO computes what the model computes, and unknown or missing ones are named."""

import sys
from pathlib import Path

import onnx
import pytest
import torch
from onnx import helper
from quantized_nets import EXAMPLE, IMAGES, Small, quantized
from thinned import thinned
from torch import nn

from jpq.export.onnx.export import export_float, export_onnx
from jpq.export.runtimes import Session
from jpq.export.timing import find_float_layers
from jpq.export.verify import compare
from jpq.types import JpqError


@pytest.mark.parametrize(("bits", "weights"), thinned([(8, "int8"), (3, "int8"), (4, "int4")], lambda i, _: i != 0))
def test_openvino_agrees(bits, weights, tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed")
    from jpq.export.runtimes import open_session

    model = quantized(Small, bits, 8).finalize()
    export_onnx(model, EXAMPLE, tmp_path / "m.onnx", weights)
    found = compare(model, open_session("openvino", tmp_path / "m.onnx"), IMAGES)
    assert found["argmax_agreement"] >= 1 - 2 / 32
    assert open_session("openvino", tmp_path / "m.onnx", 1)(EXAMPLE[:3]).shape == (3, 4)


def test_runtimes_are_named(tmp_path, monkeypatch):
    from jpq.export.runtimes import open_session, parse_runtimes

    assert parse_runtimes("onnxruntime, onnxruntime") == ["onnxruntime", "onnxruntime"]
    for names, why in (("onnxruntim", "Did you mean onnxruntime"), ("", "No runtime")):
        with pytest.raises(JpqError, match=why):
            parse_runtimes(names)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(JpqError, match="openvino is not installed"):
        parse_runtimes("openvino")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(JpqError, match="onnxruntime cannot load"):
        open_session("onnxruntime", tmp_path / "text.onnx")
    with pytest.raises(JpqError, match="is not there"):
        open_session("onnxruntime", Path("nothing.onnx"))


def test_half_precision_inside_a_model_is_told(tmp_path):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.a(x).relu()
            return self.b(x.float())

    export_float(Half().eval(), torch.rand(2, 6), tmp_path / "half.onnx")
    with pytest.raises(JpqError, match=r"cannot compute the operator \w+ of '.+' in the type .*torch\.autocast"):
        Session(tmp_path / "half.onnx")


@pytest.mark.parametrize(
    "locations", [["../w.bin"], ["w.bin", "../w.bin"], ["/w.bin"], ["C:\\w.bin"], ["*/_ORT_MEM_ADDR_/*"]], ids=str
)
@pytest.mark.parametrize("in_function", [False, True])
def test_weights_outside_of_the_folder_of_a_file_are_refused(locations, in_function, tmp_path):
    weight = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    for location in locations:
        weight.external_data.add(key="location", value=location)
    opset = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    x, y = (helper.make_tensor_value_info(name, 1, [4]) for name in "xy")
    nodes = [helper.make_node("Constant", [], ["w"], value=weight), helper.make_node("Add", ["x", "w"], ["y"])]
    functions = [helper.make_function("own", "Shift", ["x"], ["y"], nodes, opset)] if in_function else []
    graph = helper.make_graph(
        [helper.make_node("Shift", ["x"], ["y"], domain="own") if in_function else nodes[1]],
        "g",
        [x],
        [y],
        [] if in_function else [weight],
    )
    path = tmp_path / "m.onnx"
    model = helper.make_model(graph, functions=functions, opset_imports=opset, ir_version=8)
    path.write_bytes(model.SerializeToString())
    for read in (Session, find_float_layers):
        with pytest.raises(JpqError, match="its weight 'w' lies outside of its folder"):
            read(path)
