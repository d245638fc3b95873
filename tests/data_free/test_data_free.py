"""Pruning without data: no loader is touched, layers come near the structure, and the client's half holds the mask."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from commands import refused
from runs import QUICK, Stop
from safetensors.torch import load_file, save_file
from thinned import thinned
from torch import nn

import jpq
from jpq import plan
from jpq.cli.main import main
from jpq.compression import external_mask
from jpq.config import Budget, Config, Decide, Run, Task
from jpq.data_free import prune
from jpq.data_free.layerwise_admm import AdmmSettings, following_layers, layer_input
from jpq.data_free.settings import DataFreeSettings
from jpq.files.tensors import save_tensors
from jpq.methods.gates import Admm
from jpq.methods.gates.fixed_count import strongest_rows
from jpq.methods.structures import KernelPattern, parse_structure
from jpq.plan import MaskPlan, Plan
from jpq.tasks import models
from jpq.tasks.data import load
from jpq.tracing.trace import trace
from jpq.training.epochs import Phase
from jpq.training.loop import Objective, Recorder, build_optimizer, fit
from jpq.types import JpqError

SHORT = ("--steps", "60", "--images", "32", "--batch-size", "16")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights of a convnet that has seen the digits for a few epochs."""
    torch.manual_seed(0)
    model = models.build("convnet", 10, 1)
    fit(
        model,
        load("digits", limit=600),
        Phase("float", 3),
        Objective(),
        build_optimizer(model, 3e-3, 0.0),
        Recorder(lambda: 0.0),
    )
    path = tmp_path_factory.mktemp("float") / "w.safetensors"
    save_tensors(model, path)
    return path


@pytest.fixture(scope="module")
def handed(trained, tmp_path_factory):
    """A folder that the designer hands back, and what she knows of it."""
    out = tmp_path_factory.mktemp("handed") / "private"
    return out, prune.prune_private(DataFreeSettings(weights=trained, steps=200, images=64, batch_size=32, out=out))


def client(trained, out, mask, **run):
    return Config(
        Task(limit=300, weights=trained),
        Budget(target_bops="0.8%"),
        Decide(mask=mask),
        QUICK,
        Run(out=out, device="cpu", **run),
    )


# --- projections


def best_pattern(kernel, library):
    """The nearest kernel with the support of one pattern, by trying all."""
    cut = [torch.where(torch.tensor([i in p for i in range(9)]).view(3, 3), kernel, 0.0) for p in library]
    return min(cut, key=lambda k: float((kernel - k).square().sum()))


@pytest.mark.parametrize(("density", "kept"), [(1.0, 4), (0.75, 3), (0.5, 2), (0.01, 1)])
def test_patterns_with_connectivity_are_the_nearest_point(density, kept):
    torch.manual_seed(0)
    weight, structure = torch.randn(2, 2, 3, 3), KernelPattern()
    gate = Admm(4, 4, connected=density)
    gate.set_site(structure.sizes(weight.shape), structure.quota())
    gate.observe_weights([(weight, structure)])
    ours = gate.near(0)
    kernels = weight.reshape(4, 3, 3)
    cut = torch.stack([best_pattern(k, structure.patterns) for k in kernels])
    masks = [m for m in itertools.product([0.0, 1.0], repeat=4) if sum(m) == kept]
    points = [cut * torch.tensor(m).view(4, 1, 1) for m in masks]
    nearest = min(points, key=lambda p: float((kernels - p).square().sum()))
    assert torch.equal(ours.reshape(4, 3, 3), nearest)
    assert sorted((ours.reshape(4, 9) != 0).sum(1).tolist()) == [0] * (4 - kept) + [4] * kept
    gate.observe_weights([(ours.clone(), structure)])
    gate.project()
    assert torch.equal(gate.near(0), ours)


def test_the_worked_example_of_the_sheet():
    kernel = torch.tensor([[0.1, 0.9, 0.2], [0.3, 1.0, 0.8], [0.2, 0.4, 0.1]]).view(1, 1, 3, 3)
    gate = Admm(1, 4)
    gate.set_site(torch.full((1, 4), 4.0), 1)
    gate.observe_weights([(kernel, KernelPattern())])
    assert torch.equal(gate.near(0).view(3, 3), torch.tensor([[0, 0.9, 0], [0, 1.0, 0.8], [0, 0.4, 0]]))
    assert float((kernel - gate.near(0)).square().sum()) == pytest.approx(0.19)


def test_strongest_rows_weigh_what_they_keep():
    kept = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    weights = torch.tensor([[1.0, 9.0], [9.0, 2.0], [2.0, 0.0]])
    assert strongest_rows(kept, weights, 1).tolist() == [[0, 0], [0, 1], [0, 0]]
    assert torch.equal(strongest_rows(kept, weights, 3), kept)


# --- layer by layer


class Branchy(nn.Module):
    """A norm in place and a layer whose output two modules read."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.relu = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.split, self.left, self.right = nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Sigmoid()
        self.plain = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        y = self.split(self.relu(self.norm(self.first(x))))
        return self.plain(self.left(y) + self.right(y))


def test_what_follows_a_layer():
    torch.manual_seed(0)
    model, x = Branchy().eval(), torch.randn(2, 2, 8, 8)
    follows = following_layers(model, x)
    assert {n: [type(p) for p in follows[n].parts] for n in ("first", "split", "plain")} == {
        "first": [nn.BatchNorm2d, nn.ReLU],
        "split": [],
        "plain": [],
    }
    out = model.first(x)
    before = out.clone()
    assert torch.equal(follows["first"](out), torch.relu(model.norm(out)))
    assert torch.equal(out, before)
    assert torch.equal(layer_input(model, "split", x), torch.relu(model.norm(model.first(x))))
    assert layer_input(model, "right", x).shape == (2, 4, 4, 4)


class Unused(nn.Module):
    """A layer whose weight is handed to a function: its module is never called."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        return self.two(torch.nn.functional.conv2d(x, self.one.weight))


def test_a_layer_that_is_never_called_is_projected():
    torch.manual_seed(0)
    model = Unused().eval()
    assert layer_input(model, "one", torch.randn(2, 1, 8, 8)) is None
    settings = AdmmSettings(steps=20, images=4, batch_size=2, matched=False)
    done = prune.prune_model(model, lambda n: torch.rand(n, 1, 8, 8), "pattern", 1.0, settings=settings)
    row = next(r for r in done.layers if r.name == "one")
    assert (row.error, row.error_one_shot) == (0.0, 0.0)
    assert int((done.model.one.weight != 0).sum()) == 4 * 4


def correlated(count, generator):
    """Images like those behind a ReLU: not negative, their channels alike."""
    base = torch.randn(count, 1, 6, 6, generator=generator)
    return (base + 0.7 * torch.randn(count, 8, 6, 6, generator=generator)).relu()


def one_layer(lr=0.2, **fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)).eval()
    g = torch.Generator().manual_seed(1)
    settings = AdmmSettings(steps=400, images=64, batch_size=32, lr=lr, matched=False, **fields)
    return prune.prune_model(model, lambda n: correlated(n, g), "pattern", 1.0, skip=(), settings=settings)


def test_admm_comes_to_the_structure_and_beats_one_projection():
    done = one_layer()
    row = done.layers[0]
    assert row.residual < 0.1
    assert row.residual < 0.5 * row.residual_first
    assert row.error < 0.93 * row.error_one_shot
    assert done.error < done.error_one_shot


def test_steps_that_never_move_leave_the_projection():
    row = one_layer(lr=1e-12).layers[0]
    assert row.error == pytest.approx(row.error_one_shot, rel=1e-4)


def test_the_model_is_left_alone_and_only_masked_weights_differ():
    torch.manual_seed(0)
    model = models.build("resnet8", 10, 3).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    draw = prune.random_images((3, 16, 16), prune.input_moments("", (3, 16, 16)), 0, torch.device("cpu"))
    done = prune.prune_model(model, draw, "pattern", 0.5, ["layer1.0.conv2"], AdmmSettings(20, images=4, batch_size=2))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    names = [site.taps[0].layer for site in done.sites]
    assert "layer1.0.conv2" not in names
    assert "linear" not in names
    changed = {k for k, v in done.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{name}.weight" for name in names}
    for site, keep in zip(done.sites, done.kept, strict=True):
        weight = done.model.get_submodule(site.taps[0].layer).weight
        kernels = weight.shape[0] * weight.shape[1]
        share = 1.0 if site.taps[0].layer == "conv1" else 0.5  # the layer that reads the image keeps its kernels
        assert int(keep.sum()) == kernels - round((1 - share) * kernels)
        mask = site.taps[0].structure.expand(keep, weight.shape)
        assert torch.equal(weight * mask, weight)


@pytest.mark.parametrize(("matched", "dead"), [(False, 1.0), (True, 0.0)])
def test_matched_inputs_wake_what_noise_leaves_dead(matched, dead):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    model[1].running_mean.fill_(30.0)  # as if the client's images were far brighter
    draw = prune.random_images((1, 12, 12), ((0.0,), (1.0,)), 0, torch.device("cpu"))
    settings = AdmmSettings(20, images=64, batch_size=32, matched=matched)
    done = prune.prune_model(model, draw, "pattern", 1.0, settings=settings)
    assert done.layers[0].dead == dead
    assert torch.equal(done.model[1].running_mean, torch.full((6,), 30.0))


def test_noise_is_uniform_pixels_normalised():
    draw = prune.random_images((3, 8, 8), prune.input_moments("cifar10", (3, 8, 8)), 0, torch.device("cpu"))
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in prune.input_moments("imagenet", (3, 8, 8)))
    pixels = (draw(64) * std + mean) * 255
    assert torch.allclose(pixels, pixels.round(), atol=1e-3)
    assert float(pixels.min()) >= -1e-3
    assert float(pixels.max()) <= 255.001
    assert float(pixels.mean()) == pytest.approx(127.5, abs=2)


# --- the designer's half


def test_no_loader_is_touched(trained, tmp_path, monkeypatch, capsys):
    def touched(*_, **__):
        raise AssertionError("data were asked for")

    import sklearn.datasets
    import torchvision.datasets

    from jpq import recipe
    from jpq.tasks import data, datasets
    from jpq.tasks.readers import class_folders

    for module, names in (
        (data, ("load", "Batches", "_read_source", "_split_source")),
        (datasets, ("digits", "torchvision", "convert_user_data", "_open_torchvision")),
        (class_folders, ("read",)),
        (recipe, ("load_task", "read_data")),
        (sklearn.datasets, ("load_digits",)),
        (torchvision.datasets, ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "ImageFolder", "DatasetFolder")),
        (torch.utils.data, ("DataLoader",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, touched)
    monkeypatch.setattr(datasets, "TORCHVISION", dict.fromkeys(datasets.TORCHVISION, touched))
    with pytest.raises(AssertionError, match="data were asked for"):
        data.load("digits")
    monkeypatch.chdir(tmp_path)
    assert main(["prune-private", "--weights", str(trained), "--synthetic", *SHORT]) == 0
    shown = capsys.readouterr().out
    assert "jpq optimize --mask private" in shown
    assert {p.name for p in Path("private").iterdir()} == {
        "mask.json",
        "weights.safetensors",
        "layers.csv",
        "report.json",
    }


def test_what_is_handed_back(handed):
    out, done = handed
    given = external_mask.read(out)
    table = pd.read_csv(out / "layers.csv", dtype={"name": str})
    assert list(table.name) == list(given.plan.masks) == ["0", "3", "6"]
    assert (set(given.plan.structures.values()), given.plan.model) == (
        {"pattern"},
        {"name": "convnet", "classes": 10, "channels": 1},
    )
    tensors = load_file(out / "weights.safetensors")
    for row in table.itertuples():
        weight, keep = tensors[f"{row.name}.weight"], given.plan.masks[row.name].units()
        mask = KernelPattern().expand(keep.float(), weight.shape)
        assert torch.equal(weight * mask, weight)
        assert float(mask.mean()) == pytest.approx(row.density)
        assert int(keep.any(1).sum()) == (32 if row.name == "0" else round(0.75 * len(keep)))
    assert (table.residual < table.residual_first).all()
    assert table.error.mean() < table.error_one_shot.mean()
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["structure"] == "pattern"
    assert report["error"] == done.error


def test_the_same_seed_gives_the_same_mask(trained, tmp_path):
    def mask(seed, name):
        settings = DataFreeSettings(weights=trained, steps=20, images=8, batch_size=4, seed=seed, out=tmp_path / name)
        prune.prune_private(settings)
        return (tmp_path / name / "mask.json").read_text(), load_file(tmp_path / name / "weights.safetensors")

    (one, ours), (same, again), (_, others) = mask(0, "a"), mask(0, "b"), mask(1, "c")
    assert one == same
    assert all(torch.equal(ours[k], again[k]) for k in ours)
    assert not all(torch.equal(ours[k], others[k]) for k in ours)


STRUCTURES = ["2:4", "elementwise", "kernels", "block:4x4", "pattern:4"]


@pytest.mark.parametrize("structure", thinned(STRUCTURES, lambda _, s: s in ("2:4", "block:4x4")))
def test_other_structures(structure, trained, tmp_path):
    settings = DataFreeSettings(
        weights=trained, structure=structure, steps=20, images=8, batch_size=4, out=tmp_path, inputs="noise"
    )
    done = prune.prune_private(settings)
    given = external_mask.read(tmp_path)
    assert {parse_structure(text) for text in given.plan.structures.values()} == {parse_structure(structure)}
    expected = {"2:4": 0.5, "pattern:4": 0.75 * 4 / 9}.get(structure, 0.5)
    assert done.layers[1].density == pytest.approx(expected, abs=0.02)
    x = torch.randn(4, 1, 8, 8)
    dense = models.build("convnet", 10, 1).eval()
    models.load_weights(dense, trained)
    network = trace(dense, x)
    start = given.start(dense, given.sites(network))
    assert torch.equal(start(x), done.model.eval()(x))
    assert not given.is_held_by(dense, given.sites(network))
    assert given.is_held_by(start, given.sites(network))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--weights FILE"),
        (["--no-synthetic"], "never sees data"),
        (["--model", "convnett", "--weights", "W"], "Did you mean convnet"),
        (["--model", "lenet5", "--weights", "W"], "do not fit the model"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--weights", "W", "--structure", "patern"], "Did you mean pattern"),
        (["--weights", "W", "--structure", "pattern:5x5:1.2"], "fits no layer"),
        (
            ["--weights", "W", "--structure", "pattern:5:1.2"],
            "fits no layer of this model. Layer 0: These patterns are for kernels of 5, and those of a weight "
            "(32, 1, 3, 3) are of 3 x 3. Leave this layer dense, or use punched:AxB or block:AxB. Layer 11: "
            "Kernel patterns need a convolution's kernels, and a linear weight (10, 64) has none",
        ),
        (["--weights", "W", "--density", "0"], "--density 0.0"),
        (["--weights", "W", "--rho", "0.1", "-1"], "--rho 0.1 -1.0"),
        (["--weights", "W", "--steps", "19"], "--steps 19"),
        (["--weights", "W", "--images", "8"], "--images 8"),
        (["--weights", "W", "--lr", "0"], "--lr 0"),
        (["--weights", "W", "--inputs", "nois"], "Did you mean noise"),
        (["--weights", "W", "--like", "cifar"], "Did you mean cifar"),
        (["--weights", "W", "--like", "cifar10"], "has 3 channels"),
        (["--weights", "W", "--input-shape", "1", "0", "8"], "--input-shape 1 0 8"),
        (["--weights", "W", "--input-shape", "1", "8"], "cannot take a batch"),
        (["--weights", "W", "--skip", "nothing"], "Unknown layer 'nothing'"),
        (["--weights", "W", "--device", "abacus"], "--device abacus"),
    ],
)
def test_prune_private_refuses(args, words, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = refused(["prune-private", *(str(trained) if a == "W" else a for a in args)], capsys)
    assert words in line
    assert not (tmp_path / "private" / "mask.json").exists()


# --- the client's half


@pytest.fixture(scope="module")
def retrained(trained, handed, tmp_path_factory):
    asked = client(trained, tmp_path_factory.mktemp("client"), handed[0])
    return asked, jpq.optimize(asked)


def masked_weights(folder, given):
    """(layer, weight of the small model that a run saved, mask)."""
    small, decided = jpq.load(folder)
    for name, mask in given.plan.masks.items():
        weight = small.get_submodule(name).weight.detach()
        yield (
            name,
            weight,
            parse_structure(given.plan.structures[name]).expand(mask.units().float(), weight.shape),
            decided,
        )


def test_the_mask_is_held_and_the_budget_met(retrained, handed):
    _, result = retrained
    given = external_mask.read(handed[0])
    limit = result.targets["bops"]["limit"]
    small, decided = jpq.load(result.folder)
    assert 0.97 * limit <= jpq.measure(small, torch.rand(1, 1, 8, 8))["bops"] <= limit
    assert decided.masks == given.plan.masks
    assert (decided.method, set(decided.structures.values())) == ("masked", {"pattern"})
    assert decided.layers["3"].w_bits < 8  # bits were decided as well
    start = load_file(handed[0] / "weights.safetensors")
    for name, weight, mask, _ in masked_weights(result.folder, given):
        assert torch.equal(weight * mask, weight)
        assert not torch.equal(weight, start[f"{name}.weight"])
    assert result.notes == ()


def test_masked_is_rebuilt_is_exported(retrained):
    _, result = retrained
    assert result.verified["masked_vs_rebuilt_float64"] <= 1e-10
    outside = result.verified["rebuilt_vs_onnxruntime"]
    assert outside["argmax_differs"] <= outside["at_a_rounding_boundary"]
    assert result.packed["layers"] <= result.compressed.size_bytes + 8 * len(result.layers)


@pytest.mark.parametrize("phase", ["search", pytest.param("fine-tune", marks=pytest.mark.slow)])
def test_resuming_holds_the_mask_and_gives_the_same_bits(phase, retrained, tmp_path):
    asked, whole = retrained
    again = replace(asked, run=replace(asked.run, out=tmp_path))
    with pytest.raises(KeyboardInterrupt):
        jpq.optimize(again, Stop(phase, 2), final=False)
    result = jpq.optimize(replace(again, run=replace(again.run, resume=True)), final=False)
    assert replace(result.compressed, accuracy=0.0) == replace(whole.compressed, accuracy=0.0)
    ours, theirs = (jpq.load(r.folder)[0].state_dict() for r in (result, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_mask_that_changed_since_the_run_began_is_refused(trained, handed, tmp_path):
    folder = tmp_path / "private"
    folder.mkdir()
    for path in handed[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    asked = client(trained, tmp_path, folder)
    with pytest.raises(KeyboardInterrupt):
        jpq.optimize(asked, Stop("search", 2))
    given = external_mask.read(folder)
    other = MaskPlan.of(given.plan.masks["3"].units().flip(0).float())
    (folder / "mask.json").write_text(altered(given, **{"3": other}).to_json())
    with pytest.raises(JpqError, match=r"layer 3 keeps other units\. Run without resume"):
        jpq.optimize(replace(asked, run=replace(asked.run, resume=True)))


@pytest.mark.slow
@pytest.mark.parametrize("width", ["power-of-two", "gated", "squashed"])
def test_any_width_that_learns(width, trained, handed, tmp_path):
    asked = client(trained, tmp_path, handed[0] / "mask.json")
    result = jpq.optimize(replace(asked, decide=replace(asked.decide, width=width)))
    assert all(t["reached"] <= t["limit"] for t in result.targets.values())
    assert jpq.load(result.folder)[1].masks == external_mask.read(handed[0]).plan.masks
    if width != "squashed":
        assert {x.w_bits for x in result.layers} | {x.a_bits for x in result.layers} <= {2, 4, 8}


def test_inside_a_loop_of_ones_own(trained, handed):
    model = models.build("convnet", 10, 1)
    models.load_weights(model, trained)
    x = torch.rand(8, 1, 8, 8)
    net = jpq.compress(model.eval(), x, mask=handed[0], bops="0.8%", steps=4)
    optim = torch.optim.Adam(net.groups())
    for _ in range(4):
        optim.zero_grad()
        (net(x).square().mean() + net.pressure()).backward()
        optim.step()
        net.step()
    assert net.discretize().masks == external_mask.read(handed[0]).plan.masks
    net.eval()
    small = net.finalize()
    assert torch.allclose(small(x), net(x), atol=1e-5)
    with pytest.raises(JpqError, match="Leave structure out"):
        jpq.compress(model, x, mask=handed[0], bops="1%", structure="2:4")
    with pytest.raises(JpqError, match="no mask to hold"):
        jpq.compress(model, x, method="masked", bops="1%")


def test_weights_that_are_pruned_already_are_noted(handed, tmp_path):
    asked = client(handed[0] / "weights.safetensors", tmp_path, handed[0] / "mask.json")
    result = jpq.optimize(replace(asked, train=replace(QUICK, epochs=2)), final=False)
    assert [note for note in result.notes if note.startswith("--weights are pruned already")]


# --- masks that do not fit


def altered(given, **masks):
    """The plan with other masks: of a layer, or None for that layer left out."""
    kept = {name: mask for name, mask in {**given.plan.masks, **masks}.items() if mask is not None}
    return replace(given.plan, masks=kept, structures=dict.fromkeys(kept, "pattern"))


def of(*shape, value=1.0):
    return MaskPlan.of(torch.full(shape, value))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: altered(g, ghost=of(1, 4)), "layer ghost, which this model does not have. It was made for convnet"),
        (
            lambda g: altered(g, **{"3": of(5, 4)}),
            "another shape than layer 3 (it has 5 x 4 units, the layer 2048 x 4)",
        ),
        (lambda g: altered(g, **{"6": of(4096, 4, value=0.0)}), "keeps nothing in layer 6"),
        (lambda g: altered(g, **{"0": of(32, 4)}), "keeps more than the 1 of each row that pattern allows in layer 0"),
        (lambda g: altered(g, **{"11": of(640, 4)}), "is of a structure that does not fit layer 11 (pattern)"),
        (lambda g: replace(g.plan, structures=dict.fromkeys(g.plan.masks, "patern")), "Did you mean pattern"),
        (lambda g: replace(g.plan, masks={}, structures={}), "holds no mask"),
        (lambda g: replace(g.plan, kept={"0": (True, False)}), "drops whole channels"),
    ],
)
def test_masks_that_do_not_fit_are_refused(change, words, trained, handed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mask.json").write_text(change(external_mask.read(handed[0])).to_json())
    line = refused(["optimize", "--mask", "mask.json", "--weights", str(trained), "--target-bops", "1%"], capsys)
    assert words in line


def test_padding_is_not_kept():
    network = trace(nn.Sequential(nn.Conv2d(6, 4, 1)), torch.randn(2, 6, 4, 4))
    keep = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).repeat(8, 1)  # the second window of each filter has two inputs
    fits, beyond = (
        external_mask.ExternalMask(Plan("test", {}, {}, {"0": MaskPlan.of(k)}, {"0": "2:4"}), Path("m"))
        for k in (keep, keep.flip(1))
    )
    assert len(fits.sites(network)) == 1
    with pytest.raises(JpqError, match="no weight"):
        beyond.sites(network)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "mask.json").unlink(), "the folder has no mask.json"),
        (lambda f: (f / "weights.safetensors").unlink(), "the folder has no weights.safetensors"),
        (lambda f: (f / "mask.json").write_text('{"format": 1'), "is not a plan that jpq wrote"),
        (lambda f: (f / "mask.json").write_text('{"format": 9}'), "another version of jpq"),
        (lambda f: (f / "mask.json").write_bytes(b"\xff\xfe\x00"), "Cannot read the plan"),
        (lambda f: (f / "mask.json").write_text((f / "mask.json").read_text().replace('"n": 4', '"n": 5')), "mask of"),
        (lambda f: (f / "weights.safetensors").write_bytes(b"nothing"), "Cannot read"),
        (lambda f: save_file({"0.weight": torch.ones(1)}, f / "weights.safetensors"), "does not fit this model"),
    ],
)
def test_damaged_handovers_are_refused(damage, words, trained, handed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "private"
    folder.mkdir()
    for path in handed[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damage(folder)
    line = refused(["optimize", "--mask", "private", "--weights", str(trained), "--target-bops", "1%"], capsys)
    assert words in line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--mask", "nowhere"], "there is no such file or folder"),
        (["--mask", "HANDED"], "give the dense model that they come from with --weights"),
        (["--mask", "HANDED", "--weights", "W", "--method", "dpf"], "--method dpf would too"),
        (["--mask", "HANDED", "--weights", "W", "--structure", "2:4"], "Leave --structure out"),
        (["--mask", "HANDED", "--weights", "W", "--skip", "3"], "Leave --skip out"),
        (["--mask", "HANDED", "--weights", "W", "--width", "fixed"], "Choose --width learned"),
        (["--mask", "HANDED", "--weights", "W", "--width", "learnt"], "Did you mean learned"),
        (["--mask", "HANDED", "--weights", "W", "--target-bops", "0.01%"], "units that --mask keeps. Allow fewer bits"),
        (["--mask", "HANDED", "--weights", "W", "--model", "lenet5", "--data", "digits"], "lenet5|do not fit"),
        (["--method", "masked"], "Give one with --mask"),
    ],
)
def test_the_client_is_told_what_does_not_go_together(args, words, trained, handed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"W": str(trained), "HANDED": str(handed[0])}
    line = refused(["optimize", "--target-bops", "1%", *(names.get(a, a) for a in args)], capsys)
    assert any(word in line for word in words.split("|"))


def test_a_run_with_a_mask_can_be_repeated_from_its_settings(retrained, tmp_path):
    asked, result = retrained
    assert plan.read(result.folder / "plan.json").method == "masked"
    from jpq.config import read_toml

    again = read_toml(result.folder / "config.toml").check()
    assert again.hash() == asked.check().hash() == result.folder.name


@pytest.mark.parametrize("flag", ["score", "schedule", "classes", "allocator"])
def test_what_ranks_channels_does_not_go_with_a_mask(flag, handed, tmp_path, trained):
    asked = client(trained, tmp_path, handed[0])
    with pytest.raises(JpqError, match=f"{flag} l1: mask says"):
        jpq.optimize(replace(asked, decide=replace(asked.decide, **{flag: "l1"})))
