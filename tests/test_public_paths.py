"""Paths may be text or Path objects in every public function."""

import inspect
import typing
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch

import jpq
from jpq.config import Budget, Decide, Run, Task, read_toml, write_toml
from jpq.data_free import DataFreeSettings
from jpq.export import Session, build_from_plan, export_pt2, open_session, write_formats
from jpq.export.onnx import export_float, export_qonnx, read_metadata
from jpq.export.packed import pack_model, unpack_model
from jpq.export.timing import count_kernels, read_table
from jpq.files import load_tensors, save_tensors
from jpq.plan import read as read_plan
from jpq.results import read_run
from jpq.tasks import data, models

ASSETS = Path(__file__).parent / "assets" / "v0.1"
RUN = ASSETS / "runs" / "586917f2e12a"
X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def small():
    return jpq.load(RUN)


@pytest.mark.parametrize("kind", [str, Path])
def test_files_are_written_and_read(kind, small, tmp_path):
    model, plan = small
    folder = kind(tmp_path)

    def file(name):
        return kind(tmp_path / name)

    jpq.export_onnx(model, X, file("a.onnx"))
    export_qonnx(model, X, file("q.onnx"))
    export_float(models.build("convnet", 10), X, file("f.onnx"))
    export_pt2(model, X, file("a.pt2"))
    assert write_formats(model, X, folder, ["onnx"], [(X, torch.zeros(4, dtype=torch.long))])["onnx"]["bytes"]
    assert read_metadata(file("a.onnx"))["method"] == "taylor"
    assert sum(count_kernels(file("a.onnx")).values())
    out = model(X).detach()
    for session in (Session(file("a.onnx")), open_session("onnxruntime", file("a.onnx"))):
        torch.testing.assert_close(session(X), out, rtol=0.1, atol=0.1)
    pack_model(model, plan, X, file("a.packed"))
    torch.testing.assert_close(unpack_model(model, file("a.packed"))(X), out)
    save_tensors(model, file("a.safetensors"))
    load_tensors(model, file("a.safetensors"))
    models.load_weights(models.build("convnet", 10), _weights(file("w.pth")))
    jpq.save(model, file("kept"), X)
    assert torch.equal(jpq.load(file("kept"))[0](X), out)
    config = replace(jpq.Config(), run=Run(out=folder))
    write_toml(config, file("c.toml"))
    assert read_toml(file("c.toml")) == config


def _weights(path):
    torch.save(models.build("convnet", 10).state_dict(), path)
    return path


@pytest.mark.parametrize("kind", [str, Path])
def test_folders_of_runs_are_read(kind):
    small, plan = jpq.load(kind(RUN))
    assert read_plan(kind(RUN / "plan.json")) == plan
    assert read_run(kind(RUN)).method == "taylor"
    assert len(jpq.front(kind(RUN))) == len(jpq.front([kind(RUN)])) == 1
    assert read_table(kind(ASSETS / "table.csv")).entries
    assert build_from_plan(plan, models.build("convnet", 10)).state_dict().keys() == small.state_dict().keys()
    assert data.load("digits", kind("data"), limit=50).name == "digits"


@pytest.mark.parametrize("section", [Task, Budget, Decide, Run, DataFreeSettings])
def test_settings_take_text_for_paths(section):
    names = [f.name for f in fields(section) if "Path" in str(f.type)]
    assert names
    for name in names:
        assert getattr(section(**{name: "a/b"}), name) == Path("a/b")
        assert section(**{name: "a/b"}) == section(**{name: Path("a/b")})
        assert getattr(section(**{name: None}), name) is None


def test_settings_of_text_and_of_paths_have_one_hash():
    texts, paths = ({"weights": kind("w.pth")} for kind in (str, Path))
    assert jpq.Config(task=Task(**texts)).hash() == jpq.Config(task=Task(**paths)).hash()


def test_no_public_function_takes_paths_alone():
    """Every parameter of a public function that is a path is annotated as text too."""
    alone = []
    for name in jpq.__all__:
        function = getattr(jpq, name)
        if callable(function) and not is_dataclass(function) and not isinstance(function, dict):
            for parameter in inspect.signature(function).parameters.values():
                text = str(parameter.annotation)
                if "Path" in text and "str" not in text and parameter.annotation is not typing.Any:
                    alone.append(f"{name}({parameter.name})")
    assert not alone


def test_mask_may_be_text(tmp_path):
    model = models.build("convnet", 10)
    for kind in (str, Path):
        with pytest.raises(jpq.JpqError, match="no such file"):
            jpq.compress(model, X, mask=kind(tmp_path / "no"), bops="5%")
