"""Models and examples that cannot be read: one sentence that names the layer, line or input, and the way out."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from commands import refused
from torch import Tensor, nn
from zoo import IMAGE, TOKENS, ZOO, Head, Plain, Residual, conv

import jpq
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace
from jpq.types import JpqError

Step = Callable[[nn.Module, Tensor], Tensor]


class Inner(nn.Module):
    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


class Nested(nn.Module):
    """Some user's code in the middle of a net."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.stem, self.block = conv(3, 8), nn.Sequential(nn.ReLU(), Inner(step))
        self.b, self.head = conv(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.block(self.stem(x))))


@torch.library.custom_op("jpqtest::shapeless", mutates_args=())
def shapeless(x: Tensor) -> Tensor:
    return x * 2


def branch(self: nn.Module, x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x
    return -x


def loop(self: nn.Module, x: Tensor) -> Tensor:
    while x.norm() > 1:
        x = x / 2
    return x


def value(self: nn.Module, x: Tensor) -> Tensor:
    return x * float(x.max())


def numpy(self: nn.Module, x: Tensor) -> Tensor:
    return x * torch.from_numpy(x.detach().numpy())


def unknown_shape(self: nn.Module, x: Tensor) -> Tensor:
    return shapeless(x)


@pytest.mark.parametrize(
    ("step", "line", "way_out"),
    [
        (branch, "if x.sum() > 0:", "torch.where"),
        (loop, "while x.norm() > 1:", "torch.where"),
        (value, "return x * float(x.max())", "torch.where"),
        (numpy, "return x * torch.from_numpy", "tensor operations"),
        (unknown_shape, "return shapeless(x)", "torch.library.register_fake"),
    ],
)
def test_code_that_cannot_be_exported(step: Step, line: str, way_out: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(JpqError) as caught:
        trace(Nested(step), IMAGE)
    said = str(caught.value)
    lines = enumerate(Path(__file__).read_text().splitlines(), 1)
    number = next(i for i, text in lines if text.strip().startswith(line))
    assert f"{Path(__file__).name}:{number}, `{line}" in said
    assert "(in submodule 'block.1', Inner)" in said
    assert way_out in said
    assert "\n" not in said
    assert capfd.readouterr() == ("", ""), "torch.export prints the graph, which nobody asked for"


def item(self: nn.Module, x: Tensor) -> Tensor:
    return x * x.mean((0, 2, 3))[0].item()


def counter(self: Any, x: Tensor) -> Tensor:
    self.count = getattr(self, "count", 0) + 1
    return x


def keeper(self: Any, x: Tensor) -> Tensor:
    self.last = x
    self.seen = [*getattr(self, "seen", []), x]
    return x


def appender(self: Any, x: Tensor) -> Tensor:
    self.step.__dict__.setdefault("all", []).append(x.shape)
    return x


def in_place(self: nn.Module, x: Tensor) -> Tensor:
    return x.mul_(2).add_(1)


def masked_select(self: nn.Module, x: Tensor) -> Tensor:
    return x + x[x > 0].sum()


@pytest.mark.parametrize(
    ("step", "free"),
    [
        (item, {"b.0": 6}),
        (masked_select, {"b.0": 6}),
        (counter, {"stem.0": 8, "b.0": 6}),
        (keeper, {"stem.0": 8, "b.0": 6}),
        (appender, {"stem.0": 8, "b.0": 6}),
        (in_place, {"stem.0": 8, "b.0": 6}),
    ],
)
def test_code_that_can(step: Step, free: dict[str, int]) -> None:
    model = Nested(step)
    before = {k: set(vars(m)) for k, m in model.named_modules()}
    network = trace(model, IMAGE)
    assert {s.name: s.n for s in channels(network)} == free
    assert "code has fixed sizes" not in " ".join(network.frozen.values())
    assert {k: set(vars(m)) for k, m in model.named_modules()} == before, "trace must leave no tensors behind"


def test_a_model_that_writes_into_its_input() -> None:
    class Writes(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return super().forward(x)

    for example in (IMAGE.clone(), IMAGE.double()):
        before = example.clone()
        network = trace(Writes().to(example.dtype), example)
        assert torch.equal(example, before)
        assert [s.n for s in channels(network)] == [8, 5]


def test_a_list_that_the_model_fills() -> None:
    model = Nested(lambda self, x: self.log.append(x) or x)  # type: ignore[operator, union-attr]
    model.block[1].log = []  # type: ignore[union-attr]
    trace(model, IMAGE)
    assert model.block[1].log == []  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "example", "says"),
    [
        ("residual", IMAGE[:, :1], r"layer 'stem\.0' \(Conv2d\) expects 3 channels, got 1 \(shape .*, the input 'x'\)"),
        ("residual", IMAGE[0, 0], r"layer 'stem\.0' \(Conv2d\) expects 4 dims .* got 2"),
        ("residual", IMAGE.double(), r"layer 'stem\.0' \(Conv2d\) expects torch\.float32, got torch\.float64"),
        ("residual", IMAGE.to("meta"), "expects a tensor on cpu, got one on meta"),
        ("flat", IMAGE[:, :, 1:], r"layer '2' \(Linear\) expects 96 features, got 72 \(shape \[2, 72\]\)"),
        ("two_inputs", (IMAGE, IMAGE, TOKENS[:, 0, :5]), r"x \[2, 3.*'b\.0' .* expects 2 channels, got 3 .* input 'y'"),
        ("two_inputs", (IMAGE, IMAGE[:, :2]), r"missing a required argument: 'z'. Its forward takes \(x, y, z\)"),
        ("two_inputs", (IMAGE, IMAGE[:, :2], TOKENS), r"does not run on the example \(x .*, z \[2, 5, 6\]\)"),
        ("keywords", {"image": IMAGE, "scal": torch.ones(1)}, "missing a required argument: 'scale'. .*image, scale"),
        ("tokens", torch.tensor([[0.5]]), r"\(Embedding\) expects integer indices, got torch\.float32"),
    ],
)
def test_an_example_of_the_wrong_shape(name: str, example: Any, says: str) -> None:
    with pytest.raises(JpqError, match=says) as caught:
        trace(ZOO[name][0](), example)
    assert "\n" not in str(caught.value)


def test_a_calibration_batch_that_does_not_fit() -> None:
    with pytest.raises(JpqError, match=r"'table' \(Embedding\) expects indices from 0 to 6, got 0 to 99"):
        jpq.compress(ZOO["tokens"][0](), torch.tensor([[0, 99]]), bops="50%")


def test_a_model_that_cannot_be_copied() -> None:
    model = Residual()
    model.lock = threading.Lock()
    for read in (trace, jpq.decompose):
        with pytest.raises(JpqError, match=r"Residual cannot be copied.*lock"):
            read(model, IMAGE)


def test_the_model_is_as_it_was_after_an_error() -> None:
    model = Residual().train()
    with pytest.raises(JpqError):
        trace(model, IMAGE[:, :1])
    assert all(m.training for m in model.modules())


def on_two_devices() -> nn.Module:
    model = Residual()
    model.b.to("meta")
    return model


def part_of(change: Callable[[nn.Module], Any]) -> nn.Module:
    model = Residual()
    model.a = change(model.a)
    return model


def prepared_for_qat() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig()  # type: ignore[assignment]
    return torch.ao.quantization.prepare_qat(model)


def named_with_a_dot() -> nn.Module:
    model = Residual()
    setattr(model.a, "1.5", nn.Conv2d(8, 8, 1))
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "function": (lambda: torch.relu, "takes a torch.nn.Module; this is a builtin_function"),
    "exported program": (lambda: torch.export.export(Plain().eval(), (IMAGE,)), "this is a ExportedProgram"),
    "exported module": (lambda: torch.export.export(Plain().eval(), (IMAGE,)).module(), "has no evaluation mode"),
    "scripted": (lambda: torch.jit.script(Plain()), "The model .* is scripted.* give the Python module"),
    "jit trace": (lambda: torch.jit.trace(Plain(), IMAGE), "The model .* is scripted"),
    "scripted part": (lambda: part_of(torch.jit.script), r"Submodule 'a' \(RecursiveScriptModule\) is scripted"),
    "compiled part": (lambda: part_of(torch.compile), "'a' .* is wrapped inside .* compress the model first"),
    "parallel part": (lambda: part_of(nn.DataParallel), r"Submodule 'a' \(DataParallel\) is wrapped inside"),
    "brevitas": (lambda: nn.Sequential(conv(3, 4), qnn.QuantConv2d(4, 4, 1)), "'1' .QuantConv2d. is quantized"),
    "dynamic": (
        lambda: torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}),
        r"'0' \(Linear\) is quantized already: give the model in floating point",
    ),
    "qat": (prepared_for_qat, "is quantized already"),
    "meta": (lambda: Residual().to("meta"), "lies on the meta device and holds no numbers"),
    "two devices": (on_two_devices, "cpu .'stem.0.weight'. and meta .'b.0.weight'.. Move it to one"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), "'0.weight' has no shape yet .* Run the model once"),
    "a name with a dot": (named_with_a_dot, "A part of 'a' is named '1.5': .* Name it '1_5', in the weights file too"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused(name: str) -> None:
    make, says = REFUSED[name]
    with pytest.raises(JpqError, match=says) as caught:
        trace(make(), IMAGE)
    assert "\n" not in str(caught.value)
    if name != "lazy":  # compress runs the model on the example, which gives it its shapes
        with pytest.raises(JpqError, match=says) as again:
            jpq.compress(make(), IMAGE, bops="50%", steps=1)
        assert "\n" not in str(again.value)


class Remembers(nn.Module):
    """Keeps what it computed: in an attribute, a list, a dict that a hook fills, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), nn.Conv2d(8, 4, 1)
        self.last: Any = None
        self.seen: list[Any] = []
        self.features: dict[str, Any] = {}
        self.register_buffer("average", torch.zeros(8))
        self.b.register_forward_pre_hook(lambda _, args: self.features.update(into={"b": (args[0],)}))

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.a(x)
        self.seen.append(self.last)
        self.average = self.average * 0.9 + self.last.mean((0, 2, 3)) * 0.1
        return self.b(self.last)


def test_models_that_keep_what_they_computed_are_read_and_compressed() -> None:
    model = Remembers()
    model(IMAGE).sum().backward()
    kept = model.last
    assert [layer.name for layer in trace(model, IMAGE).layers] == ["a.0", "b"]
    assert model.last is kept
    assert len(model.seen) == 1
    assert len(jpq.compress(model, IMAGE, bops="50%", steps=1).finalize()(IMAGE)) == len(IMAGE)


def test_a_model_built_in_inference_mode_is_read() -> None:
    with torch.inference_mode():
        model = Residual()
    assert [layer.name for layer in trace(model, IMAGE).layers] == ["stem.0", "a.0", "b.0", "head.2"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))])
def test_wrappers_come_off(wrap: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    wrapped = wrap(model)
    network = trace(wrapped, IMAGE)
    assert [layer.name for layer in network.layers] == ["stem.0", "a.0", "b.0", "head.2"]
    net = jpq.compress(wrapped, IMAGE, bops="10%", steps=2)
    small = net.finalize()
    assert isinstance(small, Residual)
    assert torch.allclose(net.eval()(IMAGE), small(IMAGE), atol=1e-5)


def test_distributed_comes_off(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = trace(nn.parallel.DistributedDataParallel(Residual()), IMAGE)
    finally:
        torch.distributed.destroy_process_group()
    assert [s.name for s in channels(network)] == ["stem.0", "a.0"]


def test_compiled_in_place() -> None:
    model = Residual()
    model.compile()
    assert [s.name for s in channels(trace(model, IMAGE))] == ["stem.0", "a.0"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["residual", "split", "shuffle"])
def test_half_precision_is_read_and_not_trained(name: str, dtype: torch.dtype) -> None:
    model = ZOO[name][0]().to(dtype)
    found = {s.name: s.n for s in channels(trace(model, IMAGE.to(dtype)))}
    assert found == {s.name: s.n for s in channels(trace(ZOO[name][0](), IMAGE))}
    with pytest.raises(JpqError, match=rf"'[\w.]+' is in {dtype}.*float32"):
        jpq.compress(model, IMAGE.to(dtype), bops="10%")
    with pytest.raises(JpqError, match=f"expects {dtype}, got torch.float32"):
        trace(model, IMAGE)


USERS = """
import torch
from commands import refused
from torch import nn
class Net(nn.Sequential):
    def __init__(self, last=10):
        super().__init__(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, last))
class Steered(Net):
    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else super().forward(-x)
class Two(Net):
    def forward(self, image, mask):
        return super().forward(image * mask)
class Pair(Net):
    def forward(self, x):
        y = super().forward(x)
        return y, y
class Aux(Net):
    def forward(self, x):
        y = super().forward(x)
        return {"out": y, "aux": y} if self.training else y
class Wide(Net):
    def __init__(self): super().__init__(); self[0] = nn.Conv2d(3, 4, 3)
def net(): return Net()
def steered(): return Steered()
def two(): return Two()
def pair(): return Pair()
def aux(): return Aux()
def wide(): return Wide()
def half(): return Net().half()
def script(): return torch.jit.script(Net())
def parallel(): return nn.DataParallel(Net())
def compiled(): return torch.compile(Net())
def meta(): return Net().to("meta")
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the current folder."""
    name = f"users_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return name


ALIKE = {
    "steered": r"torch.export cannot read Steered at .*:\d+, `return .*torch.where",
    "two": r"does not take one image tensor \(missing a required argument: 'mask'\).* jpq.trace and jpq.compress",
    "wide": r"layer '0' \(Conv2d\) expects 3 channels, got 1 .*the input 'image'",
    "half": r"layer '0' \(Conv2d\) expects torch.float16, got torch.float32",
    "script": "is scripted.* give the Python module",
    "meta": "expects a tensor on meta, got one on cpu|meta device",
}


@pytest.mark.parametrize("command", ["inspect", "optimize"])
@pytest.mark.parametrize("name", ALIKE)
def test_the_command_line_says_the_same(
    command: str, name: str, users: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = ["--target-bops", "5%"] if command == "optimize" else []
    assert re.search(ALIKE[name], refused([command, "--model", f"{users}:{name}", "--data", "digits", *target], capsys))


def test_inspect_needs_no_class_scores(users: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("pair", "parallel", "compiled", "aux"):
        assert jpq_main(["inspect", "--model", f"{users}:{name}", "--data", "digits"]) == 0
        assert "2 layers" in capsys.readouterr().out


def test_optimize_is_for_one_image_and_one_label(users: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["optimize", "--model", f"{users}:pair", "--data", "digits", "--target-bops", "20%", "--epochs", "2"]
    says = r"gives tuple .* must give \[2, 10\]: jpq optimize trains on class scores.*jpq.compress"
    assert main_error(args, capsys, says)


def test_optimize_trains_on_the_main_output_of_a_model_that_gives_a_dict_in_training(
    users: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["optimize", "--model", f"{users}:aux", "--data", "digits", "--target-bops", "20%", "--epochs", "2"]
    assert jpq_main([*args, "--float-epochs", "1", "--limit", "200"]) == 0
    assert "BOPs 20%" in capsys.readouterr().out


def jpq_main(args: list[str]) -> int:
    from jpq.cli.main import main

    return main(args)


def main_error(args: list[str], capsys: pytest.CaptureFixture[str], says: str) -> bool:
    assert jpq_main(args) == 2
    return re.search(says, capsys.readouterr().err) is not None
