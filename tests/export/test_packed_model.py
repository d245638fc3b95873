"""A rebuilt model in one packed file: as large as `size` promised, and the same model when it is read again."""

import json
from itertools import product

import onnx
import pandas as pd
import pytest
import torch
from gated import compressed
from outputs import flat, gap
from runs import config, shortened
from torch import nn
from traces import traced_network

import jpq
from jpq import costs
from jpq.compression.attach import attach
from jpq.export.branches import Branches
from jpq.export.exact_steps import round_weight_steps
from jpq.export.packed import batchnorm_folding
from jpq.export.packed.batchnorm_folding import fold_batchnorms
from jpq.export.packed.file import load_packed
from jpq.export.packed.model import pack_model, unpack_model
from jpq.export.rebuild import rebuild
from jpq.methods.quantizers import Fixed, weight_quantizer
from jpq.results.finish import with_branches
from jpq.tracing.forward import call_model
from jpq.tracing.sites import masks
from jpq.tracing.trace import trace
from jpq.types import JpqError

NETS = ["plain", "residual", "pre_activation", "shared", "signal", "transposed", "group_norms", "tokens"]


def norms(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def small_one(name, structure=None):
    """(rebuilt model in float32, plan, uses, example) with decisions at random."""
    model, net, example = compressed(name, dtype=torch.float32)
    if structure:
        network = traced_network(f"zoo_{name}")
        gate = lambda rows, n: jpq.methods.gates.SoftThreshold(rows, n, density=0.4)  # noqa: E731
        bits = lambda layer: (Fixed(3), Fixed(8))  # noqa: E731
        net = attach(model, network, masks(network, structure), gate, bits, [example], "test")
        net.train()
        call_model(net, example)
        net.after_step(1.0)
        net.eval()
    net.freeze(net.plan())
    small, plan = rebuild(net, model)
    return small, plan, net.exact_usage(plan), example


@pytest.mark.parametrize("name", NETS)
def test_folding_norms_changes_nothing(name):
    small, _, _, example = small_one(name)
    small = small.double()
    example = torch.utils._pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, example)
    assert gap(call_model(fold_batchnorms(small, example), example), call_model(small, example)) < 1e-9


def test_norms_that_read_a_layer_go_and_others_stay():
    small, _, _, example = small_one("plain")
    assert norms(small)
    assert not norms(fold_batchnorms(small, example))
    small, _, _, example = small_one("pre_activation")  # its norms read sums
    assert norms(fold_batchnorms(small, example))


class Peeks(nn.Module):
    """What the convolution makes is read by the norm, and by somebody else."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        return self.head(self.norm(x) + x).mean((2, 3))


def test_a_norm_is_not_folded_where_something_else_reads_the_layer():
    torch.manual_seed(0)
    model, x = Peeks().eval(), torch.randn(4, 3, 6, 6)
    model.norm.running_mean.normal_()
    network = trace(model, x)
    net = attach(model, network, (), None, lambda layer: (Fixed(4), Fixed(8)), [x], "test")
    net.freeze(net.plan())
    small, _ = rebuild(net, model)
    assert norms(fold_batchnorms(small, x)) == ["norm"]


def test_norms_that_only_add_their_bias_are_folded_in_one_try(monkeypatch):
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU6()) for _ in range(12)]
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), *stages).eval(), torch.randn(16, 3, 12, 12)
    net = attach(model, trace(model, x), (), None, lambda layer: (Fixed(4), Fixed(4)), [x], "test")
    net.freeze(net.plan())
    small, _ = rebuild(net, model)
    round_weight_steps(small, x)
    runs = []
    run = batchnorm_folding.run_in_double
    monkeypatch.setattr(batchnorm_folding, "run_in_double", lambda model, x: runs.append(1) or run(model, x))
    folded = fold_batchnorms(small, x)
    assert (norms(small) != [], norms(folded), len(runs)) == (True, [], 2)
    assert gap(folded(x), small(x)) < 1e-6


def test_one_norm_of_many_that_stays_is_found_in_few_runs(monkeypatch):
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(16)]
    peeks = Peeks()
    model, x = nn.Sequential(*stages, peeks).eval(), torch.randn(4, 3, 6, 6)
    peeks.norm.running_mean.normal_()
    net = attach(model, trace(model, x), (), None, lambda layer: (Fixed(4), Fixed(8)), [x], "test")
    net.freeze(net.plan())
    small, _ = rebuild(net, model)
    runs = []
    run = batchnorm_folding.run_in_double
    monkeypatch.setattr(batchnorm_folding, "run_in_double", lambda model, x: runs.append(1) or run(model, x))
    assert norms(fold_batchnorms(small, x)) == ["16.norm"]
    assert len(runs) <= 12  # the model, all norms, and two halves at each of five levels


class Tokens(nn.Module):
    """A norm over positions reads a linear layer, whose outputs lie on another dim."""

    def __init__(self, norm):
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(8, 16), norm, nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.norm(self.linear(x))).mean(1)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(5), nn.BatchNorm1d(5, track_running_stats=False), nn.BatchNorm1d(5, False)], ids=str
)
def test_norms_over_other_dims_or_without_statistics_stay(norm, tmp_path):
    torch.manual_seed(0)
    model, x = Tokens(norm).eval(), torch.randn(6, 5, 8)
    net = attach(model, trace(model, x), (), None, lambda layer: (Fixed(4), Fixed(8)), [x], "test")
    net.freeze(net.plan())
    small, plan = rebuild(net, model)
    pack_model(small, plan, x, tmp_path / "one")
    assert gap(unpack_model(small, tmp_path / "one")(x), small(x)) < 1e-5


def pairs_of_net_and_structure():
    """All pairs; fast are every net without masks and with one structure."""
    structures = ["2:4", "per-output", "block:2x2"]
    for i, (name, structure) in enumerate(product(NETS, [None, *structures])):
        fast = structure in (None, structures[i // 4 % 3])
        yield pytest.param(name, structure, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("name", "structure"), pairs_of_net_and_structure())
def test_size_on_disk_is_what_size_promised_and_the_model_comes_back(name, structure, tmp_path):
    small, plan, uses, example = small_one(name, structure)
    path = tmp_path / "model.packed"
    stored = pack_model(small, plan, example, path)
    assert stored.total == path.stat().st_size == stored.header + stored.layers + stored.others
    promised = costs.size(uses)
    assert 0 <= stored.layers - promised < 2 * len(plan.layers)  # two streams a layer, each in whole bytes
    again = unpack_model(small, path)
    out, back = flat(call_model(small, example)), flat(call_model(again, example))
    assert float((out - back).abs().median() / out.abs().max()) < 1e-5  # an input at a rounding boundary may cross it
    grids = [(weight_quantizer(m), m) for m in fold_batchnorms(small, example).modules() if hasattr(m, "weight_quant")]
    new = [(weight_quantizer(m), m) for m in again.modules() if hasattr(m, "weight_quant")]
    for (a, layer), (b, other) in zip(grids, new, strict=True):
        assert torch.equal((a(layer.weight)[0] / a.scale()).round(), (b(other.weight)[0] / b.scale()).round())


def test_a_weight_beyond_its_range_is_stored_as_the_largest_integer(tmp_path):
    """At 1.5 times its range a weight is clipped to N = 2^(bits - 1) - 1, like in the forward pass, not to N + 1."""
    small, plan, _, example = small_one("plain")
    name, layer = next((name, m) for name, m in small.named_modules() if hasattr(m, "weight_quant"))
    grid = weight_quantizer(layer)
    highest = 2 ** (round(float(grid.width())) - 1) - 1
    with torch.no_grad():
        layer.weight[:, 0] = 1.5 * grid.threshold.expand_as(layer.weight)[:, 0]
        layer.weight[:, 0, 0] *= -1
    pack_model(small, plan, example, tmp_path / "m.packed")
    stored = load_packed(tmp_path / "m.packed")[0][name].weight
    assert (int(stored.min()), int(stored.max())) == (-highest, highest)
    folded = fold_batchnorms(small, example).get_submodule(name)
    grid = weight_quantizer(folded)
    assert torch.equal(stored.float(), (grid(folded.weight)[0] / grid.scale()).round())
    again = unpack_model(small, tmp_path / "m.packed").get_submodule(name)
    assert torch.equal(stored.float(), (again.weight / weight_quantizer(again).scale()).round())


def test_a_file_of_another_model_is_refused(tmp_path):
    small, plan, _, example = small_one("plain")
    pack_model(small, plan, example, tmp_path / "one")
    other, _, _, _ = small_one("residual")
    with pytest.raises(JpqError, match="another model"):
        unpack_model(other, tmp_path / "one")


def test_a_run_packs_its_model_and_counts_densities(tmp_path):
    asked = shortened(config(tmp_path, method="dpf"))
    result = jpq.optimize(asked)
    tree = json.loads((result.folder / "result.json").read_text())
    assert tree["packed"]["total"] == (result.folder / "model.packed").stat().st_size
    assert 0 <= tree["packed"]["layers"] - tree["compressed"]["size_bytes"] < 2 * len(result.layers) + 1
    assert tree["compressed"]["bops_structured"] > 1.5 * tree["compressed"]["bops"]
    rows = pd.read_csv(result.folder / "layers.csv")
    assert rows.bops.sum() == tree["compressed"]["bops"]
    assert rows.macs.sum() == pytest.approx(tree["compressed"]["macs"], abs=len(rows))
    assert 0.4 < (rows.density * rows.macs).sum() / rows.macs.sum() < 0.8


def test_zeros_that_no_device_skips_may_be_counted_as_work(tmp_path):
    result = jpq.optimize(shortened(config(tmp_path, method="dpf", target_bops="1%", cost="bops-structured")))
    assert result.compressed.bops == result.compressed.bops_structured <= result.targets["bops-structured"]["limit"]
    assert result.targets["bops-structured"]["used"] >= 0.97
    assert sum(row.bops for row in result.layers) == result.compressed.bops
    assert min(row.density for row in result.layers) < 1
    assert result.compressed.macs < 0.8 * sum(row.macs / row.density for row in result.layers)


def test_other_targets_count_masks_whatever_the_cost_of_bops(tmp_path):
    asked = {"target_bops": "2%", "target_macs": "75%", "cost": "bops-structured"}
    result = jpq.optimize(shortened(config(tmp_path, method="dpf", **asked)))
    assert result.targets["macs"]["reached"] == result.compressed.macs <= result.targets["macs"]["limit"]
    assert result.targets["bops-structured"]["reached"] == result.compressed.bops_structured


def test_filter_groups_are_exported_as_branches(tmp_path):
    result = jpq.optimize(shortened(config(tmp_path, method="dsp")))
    assert result.verified["rebuilt_vs_onnxruntime"]["argmax_differs"] <= 2
    nodes = onnx.load(result.folder / "model.onnx").graph.node
    small, plan = jpq.load(result.folder)
    cut = with_branches(small, plan, torch.rand(4, 1, 8, 8))
    branches = [m for m in cut.modules() if isinstance(m, Branches)]
    assert bool(branches) == ("Gather" in {node.op_type for node in nodes})
