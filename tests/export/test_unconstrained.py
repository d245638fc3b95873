"""Unconstrained pruning with quantizers on: counted, rebuilt, exported, saved and loaded."""

import json
from fractions import Fraction

import onnx as onnx_format
import pytest
import torch
from torch.utils._pytree import tree_map
from traces import NETS, traced
from zoo.readers import IMAGE, READERS

import jpq
from jpq import costs
from jpq.compression.attach import attach
from jpq.config import Budget, Config, Decide, Run, Task, Train
from jpq.export import runtimes
from jpq.export.count import measure
from jpq.export.float_equivalence import float64_outputs, randomize, relative_difference
from jpq.export.onnx.export import export_onnx
from jpq.export.rebuild import build_from_plan, rebuild
from jpq.export.unconstrained.select import Select, count_copies
from jpq.export.verify import difference
from jpq.methods.gates import VIB, Ranked
from jpq.methods.quantizers import Fixed
from jpq.plan import from_json
from jpq.tracing.channel_shares import ChannelShares
from jpq.tracing.sites import channels_per_consumer, dropped_classes


def widths(layer):
    return Fixed(6), Fixed(8) if layer.reads_input else Fixed(5)


def settled(name, seed=0):
    """A net whose readers keep about half of their inputs each, with 6-bit weights and 5-bit inputs."""
    model, example, network = traced(name)
    torch.manual_seed(seed)
    randomize(model, example, seed)
    example = tree_map(lambda t: t.double() if t.is_floating_point() else t, example)
    net = attach(model, network, channels_per_consumer(network), Ranked, widths, [example], "upscale").double()
    for gate in net.gates:
        gate.margins.copy_(torch.rand_like(gate.margins) - 0.5)
        gate.margins[0, torch.randint(gate.n, ())] = 1.0
    net.eval().freeze(net.plan())
    return model, net, example


ZOO_NETS = sorted(
    name for name in NETS if name.startswith("zoo_")
)  # the others in test_reorder, and all in test_attach
SLOW = {name for i, name in enumerate(ZOO_NETS) if i % 4}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in sorted(NETS)]
)
def test_settled_rebuilt_and_loaded_agree(name):
    model, net, example = settled(name)
    small, plan = rebuild(net, model)
    found = float64_outputs(small.double(), example)
    assert relative_difference(float64_outputs(net, example), found) <= 1e-10
    again = build_from_plan(from_json(plan.to_json(), "here"), model)
    again.load_state_dict(small.state_dict())
    assert relative_difference(found, float64_outputs(again.double().eval(), example)) == 0


@pytest.mark.parametrize("name", ["chain", "joined", "added", "flipped", "depthwise", "transposed", "zoo_concat"])
def test_counted_on_the_rebuilt_model(name):
    model, net, example = settled(name)
    small, plan = rebuild(net, model)
    counted, uses = measure(small, example), net.exact_usage(plan)
    assert (counted["bops"], counted["macs"]) == (costs.bops(uses), costs.macs(uses))


def test_a_reader_is_charged_for_what_it_keeps_and_a_producer_for_what_anybody_keeps():
    model, net, example = settled("chain")
    small, plan = rebuild(net, model)
    uses = {u.name: u for u in net.exact_usage(plan)}
    for site in net.sites:
        (tap,) = site.taps
        assert uses[tap.layer].inputs == Fraction(sum(plan.kept[site.name]), site.n)
    made = 12 - len(dropped_classes(net.sites, plan.kept))
    assert uses["body.0"].outputs * 12 == made == small.body[0].out_channels
    assert measure(small, example)["macs"] == costs.macs(uses.values())


def test_soft_shares_are_exact_at_the_corners_and_have_gradients():
    _, _, network = traced("joined")
    sites = channels_per_consumer(network)
    shares = ChannelShares(network, sites)
    generator = torch.Generator().manual_seed(0)
    hard = [(torch.rand(1, s.n, generator=generator) < 0.5).double() for s in sites]
    soft = shares.soft_shares(hard)
    exact = shares.exact_shares({s.name: h[0].bool().tolist() for s, h in zip(sites, hard, strict=True)})
    for ours, (kept, whole) in zip([*soft[0], *soft[1]], [*exact[0], *exact[1]], strict=True):
        assert float(ours) == pytest.approx(kept / whole)
    half = [torch.full((1, s.n), 0.5, dtype=torch.double, requires_grad=True) for s in sites]
    _, outputs = shares.soft_shares(half)
    at = [layer.name for layer in network.layers].index("a.0")
    readers = sum(s.name.startswith("a.0 for") for s in sites)
    assert float(outputs[at]) == pytest.approx(1 - 0.5**readers), "P(any of the readers keeps it)"
    outputs[at].backward()
    assert all(bool((h.grad > 0).all()) for s, h in zip(sites, half, strict=True) if s.name.startswith("a.0 for"))


def test_gates_that_learn_work_on_every_reader():
    torch.manual_seed(0)
    model, _, network = traced("added")
    randomize(model, IMAGE).float()
    net = attach(model, network, channels_per_consumer(network), VIB, widths, [IMAGE], "djpq")
    sum(out.square().mean() for out in net(IMAGE)).add(costs.bops(net.soft_usage()).log()).add(net.penalty()).backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in net.gates.parameters() if p.requires_grad and p.grad is not None)
    for gate in net.gates:
        gate.log_var.data[0, ::2] = 4.0
    net.eval().freeze(net.plan())
    small, _ = rebuild(net, model)
    assert relative_difference(float64_outputs(net.double(), IMAGE), float64_outputs(small.double(), IMAGE)) <= 1e-9


def test_exported_file_slices_and_gathers(tmp_path):
    torch.manual_seed(1)
    model = jpq.tasks.models.build("resnet20", 10, 3).eval()
    x = torch.randn(4, 3, 16, 16)
    net = jpq.compress(model, x, method="upscale", bops="0.8%", w_bits=(4, 4), a_bits=(4, 4))
    small = net.finalize()
    found = count_copies(small, x)
    assert found.views >= 1
    assert found.gathers >= 1
    path = tmp_path / "small.onnx"
    export_onnx(small, x, path)
    kinds = [node.op_type for node in onnx_format.load(path).graph.node]
    strided = 4  # of the two shortcuts: every second row, and every second column
    assert (kinds.count("Slice") - strided, kinds.count("Gather")) == (found.views, found.gathers)
    batches = [(torch.randn(8, 3, 16, 16), torch.zeros(8))]
    checked = jpq.verify(net.net, small, path, batches, x)
    assert checked["masked_vs_rebuilt_float64"] <= 1e-9
    assert checked["rebuilt_vs_onnxruntime"]["images"] == 8


@pytest.mark.parametrize("score", ["l1", "lamp", "hrank"])
def test_lands_on_the_budget_at_the_bits_that_were_given(score):
    torch.manual_seed(0)
    model = READERS["joined"]().eval()
    net = jpq.compress(model, IMAGE, method="upscale", bops="1%", w_bits=(2, 5), a_bits=(2, 4), score=score)
    plan = net.net.plan()
    first = net.net.network.layers[0].name
    assert {(b.w_bits, b.a_bits) for name, b in plan.layers.items() if name != first} == {(5, 4)}
    assert (plan.layers[first].w_bits, plan.layers[first].a_bits) == (5, 8)
    small = net.finalize()
    limit = 0.01 * costs.baseline(net.net.exact_usage())["bops"]
    assert 0.9 * limit <= measure(small, IMAGE)["bops"] <= limit


def test_impossible_targets_are_refused():
    with pytest.raises(jpq.JpqError, match="smallest possible"):
        jpq.compress(READERS["chain"](), IMAGE, method="upscale", bops="0.001%")


def test_a_run_from_the_command_can_be_loaded(tmp_path):
    asked = Config(
        task=Task(model="resnet8", limit=120),
        budget=Budget(target_bops="0.8%"),
        decide=Decide(method="upscale", w_bits=(4, 4), a_bits=(4, 4), score="l2"),
        train=Train(epochs=2, float_epochs=1),
        run=Run(out=tmp_path, device="cpu"),
    )
    result = jpq.optimize(asked)
    assert 0.97 <= result.targets["bops"]["used"] <= 1
    assert result.verified["masked_vs_rebuilt_float64"] <= 1e-9
    small, plan = jpq.load(result.folder)
    assert plan.selects
    assert json.loads((result.folder / "plan.json").read_text())["selects"] == {
        k: list(v) for k, v in plan.selects.items()
    }
    assert sum(isinstance(m, Select) for m in small.modules()) == len(plan.selects)
    x = torch.rand(16, 1, 8, 8)
    apart = (small(x) - runtimes.Session(result.folder / "model.onnx", optimised=False)(x)).abs().amax(1)
    assert float(apart.median()) < 1e-3  # a value at a rounding boundary may move a few
    assert difference(small, jpq.load(result.folder)[0], x) == 0
