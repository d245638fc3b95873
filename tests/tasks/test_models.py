"""Models by name: sizes known from their papers, weights from files, every bad input of jpq.tasks.models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from jpq.tasks.data import load
from jpq.tasks.models import MODELS, build, check_fits, load_weights
from jpq.types import JpqError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data with the real weights is absent")
USUAL = {"lenet5": (1, 28), "convnet": (1, 8)} | {
    name: (3, 32) for name in ("vgg7", "resnet20", "resnet32", "resnet44", "resnet56")
}


def macs(model: nn.Module, shape: tuple[int, ...]) -> list[int]:
    """Multiply-accumulates of each convolution and linear layer for one sample, in the order they run."""
    found: list[int] = []

    def count(module: nn.Module, _: object, out: Tensor) -> None:
        found.append(out[0].numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model.eval()(torch.zeros(1, *shape))
    return found


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("lenet5", 4_267_008),
        ("vgg7", 615_917_568),
        ("resnet20", 40_551_040),  # 40.55 M and 125.49 M: the usual figures of the pruning literature
        ("resnet56", 125_485_696),
    ],
)
def test_macs_are_the_published_ones(name, total):
    channels, side = USUAL[name]
    counts = macs(build(name, 10), (channels, side, side))
    assert sum(counts) == total
    if name == "lenet5":
        assert counts == [460_800, 3_276_800, 524_288, 5_120]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet20", 269_722), ("resnet32", 464_154), ("resnet44", 658_586), ("resnet56", 853_018)],
)
def test_parameters_are_the_published_ones(name, parameters):
    assert sum(p.numel() for p in build(name, 10).parameters()) == parameters


@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_its_usual_images_trains_and_follows_classes_and_channels(name):
    channels, side = USUAL[name] if "resnet" not in name else (3, 8)  # they average over any size
    model = build(name, 7)
    check_fits(model, torch.randn(2, channels, side, side), classes=7)
    model.train()(torch.randn(2, channels, side, side)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    check_fits(build(name, 3, channels=2), torch.randn(2, 2, side, side), classes=3)


def test_the_shortcut_keeps_every_second_pixel_between_zero_channels():
    block = build("resnet20", 10).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 6, 6)
    out = block(x)
    assert out.shape == (2, 32, 3, 3)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "inception_v3"])
def test_torchvision_models_give_one_tensor_also_in_training(name):
    model = build(f"torchvision:{name}", 7)
    assert model.train()(torch.randn(2, 3, 96, 96)).shape == (2, 7)
    check_fits(model, torch.randn(2, 3, 96, 96), classes=7)


@pytest.mark.parametrize(
    ("name", "channels", "match"),
    [
        ("resnet21", None, "Unknown model 'resnet21'. Did you mean .*resnet20"),
        ("resnet18", None, "Unknown model 'resnet18'. Did you mean torchvision:resnet18"),
        ("torchvision:resnet19", None, "Unknown torchvision model 'resnet19'. Did you mean resnet1"),
        ("torchvision:resnet18", 1, "takes images of 3 channels; the data has 1"),
        ("vgg7", 0, "at least 1 class and 1 channel"),
    ],
)
def test_bad_names(name, channels, match):
    with pytest.raises(JpqError, match=match):
        build(name, 10, channels)


USER = """
from torch import nn
def plain(): return nn.Linear(2, 3)
def both(classes, *, channels, bias=True): return nn.Linear(channels, classes, bias)
def one(classes=5): return nn.Linear(2, classes)
class Net(nn.Sequential):
    def __init__(self, classes): super().__init__(nn.Linear(2, classes))
def wants(width): return nn.Linear(width, 3)
def none(): return None
def fails(): raise KeyError("theirs")
made = plain()
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"user_model_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize(("name", "shape"), [("plain", (3, 2)), ("both", (7, 4)), ("one", (7, 2)), ("Net", (7, 2))])
def test_user_models_are_given_what_they_take(user, name, shape):
    model = build(f"{user}:{name}", 7, 4)
    assert next(model.parameters()).shape == shape


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("wants", "cannot be called: missing a required argument: 'width'"),
        ("none", "returned NoneType; it must return a torch.nn.Module"),
        ("made", "is a Linear; the model needs a function or class"),
        ("plane", "Did you mean plain"),
    ],
)
def test_bad_user_models(user, name, match):
    with pytest.raises(JpqError, match=match):
        build(f"{user}:{name}", 7)


def test_the_users_own_errors_pass_through(user):
    with pytest.raises(KeyError, match="theirs"):
        build(f"{user}:fails", 7)


def weights(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return build("convnet", 10).state_dict()


@pytest.mark.parametrize("end", [".pth", ".pt", ".th", ".safetensors"])
def test_weights_come_back_from_every_kind_of_file(tmp_path, end):
    path, given, model = tmp_path / f"w{end}", weights(1), build("convnet", 10)
    safetensors.torch.save_file(given, path) if end == ".safetensors" else torch.save(given, path)
    load_weights(model, path)
    assert all(torch.equal(value, given[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("wrap", ["state_dict", "model"])
def test_wrapped_prefixed_half_precision_weights_without_counters(tmp_path, wrap):
    given = {k: v for k, v in weights(1).items() if "num_batches" not in k}
    torch.save({wrap: {f"module.{k}": v.half() for k, v in given.items()}, "epoch": 3}, tmp_path / "w.pt")
    model = build("convnet", 10)
    load_weights(model, tmp_path / "w.pt")
    state = model.state_dict()
    assert all(torch.equal(state[k], v.half().float()) for k, v in given.items())
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_model_whose_own_names_begin_with_module_keeps_them(tmp_path):
    model = nn.DataParallel(nn.Linear(2, 2))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    before = model.module.weight.clone()
    nn.init.zeros_(model.module.weight)
    load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model.module.weight, before)


def test_weights_that_do_not_fit_name_the_keys_and_change_nothing(tmp_path):
    given = weights(1)
    given["extra.weight"] = torch.zeros(1)
    given["0.weight"] = torch.zeros(32, 3, 3, 3)
    for key in [key for key in given if key.startswith(("4.", "7."))]:
        del given[key]
    torch.save(given, tmp_path / "w.pt")
    model = build("convnet", 10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(JpqError) as caught:
        load_weights(model, tmp_path / "w.pt")
    assert "8 missing (4.weight, 4.bias, 4.running_mean, ...); 1 unexpected (extra.weight)" in str(caught.value)
    assert "1 differently shaped (0.weight [32, 3, 3, 3] for [32, 1, 3, 3])" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Foreign:
    """Something that only pickle can restore."""


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("w.pt", None, "There is no weights file"),
        ("w.onnx", b"x", "end in '.onnx'; jpq reads"),
        ("w.pt", b"", "cannot be read"),
        ("w.pt", b"not a checkpoint at all", "cannot be read"),
        ("w.safetensors", b"not a checkpoint at all", "cannot be read"),
        ("w.pt", {"weights": Foreign()}, "cannot be read"),
        ("w.pt", build("convnet", 10), "cannot be read"),
        ("w.pt", {"epoch": 3}, "hold no dict of tensors"),
        ("w.pt", torch.zeros(3), "hold no dict of tensors"),
        ("w.pt", {}, "hold no dict of tensors"),
        ("w.pt", weights() | {"11.bias": torch.full((10,), torch.inf)}, "hold NaN or infinity"),
        (
            "w.pt",
            weights() | {"1.running_var": torch.full((32,), torch.nan)},
            r"NaN or infinity: 1 in \(1.running_var\)",
        ),
    ],
)
def test_bad_weight_files(tmp_path, name, content, match):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(JpqError, match=match):
        load_weights(build("convnet", 10), path)


def test_a_cut_checkpoint_is_refused(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(weights(), path)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(JpqError, match="cannot be read"):
        load_weights(build("convnet", 10), path)


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("model", "shape", "match"),
    [
        (
            build("vgg7", 10, 1),
            (2, 1, 28, 28),
            r"cannot take a batch of shape \[2, 1, 28, 28\]: .*expects 8192 features, got 4608.*Choose",
        ),
        (build("lenet5", 10), (2, 1, 8, 8), r"cannot take a batch of shape \[2, 1, 8, 8\]"),
        (build("resnet20", 10), (2, 1, 32, 32), r"cannot take a batch of shape \[2, 1, 32, 32\]: .*channels"),
        (build("convnet", 5), (2, 1, 8, 8), r"gives \[2, 5\] .* must give \[2, 10\]"),
        (nn.Conv2d(1, 10, 3), (2, 1, 8, 8), r"gives \[2, 10, 6, 6\]"),
        (Two(), (2, 1, 8, 8), "gives tuple"),
    ],
)
def test_models_that_do_not_fit_the_data(model, shape, match):
    with pytest.raises(JpqError, match=match):
        check_fits(model, torch.zeros(shape), classes=10)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.zeros(2, 5, dtype=torch.int64), r"the input 'input'\). The inputs are word numbers .* a model of texts"),
        (torch.zeros(2, 5), "The inputs are rows of numbers: choose"),
        (torch.zeros(2, 3, 9), r"The inputs are windows \[samples, channels, time\]: choose"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"The inputs are bytes: let the data give floats"),
    ],
)
def test_what_to_choose_depends_on_the_inputs(inputs, words):
    with pytest.raises(JpqError, match=words) as caught:
        check_fits(build("resnet20", 10), inputs, classes=10)
    assert "image" not in str(caught.value)


def test_models_of_texts_and_of_images_are_told_from_each_other(monkeypatch):
    own = ModuleType("own_models")
    own.of_texts = lambda classes, vocabulary, length=5: nn.Linear(5, 2)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_models", own)
    with pytest.raises(JpqError, match="'own_models:of_texts' needs vocabulary, which only texts have"):
        build("own_models:of_texts", 2, 3)
    assert isinstance(build("own_models:of_texts", 2, 3, {"vocabulary": 9, "length": 5}), nn.Linear)
    with pytest.raises(JpqError, match="torchvision:resnet18 takes images, and the data are texts"):
        build("torchvision:resnet18", 2, 5, {"vocabulary": 9, "length": 5})


def test_checking_leaves_the_model_as_it_was():
    model = build("convnet", 10)
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_fits(model, torch.randn(2, 1, 8, 8))
    assert model.training
    assert not model[1].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@needs_files
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_public_weights_load(name):
    model = build(name, 10)
    load_weights(model, SHARED / "weights" / WEIGHTS[name])
    given = torch.load(SHARED / "weights" / WEIGHTS[name], map_location="cpu", weights_only=True)["state_dict"]
    assert torch.equal(model.linear.weight, given["module.linear.weight"])
    with pytest.raises(JpqError, match=r"linear.weight \[10, 64\] for \[100, 64\]"):
        load_weights(build(name, 100), SHARED / "weights" / WEIGHTS[name])


@pytest.mark.slow
@needs_files
@pytest.mark.parametrize(("name", "correct"), [("resnet20", 9_173), ("resnet56", 9_339)])
def test_the_public_weights_reach_their_accuracy(name, correct, tmp_path):
    subprocess.run([sys.executable, SHARED / "unpack.py", tmp_path], check=True, capture_output=True)
    data = load("cifar10", tmp_path, batch_size=250)
    model = build(name, 10)
    load_weights(model, SHARED / "weights" / WEIGHTS[name])
    model.eval()
    with torch.no_grad():
        assert sum(int((model(x).argmax(1) == y).sum()) for x, y in data.test) == correct
