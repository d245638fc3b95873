"""Weights files as training scripts write them: each loads the same weights, or is refused with right advice."""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel

from jpq.tasks.models import build
from jpq.tasks.weights import load_weights
from jpq.types import JpqError

Tensors = dict[str, Tensor]


def net(classes: int = 4, channels: int = 3) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes)),
    )


torch.manual_seed(1)
TRAINED = net()
GIVEN: Tensors = TRAINED.state_dict()


def behind(prefix: str, tensors: Tensors = GIVEN) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def shifted() -> Tensors:
    return {name: value + 1 for name, value in GIVEN.items()}


class Wrapper(nn.Module):
    """A model inside another, such as a Lightning module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(4))


def inner_compiled() -> Tensors:
    model = Wrapper(net())
    model.model.load_state_dict(GIVEN)
    model.model = torch.compile(model.model)  # type: ignore[assignment]
    return model.state_dict()


OPTIMIZER = torch.optim.Adam(TRAINED.parameters()).state_dict()

LOADED: dict[str, Any] = {
    "plain": GIVEN,
    "torch.compile": behind("_orig_mod."),
    "DDP of torch.compile": behind("module._orig_mod."),
    "torch.compile of DDP": behind("_orig_mod.module."),
    "FSDP": behind("_fsdp_wrapped_module."),
    "DataParallel": DataParallel(TRAINED).state_dict(),
    "AveragedModel": AveragedModel(TRAINED).state_dict(),
    "tutorial": {"epoch": 3, "model_state_dict": GIVEN, "optimizer_state_dict": OPTIMIZER, "loss": 0.1},
    "pytorch-cifar": {"net": GIVEN, "acc": 90.0, "epoch": 3},
    "imagenet": {
        "epoch": 9,
        "arch": "r",
        "state_dict": behind("module."),
        "best_acc1": torch.tensor(3.0),
        "opt": OPTIMIZER,
    },
    "fastai": {"model": GIVEN, "opt": OPTIMIZER},
    "Lightning": {"state_dict": behind("model."), "epoch": 1, "loops": {"fit": {"n": 1}}, "callbacks": {}},
    "Lightning with a loss": {"state_dict": {**behind("model."), "criterion.weight": torch.ones(4)}},
    "Lightning of torch.compile": {"state_dict": inner_compiled()},
    "mmcv": {"meta": {"CLASSES": ("a", "b")}, "state_dict": behind("backbone."), "optimizer": OPTIMIZER},
    "two parts": {"state_dict": {f"{'head' if n.startswith('5') else 'backbone'}.{n}": v for n, v in GIVEN.items()}},
    "detectron": {"model": GIVEN, "__author__": "x", "matching_heuristics": True},
    "basicsr": {"params": GIVEN},
    "thop": {**GIVEN, "total_ops": torch.zeros(1), "0.total_ops": torch.zeros(1), "0.total_params": torch.zeros(1)},
    "timm": {"state_dict": GIVEN, "args": argparse.Namespace(lr=0.1, betas=[1], name="x"), "metric": np.float64(3.5)},
    "numpy's numbers": {"model": GIVEN, "a": np.int64(3), "b": np.float32(1), "c": np.bool_(True)},
    "old, without counters": {n: v for n, v in GIVEN.items() if "num_batches" not in n},
    "float64": {n: v.double() if v.is_floating_point() else v for n, v in GIVEN.items()},
    "parameters": {n: nn.Parameter(v) if v.is_floating_point() else v for n, v in GIVEN.items()},
    "the same twice": {"student": GIVEN, "teacher": dict(GIVEN)},
    "averaged beside": {"state_dict": shifted(), "state_dict_ema": GIVEN},
    "averaged behind a prefix": {**behind("online_model.", shifted()), **behind("ema_model."), "step": torch.tensor(3)},
}


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("end", [".pth", ".bin", ".ckpt", ".pth.tar"])
def test_files_of_common_scripts_load(tmp_path, name, end):
    path = tmp_path / f"w{end}"
    torch.save(LOADED[name], path, _use_new_zipfile_serialization=end != ".pth.tar")
    model = net()
    load_weights(model, path)
    counters = "num_batches_tracked"
    assert all(torch.equal(v, GIVEN[n]) for n, v in model.state_dict().items() if not n.endswith(counters))


def test_safetensors_and_a_model_within_another(tmp_path):
    safetensors.torch.save_file(behind("model."), tmp_path / "model.safetensors")
    load_weights(net(), tmp_path / "model.safetensors")
    whole = Wrapper(net())
    del whole.criterion
    torch.save(GIVEN, tmp_path / "w.pth")
    load_weights(whole, tmp_path / "w.pth")
    assert torch.equal(whole.model[0].weight, GIVEN["0.weight"])  # type: ignore[index]


def test_what_was_done_to_them_is_told(tmp_path):
    def notes(content: Any) -> tuple[str, ...]:
        torch.save(content, tmp_path / "w.pth")
        return load_weights(net(), tmp_path / "w.pth")

    assert notes(GIVEN) == ()
    (cast,) = notes({n: v.half() if v.is_floating_point() else v for n, v in GIVEN.items()})
    assert "stored as float16; they were cast" in cast
    (averaged,) = notes(LOADED["averaged beside"])
    assert "averaged over training were taken ('state_dict_ema')" in averaged
    (left,) = notes(LOADED["Lightning with a loss"])
    assert "1 tensors in 'w.pth' that are no part of this model were left out (criterion)" in left


def test_half_precision_is_cast_exactly(tmp_path):
    half = {n: v.bfloat16() if v.is_floating_point() else v for n, v in GIVEN.items()}
    torch.save(half, tmp_path / "w.pth")
    model = net()
    load_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(v, half[n].to(v.dtype)) for n, v in model.state_dict().items())
    assert model[0].weight.dtype == torch.float32  # type: ignore[index]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (net(7).state_dict(), "They have 7 outputs in layer '5', and the data 4 classes: .* with 4 outputs"),
        (net(4, 1).state_dict(), "They take 1 channels in layer '0', and the images have 3"),
        ({n: v for n, v in GIVEN.items() if not n.startswith("5")}, "2 missing .*The file lacks 5: train the whole"),
        (
            {**GIVEN, "6.weight": torch.ones(3)},
            r"1 unexpected \(6.weight\).*All weights of this model are there",
        ),
        (dict(TRAINED.named_parameters()), "missing .*lacks the statistics of norms, .*save the whole state"),
        (behind("model.", net(7).state_dict()), "7 outputs in layer '5'"),
        ({"student": GIVEN, "teacher": shifted()}, r"'student' and 'teacher'.*torch.load\('w.pth'\)\['student'\]"),
        ({**behind("a."), **behind("b.", shifted())}, "names behind 'a.' and 'b.'"),
        ({n: v.to(torch.int8) for n, v in GIVEN.items()}, r"quantized already: .*float model"),
        (OPTIMIZER, "hold no dict of tensors"),
    ],
)
def test_weights_that_do_not_fit_say_why(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pth")
    model = net()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(JpqError, match=words):
        load_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


class Tokens(nn.Module):
    """A table of positions before a classifier; `decomposed` is no table of positions."""

    def __init__(self, positions: int, units: int = 3) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, 4))
        self.decomposed = nn.Parameter(torch.zeros(units, 4))


def test_weights_for_images_of_another_size_say_so(tmp_path):
    torch.save(Tokens(197).state_dict(), tmp_path / "w.pth")
    with pytest.raises(JpqError, match=r"pos_embed \[1, 197, 4\] for \[1, 5, 4\].*images of the size"):
        load_weights(Tokens(5), tmp_path / "w.pth")
    torch.save(Tokens(5, units=2).state_dict(), tmp_path / "w.pth")
    with pytest.raises(JpqError, match=r"^(?!.*images of the size).*decomposed"):
        load_weights(Tokens(5), tmp_path / "w.pth")


def test_a_file_without_the_classifier_says_so(tmp_path):
    torch.save({n: v for n, v in build("resnet20", 10).state_dict().items() if "linear" not in n}, tmp_path / "w.pth")
    with pytest.raises(JpqError, match="The file lacks linear: train the whole model"):
        load_weights(build("resnet20", 10), tmp_path / "w.pth")


def follow(advice: str, folder: Path) -> Tensors:
    """Run the Python in an error's advice in a folder; returns the weights that it saves."""
    statements = re.search(
        r"((?:model|content) = (?:torch|pickle)\.load.*?'weights\.pth'\)|torch\.save\(.*'weights\.pth'\))", advice
    )
    assert statements, advice
    code = statements[1].replace("'w.", f"'{folder}/w.").replace("'weights.pth'", f"'{folder}/weights.pth'")
    exec(code, {"torch": torch, "numpy": np, "pickle": pickle})
    return torch.load(folder / "weights.pth")


def test_the_advice_for_whole_models_is_right(tmp_path):
    torch.save(TRAINED, tmp_path / "w.pth")
    with pytest.raises(JpqError, match=r"It is a whole model \(torch.nn.modules.container.Sequential\)") as caught:
        load_weights(net(), tmp_path / "w.pth")
    assert follow(str(caught.value), tmp_path).keys() == GIVEN.keys()
    load_weights(net(), tmp_path / "weights.pth")


def test_the_advice_for_other_objects_and_programs_is_right(tmp_path):
    torch.save({"state_dict": GIVEN, "where": Path("x")}, tmp_path / "w.pth")
    with pytest.raises(JpqError, match=r"Beside tensors it holds Python objects \(pathlib") as caught:
        load_weights(net(), tmp_path / "w.pth")
    assert follow(str(caught.value), tmp_path).keys() == GIVEN.keys()
    torch.jit.save(torch.jit.trace(TRAINED.eval(), torch.rand(1, 3, 8, 8)), tmp_path / "w.pt")
    with pytest.raises(JpqError, match="It is a TorchScript program") as caught:
        load_weights(net(), tmp_path / "w.pt")
    assert follow(str(caught.value), tmp_path).keys() == GIVEN.keys()


@pytest.mark.parametrize("name", ["w.pth", "w.pkl"])
def test_the_advice_for_pickled_tensors_is_right(name, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps(GIVEN))
    with pytest.raises(JpqError, match=r"It was written by pickle\.dump") as caught:
        load_weights(net(), tmp_path / name)
    assert follow(str(caught.value), tmp_path).keys() == GIVEN.keys()
    load_weights(net(), tmp_path / "weights.pth")


def test_the_advice_for_arrays_is_right(tmp_path):
    arrays = {name: value.numpy() for name, value in GIVEN.items()}
    torch.save(arrays, tmp_path / "w.pth")
    np.savez(tmp_path / "w.npz", **arrays)
    for name, words in (("w.pth", "Beside tensors it holds arrays of NumPy"), ("w.npz", "are arrays of NumPy")):
        with pytest.raises(JpqError, match=words) as caught:
            load_weights(net(), tmp_path / name)
        assert follow(str(caught.value), tmp_path).keys() == GIVEN.keys()
        load_weights(net(), tmp_path / "weights.pth")


def test_files_whose_names_say_something_else(tmp_path):
    safetensors.torch.save_file(GIVEN, tmp_path / "w.safetensors")
    torch.save(GIVEN, tmp_path / "w.pt")
    torch.save(GIVEN, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    contents = {
        "p.safetensors": (pointer, "a pointer of Git LFS.*git lfs pull"),
        "p.bin": (pointer, "a pointer of Git LFS.*git lfs pull"),
        "page.pth": (b"\n<!DOCTYPE html><html>Sign in</html>", "a web page.*download it again"),
        "words.pth": (b"<weights>", "it is no pickle"),
        "s.pth": ((tmp_path / "w.safetensors").read_bytes(), "ends in .safetensors"),
        "t.safetensors": ((tmp_path / "w.pt").read_bytes(), "torch.save wrote.*ends in .pth"),
        "u.safetensors": ((tmp_path / "old.pt").read_bytes(), "torch.save wrote.*ends in .pth"),
    }
    for name, (content, words) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(JpqError, match=words):
            load_weights(net(), tmp_path / name)


def test_files_that_are_no_weights(tmp_path):
    def fails(name: str, words: str) -> None:
        with pytest.raises(JpqError, match=words):
            load_weights(net(), tmp_path / name)

    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "pytorch_model.bin").write_bytes(b"x")
    fails("hub", r"are a folder. Give a file with weights, such as .*pytorch_model.bin")
    (tmp_path / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    fails("model.safetensors.index.json", "the index of several files")
    (tmp_path / "w.h5").write_bytes(b"x")
    fails("w.h5", "end in '.h5'; jpq reads .pth")
    (tmp_path / "w.pth").write_bytes(b"")
    fails("w.pth", "the file is empty")
    (tmp_path / "w.pkl").write_bytes(b"\x80\x04}.")
    fails("w.pkl", "Load it with the library that wrote it")


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    torch.save(GIVEN, tmp_path / "w.pth")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_weights(net(), "~/w.pth") == ()


class Evil:
    """An object that a pickle makes by calling a function."""

    def __reduce__(self) -> Any:
        return print, ("it ran",)


@pytest.mark.parametrize(
    "content",
    [
        argparse.Namespace(a=Evil()),
        {"a": np.array([1.0, 2.0])},
        {"a": np.str_("x")},
        {"a": np.void(b"xx")},
        {"a": np.dtype([("x", "f8")])},
        {"a": np.datetime64("2026-01-01")},
    ],
    ids=["object", "array", "text", "bytes", "dtype", "date"],
)
def test_settings_beside_weights_open_no_door(tmp_path, content, capsys):
    torch.save({"state_dict": GIVEN, "args": content}, tmp_path / "w.pth")
    with pytest.raises(JpqError, match="cannot be read"):
        load_weights(net(), tmp_path / "w.pth")
    assert "it ran" not in capsys.readouterr().out
