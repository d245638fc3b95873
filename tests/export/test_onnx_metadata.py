"""Names of nodes by layer, and metadata, in exported ONNX files."""

import json
import time

import numpy as np
import onnx
import pytest
import torch
from small_net import Small
from torch import nn

import jpq
from jpq.export import Session
from jpq.export.onnx import read_metadata
from jpq.export.onnx.naming import COMPUTING_OPS, ModuleNames, split_scope
from jpq.export.origin import origin_of

X = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Nested(nn.Module):
    """Layers in nested containers, one of them called twice."""

    def __init__(self):
        super().__init__()
        block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.stem = nn.Conv2d(1, 6, 3)
        self.layer1 = nn.ModuleList([nn.ModuleDict({"conv1": block, "down": nn.Conv2d(6, 6, 1)})])
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))

    def forward(self, x):
        x = self.stem(x).relu()
        part = self.layer1[0]
        return self.head(part["conv1"](part["conv1"](x)) + part["down"](x))


def exported(model, path, weights="int8", metadata=None, **settings):
    torch.manual_seed(0)
    small = jpq.compress(model.eval(), X, "djpq", bops="10%", steps=1, **settings).finalize()
    jpq.export_onnx(small, X, path, weights, metadata)
    return small, onnx.load(str(path))


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("settings", [{}, {"output_bits": 8}])
def test_computing_nodes_bear_the_names_of_layers(weights, settings, tmp_path):
    small, file = exported(Small(), str(tmp_path / "small.onnx"), weights, **settings)
    names = [node.name for node in file.graph.node]
    assert len(set(names)) == len(names)
    computing = [node.name for node in file.graph.node if node.op_type in COMPUTING_OPS]
    assert computing == ["stem", "a", "b", "head"]
    for layer in computing:
        for part in ("input_quant", "weight_quant"):
            assert any(name.startswith(f"{layer}.{part}/") for name in names), (layer, part)
    if settings:
        assert any("/results/" in name for name in names)
    assert not any("export_handler" in name for name in names)
    torch.testing.assert_close(Session(tmp_path / "small.onnx", optimised=False)(X), small(X).detach())


def test_nested_names_and_several_calls(tmp_path):
    _, file = exported(Nested(), tmp_path / "nested.onnx")
    computing = [node.name for node in file.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert computing == ["stem", "layer1.0.conv1.0", "layer1.0.conv1.0_1", "layer1.0.down", "head.2"]


def test_qonnx_and_float_files_are_named_too(tmp_path):
    from jpq.export.onnx import export_float, export_qonnx

    small, _ = exported(Small(), tmp_path / "small.onnx")
    export_qonnx(small, X, str(tmp_path / "q.onnx"))
    export_float(Small(), X, str(tmp_path / "f.onnx"))
    for name in ("q.onnx", "f.onnx"):
        names = {node.name for node in onnx.load(str(tmp_path / name)).graph.node}
        assert {"a", "b", "head"} <= names
        assert read_metadata(tmp_path / name)["jpq_version"]


def test_scopes_lead_to_modules():
    modules = ModuleNames({"", "layer1", "layer1.0", "layer1.0.conv1", "conv1", "layer1.0.conv1.weight_quant"})
    assert split_scope("/layer1/layer1.0/conv1/Conv", modules) == ("layer1.0.conv1", ["Conv"])
    assert split_scope("/conv1/Conv", modules) == ("conv1", ["Conv"])
    assert split_scope("/elsewhere/Conv", modules) == ("", ["elsewhere", "Conv"])
    assert split_scope("/layer1/conv1/Conv", modules) == ("layer1.0.conv1", ["Conv"])  # layer1.0 was not called
    two = ModuleNames({"a.conv", "b.conv"})
    assert split_scope("/conv/Conv", two) == ("", ["conv", "Conv"])  # which of both is not known
    assert split_scope("/conv_1/Conv", ModuleNames({"conv", "conv.0"})) == ("conv", ["Conv"])


def test_scopes_of_deep_networks_are_looked_up_at_once():
    names = [f"features.{i}.block.{j}.weight_quant.{k}" for i in range(60) for j in range(8) for k in range(20)]
    modules = ModuleNames({name.rsplit(".", n)[0] for name in names for n in range(6)})
    started = time.process_time()
    found = [split_scope(f"/{name.replace('.', '/')}/Mul", modules) for name in names]
    assert time.process_time() - started < 2, "not all names for each node"
    assert found == [(name, ["Mul"]) for name in names]


def test_metadata_of_model_and_caller_are_stored(tmp_path):
    given = {"mean": [0.5], "std": [0.25], "class_names": ["zéro", "one"], "colour_order": "grey", "task": None}
    small, _ = exported(Small(), tmp_path / "small.onnx", metadata=given)
    stored = read_metadata(str(tmp_path / "small.onnx"))
    assert stored == {
        "jpq_version": stored["jpq_version"],
        "method": "djpq",
        "budget": {"bops": "10%"},
        "mean": [0.5],
        "std": [0.25],
        "class_names": ["zéro", "one"],
        "colour_order": "grey",
    }
    assert origin_of(small).about == {"budget": {"bops": "10%"}}
    with pytest.raises(jpq.JpqError, match="Metadata 'mean' is a Tensor"):
        jpq.export_onnx(small, X, tmp_path / "other.onnx", metadata={"mean": torch.ones(1)})
    with pytest.raises(jpq.JpqError, match="Metadata 'mean' is a ndarray that JSON cannot hold"):
        jpq.export_onnx(small, X, tmp_path / "other.onnx", metadata={"mean": np.ones(2)})
    (tmp_path / "no.onnx").write_text("no", encoding="utf-8")
    with pytest.raises(jpq.JpqError, match="no ONNX file"):
        read_metadata(tmp_path / "no.onnx")


def test_metadata_goes_along_with_a_saved_model(tmp_path):
    small, _ = exported(Small(), tmp_path / "small.onnx")
    jpq.save(small, tmp_path / "kept")
    loaded, _ = jpq.load(tmp_path / "kept", model=Small())
    jpq.export_onnx(loaded, X, tmp_path / "again.onnx")
    assert json.dumps(read_metadata(tmp_path / "again.onnx")) == json.dumps(read_metadata(tmp_path / "small.onnx"))


def test_evaluate_prepares_images_as_the_file_says(tmp_path, capsys):
    from jpq.cli.main import main
    from jpq.tasks import CLASSIFICATION, data

    images = data.load("digits", mean=[0.9], std=[0.1])
    example = next(iter(images.test))[0]
    torch.manual_seed(0)
    small = jpq.compress(Small().eval(), example, "djpq", bops="20%", steps=1).finalize()
    about = {"mean": [0.9], "std": [0.1], "input_size": [1, 8, 8]}
    jpq.export_onnx(small, example, tmp_path / "small.onnx", metadata=about)
    right = CLASSIFICATION.evaluate(Session(tmp_path / "small.onnx"), images.test)
    assert CLASSIFICATION.evaluate(Session(tmp_path / "small.onnx"), data.load("digits").test) != right
    assert main(["evaluate", str(tmp_path / "small.onnx"), "--data", "digits"]) == 0
    assert f"{100 * right:.2f} %" in capsys.readouterr().out.replace("\u00a0", " ")


def test_runs_describe_their_images(tmp_path):
    from jpq.config import Budget, Config, Run, Task, Train

    config = Config(
        task=Task(limit=150),
        budget=Budget(target_bops="3%"),
        train=Train(epochs=2, float_epochs=1),
        run=Run(out=tmp_path),
    )
    result = jpq.optimize(config)
    stored = read_metadata(result.folder / "model.onnx")
    assert stored["task"] == "classification"
    assert stored["budget"] == {"bops": "3%"}
    assert stored["input_size"] == [1, 8, 8]
    assert stored["mean"] == result.data["mean"]
    assert stored["std"] == result.data["std"]
    assert stored["colour_order"] == "grey"
    assert stored["method"] == result.method
