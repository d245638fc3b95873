"""Small models that are kept: jpq.save and jpq.load with and without code, torch.export, damaged files."""

import copy
import importlib.util
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_net import Small
from torch import nn

import jpq
from jpq.export import split_into_branches
from jpq.export.origin import note_origin
from jpq.export.program import Program, capture_program, find_operator

X = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) // 2
SLOW = [pytest.param(m, marks=pytest.mark.slow) for m in ("dsp", "dhp", "two-stage")]
METHODS = ("djpq", "upscale", "pdp-2:4", *SLOW)  # channels, selections, masks, kernels, generated weights


class Named(nn.Module):
    """Two inputs by name, a nest of outputs, and a constant that no state dict holds."""

    def __init__(self):
        super().__init__()
        self.image, self.label, self.out = nn.Conv2d(3, 16, 3), nn.Linear(8, 16), nn.Linear(16, 2)
        self.register_buffer("offset", torch.full((16,), 0.5), persistent=False)

    def forward(self, x, condition):
        hidden = self.image(x).mean((2, 3)) * self.label(condition) + self.offset
        return {"scores": self.out(hidden), "rest": [hidden.sum(1), None]}


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.attend, self.out = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, ids):
        x = self.embed(ids)
        return self.out(self.attend(x, x, x, need_weights=False)[0].mean(1))


def finalized(method="djpq", model=None, example=X, bops="6%", **settings):
    torch.manual_seed(0)
    session = jpq.compress(
        (model or Small()).eval(), example, method, bops=bops, steps=1, evidence=[(X, Y)], **settings
    )
    return session.finalize()


@pytest.fixture(scope="module")
def small():
    return finalized()


@pytest.fixture
def folder(small, tmp_path):
    jpq.save(small, tmp_path / "kept")
    return tmp_path / "kept"


def leaves(output):
    return [t for t in torch.utils._pytree.tree_leaves(output) if t is not None]


def same(first, second, *args, **kwargs):
    """Whether two models give the same bits."""
    with torch.no_grad():
        ours, theirs = leaves(first(*args, **kwargs)), leaves(second(*args, **kwargs))
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_saved_model_loads_with_and_without_its_code_to_the_same_bits(method, tmp_path):
    settings = {} if method in ("upscale", "pdp-2:4") else {"output_bits": 8}
    small = finalized(method, **settings)
    jpq.save(small, str(tmp_path / "kept"))
    program, plan = jpq.load(str(tmp_path / "kept"))
    module, same_plan = jpq.load(tmp_path / "kept", model=Small())
    assert isinstance(program, Program)
    assert isinstance(module, Small)
    assert plan == same_plan
    assert plan.method == method
    assert module.state_dict().keys() == small.state_dict().keys() == program.state_dict().keys()
    for x in (X, X[:1], torch.randn(13, 1, 8, 8)):
        assert same(program, small, x)
        assert same(module, small, x)
    module.train()(X).square().sum().backward()  # it can be trained further
    assert float(module.stem.weight.grad.abs().sum()) > 0


def test_saving_leaves_modules_in_their_modes(small, tmp_path):
    small = copy.deepcopy(small).train()
    small.stem.eval()  # as BatchNorm whose statistics are kept, amid fine-tuning
    modes = {name: module.training for name, module in small.named_modules()}
    jpq.save(small, tmp_path / "kept", X)
    assert {name: module.training for name, module in small.named_modules()} == modes


def test_branches_are_saved_as_they_are(tmp_path):
    small = finalized("pdp", structure="kernels", density=0.3)
    layer = small.b
    with torch.no_grad():  # two sets of filters, so that branches pay
        layer.mask.fill_(True)
        layer.mask[: len(layer.mask) // 2, ::2] = False
        layer.weight.mul_(layer.mask)
    branched = split_into_branches(small)
    assert type(branched.b).__name__ == "Branches"
    jpq.save(branched, tmp_path / "kept")
    assert same(jpq.load(tmp_path / "kept")[0], branched, X)
    module, _ = jpq.load(tmp_path / "kept", model=Small())
    assert type(module.b).__name__ == "Branches"
    assert same(module, branched, X)


def test_several_inputs_nests_of_outputs_and_constants(tmp_path):
    example = {"x": torch.rand(4, 3, 8, 8), "condition": torch.rand(4, 8)}
    small = finalized("l0", Named(), example)
    jpq.save(small, tmp_path / "kept")
    assert (tmp_path / "kept" / "program.safetensors").exists()
    program, _ = jpq.load(tmp_path / "kept")
    assert same(program, small, **example)
    x, condition = torch.rand(5, 3, 8, 8), torch.rand(5, 8)
    assert same(program, small, x, condition)
    assert same(program, small, x, condition=condition)
    assert program(x, condition).keys() == {"scores", "rest"}
    assert program(x, condition)["rest"][1] is None
    with pytest.raises(jpq.JpqError, match="takes x, condition"):
        program(x)
    with pytest.raises(jpq.JpqError, match=r"\[batch, 8\].*\[4, 8\]"):
        program(x, condition[:4])


def test_decomposed_attention_is_saved_with_and_without_code(tmp_path):
    ids = torch.randint(0, 20, (4, 6))
    small = finalized("l0", Attentive(), ids, bops="20%")
    jpq.save(small, tmp_path / "kept")
    assert same(jpq.load(tmp_path / "kept")[0], small, ids[:3])
    assert same(jpq.load(tmp_path / "kept", model=Attentive())[0], small, ids[:3])


def test_loaded_models_are_saved_again(folder, small, tmp_path):
    for n, source in enumerate((jpq.load(folder)[0], jpq.load(folder, model=Small())[0], copy.deepcopy(small))):
        jpq.save(source, tmp_path / f"again{n}")
        assert same(jpq.load(tmp_path / f"again{n}")[0], small, X)
        assert same(jpq.load(tmp_path / f"again{n}", model=Small())[0], small, X)


def test_saving_again_leaves_no_graph_of_another_model(folder, small):
    other = finalized("l0")
    jpq.save(other, folder)
    assert same(jpq.load(folder)[0], other, X)
    unknown = copy.deepcopy(small)
    note_origin(unknown, example=X)
    vars(unknown)["jpq_origin"] = type(vars(unknown)["jpq_origin"])(vars(unknown)["jpq_origin"].plan)
    with pytest.warns(UserWarning, match="give jpq.save an example"):
        jpq.save(unknown, folder)
    with pytest.raises(jpq.JpqError, match=r"holds no graph.*model="):
        jpq.load(folder)
    assert same(jpq.load(folder, model=Small())[0], small, X)
    jpq.save(unknown, folder, example=X)
    assert same(jpq.load(folder)[0], small, X[:2])


def test_models_whose_graph_is_random_are_saved_without_it(tmp_path):
    class Noisy(Small):
        def forward(self, x):
            return super().forward(x) + torch.rand(1)

    small = finalized("djpq", Noisy())
    with pytest.warns(UserWarning, match="computes something else"):
        jpq.save(small, tmp_path / "kept")
    assert isinstance(jpq.load(tmp_path / "kept", model=Noisy())[0], Noisy)


def test_what_is_no_small_model_and_folders_of_runs_are_refused(small, tmp_path):
    with pytest.raises(jpq.JpqError, match="has no plan"):
        jpq.save(Small(), tmp_path)
    (tmp_path / "result.json").write_text("{}", encoding="utf-8")
    with pytest.raises(jpq.JpqError, match="holds a run"):
        jpq.save(small, tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(jpq.JpqError, match="Cannot write"):
        jpq.save(small, tmp_path / "file" / "kept")


def test_another_model_is_refused_in_a_sentence(folder):
    class Wider(Small):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 12)

    for other in (nn.Linear(3, 3), Wider()):
        with pytest.raises(jpq.JpqError, match="compressed from"):
            jpq.load(folder, model=other)


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors", "program.json"])
@pytest.mark.parametrize("how", ["gone", "cut", "foreign"])
def test_damaged_folders_are_refused_in_a_sentence(folder, name, how):
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes(content[: len(content) // 2] if how == "cut" else b'{"a": 1}')
    with pytest.raises(jpq.JpqError) as caught:
        jpq.load(folder)
    assert "\n" not in str(caught.value)


def edited(folder, change):
    """The folder, with its program.json changed."""
    path = folder / "program.json"
    tree = json.loads(path.read_text("utf-8"))
    change(tree)
    path.write_text(json.dumps(tree), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "call",
    [
        "aten.from_file.default",
        "aten.save.default",
        "os.system",
        "torch.os.system",
        "operator.__import__",
        "prims.x.y",
        "aten.relu",
    ],
)
def test_graphs_call_nothing_but_plain_operators(folder, call):
    with pytest.raises(ValueError, match="operator"):
        find_operator(call)
    with pytest.raises(jpq.JpqError, match="operator"):
        jpq.load(edited(folder, lambda tree: tree["program"]["steps"][0].update(call=call)))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p["steps"].reverse(),
        lambda p: p["steps"].pop(3),
        lambda p: p["results"].append({"node": "nowhere"}),
        lambda p: p.update(output={"dict": [["a", 7]]}),
        lambda p: p.update(output={"set": [0]}),
        lambda p: p["sources"].append({"node": "n", "tensor": "training.__class__", "kind": "buffer", "shape": []}),
        lambda p: p["leaves"].append({"value": {"exec": "1"}}),
        lambda p: p.update(format=2),
        lambda p: p["steps"][0].update(args=[{"node": ["x"]}]),
    ],
)
def test_damaged_graphs_are_refused_in_a_sentence(folder, change):
    with pytest.raises(jpq.JpqError, match=r"graph"):
        jpq.load(edited(folder, lambda tree: change(tree["program"])))


def test_weights_of_another_model_are_refused(folder):
    state = load_file(folder / "model.safetensors")
    state["head.weight"] = torch.zeros(3, 3)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(jpq.JpqError, match="do not belong together"):
        jpq.load(folder)
    with pytest.raises(jpq.JpqError, match="compressed from"):
        jpq.load(folder, model=Small())


def test_program_refuses_other_sizes_and_types(folder):
    program, _ = jpq.load(folder)
    for x in (torch.rand(2, 1, 9, 9), torch.rand(2, 1, 8), X.double(), [X]):
        with pytest.raises(jpq.JpqError, match=r"\[batch, 1, 8, 8\]"):
            program(x)


def test_program_follows_its_model_to_another_type(small):
    record, tensors = capture_program(small, X)
    program = Program(record, tensors)
    assert same(copy.deepcopy(program), small, X)
    assert {n for n, _ in program.named_parameters()} <= {n for n, _ in small.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_torch_export_follows_small_models(method):
    small = finalized(method, **({} if method in ("upscale", "pdp-2:4") else {"output_bits": 8}))
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(small, (X,), dynamic_shapes=shapes, strict=False)
    assert same(program.module(), small, X[:3])


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="torch.onnx with dynamo needs onnxscript")
@pytest.mark.parametrize("method", ["djpq", pytest.param("upscale", marks=pytest.mark.slow)])
def test_torch_onnx_with_dynamo_follows_small_models(method):
    import onnxruntime

    small = finalized(method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            small, (X,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
        )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: X[:3].numpy()})
    torch.testing.assert_close(torch.from_numpy(output), small(X[:3]).detach(), rtol=1e-4, atol=1e-5)


def test_folder_may_be_moved(folder, small, tmp_path):
    moved = Path(shutil.move(folder, tmp_path / "a name with spaces"))
    assert same(jpq.load(moved)[0], small, X)


class OddNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"3x3": nn.Linear(8, 8), "a/b c": nn.Linear(8, 8), "é": nn.Linear(8, 4)})

    def forward(self, x):
        for part in self.parts.values():
            x = part(torch.relu(x))
        return x


class NamedLikeAProgram(nn.Module):
    def __init__(self):
        super().__init__()
        self.record, self.constants, self.args = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.args(torch.relu(self.constants(torch.relu(self.record(x)))))


class Guarded(nn.Module):
    """Parts in single precision whatever the caller's autocast, and a part without gradients."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            x = torch.relu(self.a(x.float()))
        return self.b(x)


@pytest.mark.parametrize("make", [OddNames, NamedLikeAProgram, Guarded])
def test_odd_names_and_guarded_regions_are_saved_with_their_graph(make, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    small = finalized("uniform", make(), x, bops="20%")
    jpq.save(small, tmp_path / "kept")
    for loaded in (jpq.load(tmp_path / "kept"), jpq.load(tmp_path / "kept", model=make())):
        assert same(loaded[0], small, x)
        assert same(copy.deepcopy(loaded[0]), small, x)


def test_a_region_under_autocast_is_saved_without_its_graph(tmp_path):
    class Narrow(Guarded):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                x = torch.relu(self.a(x))
            return self.b(x.float())

    small = finalized("uniform", Narrow(), torch.randn(4, 8), bops="20%")
    with pytest.warns(UserWarning, match="The graph was not stored"):
        jpq.save(small, tmp_path / "kept")
