"""A structure for each layer: the rules, the search, and what a run with several structures promises."""

import json
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import Stop
from torch import Size, nn

import jpq
from jpq.allocation import structure_mapping, structure_search
from jpq.allocation.structure_latency import latency_source, layer_ms, modelled_ms, roofline_ms, weights_per_lookup
from jpq.allocation.structure_projection import kept_share, project, strongest_units
from jpq.allocation.structure_rules import (
    allowed_structures,
    apply_rules,
    cheapest_mapping,
    is_hard_task,
    smallest_fast_block,
)
from jpq.allocation.structure_search import reward, search_structures
from jpq.config import Budget, Config, Decide, Run, Task, Train
from jpq.export.packed.model import unpack_model
from jpq.export.verify import EXACT, difference
from jpq.methods.compatibility import compose_method, is_allowed
from jpq.methods.gates import Reweighted
from jpq.methods.structures import parse_layers, parse_structure
from jpq.plan import from_json
from jpq.tasks.data import load
from jpq.tracing.sites import masks, weight_layout
from jpq.tracing.trace import trace
from jpq.types import DENSE, JpqError

MIXED = "0=dense,3=pattern,6=punched:8x4,11=block:4x1"  # of the convnet
HALF = (8, 8, 2, 2)


class Kinds(nn.Module):
    """A layer of every kind that the rules tell apart."""

    def __init__(self, classes=10):
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point, self.wide = nn.Conv2d(16, 40, 1), nn.Conv2d(40, 24, 5, padding=2)
        self.plain, self.head = nn.Conv2d(24, 64, 3, padding=1), nn.Linear(64, classes)

    def forward(self, x):
        x = self.wide(self.point(self.deep(self.stem(x).relu()).relu()).relu()).relu()
        return self.head(self.plain(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def seen():
    """The traced network of that model."""
    return trace(Kinds().eval(), torch.randn(1, 3, 16, 16))


def error(weight, structure, density):
    return float((weight - project(weight, parse_structure(structure), density)).square().sum())


@pytest.mark.parametrize(
    "structure", ["block:2x1", "punched:2x2", pytest.param("block:1x1", marks=pytest.mark.slow), "pattern"]
)
def test_projection_is_the_nearest_point_and_stays_put(structure):
    torch.manual_seed(0)
    weight = torch.randn((1, 1, 3, 3) if structure == "pattern" else (4, 2, 1, 2), dtype=torch.float64)
    own = parse_structure(structure)
    near = project(weight, own, 0.5)
    rows, n = own.shape(weight.shape)
    k = 1 if structure == "pattern" else (n + 1) // 2
    candidates = []
    for kept in combinations(range(n), k):
        z = torch.zeros(rows, n, dtype=torch.float64)
        z[0, list(kept)] = 1
        candidates.append(float((weight - weight * own.expand(z, weight.shape)).square().sum()))
    assert float((weight - near).square().sum()) == pytest.approx(min(candidates))
    assert torch.equal(project(near, own, 0.5), near)
    assert int((near == 0).sum()) == (5 if structure == "pattern" else weight.numel() // 2)


@pytest.mark.parametrize(("form", "size"), [("punched:{0}x{0}", HALF), ("block:{0}x1", (8, 16))])
def test_smaller_blocks_lose_less_at_the_same_number_of_zeros(form, size):
    torch.manual_seed(1)
    weight = torch.randn(size, dtype=torch.float64)
    errors = [error(weight, form.format(b), 0.5) for b in (1, 2, 4, 8)]
    assert errors == sorted(errors)
    assert errors[0] == pytest.approx(float(weight.square().flatten().sort().values[: weight.numel() // 2].sum()))
    if form.startswith("block"):  # the largest is column pruning
        assert errors[-1] == pytest.approx(float(weight.square().sum(0).sort().values[:8].sum()))


def test_the_smallest_block_within_the_tolerance():
    blocks, ms = ["1", "4", "8", "16", "full"], [10, 6, 5.2, 4.9, 4.6]  # the sheet's example
    assert [smallest_fast_block(blocks, ms, t) for t in (0.2, 0.1, 0.0, 9.0)] == ["8", "16", "full", "1"]


@given(ms=st.lists(st.floats(0.1, 100), min_size=1, max_size=7), tols=st.tuples(st.floats(0, 3), st.floats(0, 3)))
def test_a_tighter_tolerance_never_gives_a_smaller_block(ms, tols):
    ms = sorted(ms, reverse=True)
    names = [str(i) for i in range(len(ms))]
    tight, loose = (int(smallest_fast_block(names, ms, t)) for t in sorted(tols))
    assert tight >= loose
    assert ms[tight] <= (1 + min(tols)) * ms[-1]
    assert tight == 0 or ms[tight - 1] > (1 + min(tols)) * ms[-1]


@settings(deadline=None, max_examples=40)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3])),
    density=st.floats(0.05, 1.0),
    positions=st.integers(1, 200),
)
def test_a_coarser_block_is_never_modelled_slower(size, density, positions):
    outputs, inputs, k = size
    weight = Size((outputs, inputs, k, k))
    form = "block:{0}x1" if k == 1 else "punched:{0}x{0}"
    macs = weight.numel() * positions
    each = [roofline_ms(macs, weight, parse_structure(form.format(b)), density) for b in (1, 2, 4, 8, 16, 32, "*")]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(each))
    assert each[-1] >= density * roofline_ms(macs, weight, None, 1.0) * (1 - 1e-12)


def test_what_one_look_up_serves():
    assert weights_per_lookup(parse_structure("block:8x1"), Size((16, 10))) == 8
    assert weights_per_lookup(parse_structure("punched:8x4"), Size((16, 8, 3, 3))) == 32
    assert weights_per_lookup(parse_structure("block:8x1"), Size((12, 10))) == 6  # blocks of 8 and of 4
    assert (
        weights_per_lookup(parse_structure("pattern"), Size((64, 8, 3, 3))) == 4 * 16
    )  # a quarter of 64 filters has the same pattern


def test_the_roofline_by_hand():
    """A weight of 16 x 10, read once or at a hundred places; 8 million MACs and 4 million bytes take a millisecond."""
    size, blocks = Size((16, 10)), parse_structure("block:8x1")
    assert roofline_ms(160, size, None, 1.0) == pytest.approx(160 / 4e6)
    assert roofline_ms(16_000, size, None, 0.5) == pytest.approx(16_000 / 8e6)  # without a mask all weights stay
    assert roofline_ms(16_000, size, blocks, 0.5) == pytest.approx(16_000 * 0.5 * (1 + 8 / 8) / 8e6)
    assert roofline_ms(160, size, blocks, 0.25) == pytest.approx(160 * 0.25 * (1 + 2 / 8) / 4e6)


def test_a_record_adds_up_the_times_of_its_layers(seen):
    mapping = {"plain": "punched:8x8", "head": "block:*x1"}
    shares = {layer.name: 0.25 if layer.name in mapping else 1.0 for layer in seen.layers}
    for density, share in (
        (shares, shares.get),
        (0.5, lambda n: kept_share(seen.layer(n), mapping.get(n, DENSE), 0.5)),
    ):
        record = structure_mapping.mapping_record(seen, mapping, density, "by hand")
        times = {n.name: modelled_ms(n, mapping.get(n.name, DENSE), share(n.name)) for n in seen.layers}
        assert {n: row["ms"] for n, row in record["layers"].items()} == pytest.approx(times)
        assert {n: row["structure"] for n, row in record["layers"].items() if n in mapping} == mapping
        assert record["ms"] == pytest.approx(sum(times.values()))
        assert record["dense_ms"] == pytest.approx(sum(modelled_ms(n, DENSE, 1.0) for n in seen.layers))


def test_no_mapping_keeps_fewer_weights_than_the_cheapest(seen):
    found = cheapest_mapping(seen, 0.3, is_allowed=lambda structure: structure != "pattern", skip=["wide"])
    assert found["wide"] == found["deep"] == DENSE
    for layer in seen.layers:
        choices = [s for kind in allowed_structures(layer).values() for s in kind if s not in (DENSE, "pattern")]
        if found[layer.name] != DENSE:
            assert kept_share(layer, found[layer.name], 0.3) == min(kept_share(layer, s, 0.3) for s in choices)


@pytest.mark.parametrize("difficult", [False, True])
def test_rules_by_kind_of_layer(difficult, seen):
    found = apply_rules(seen, 0.5, difficult)
    assert list(found) == [layer.name for layer in seen.layers]
    assert found["deep"] == DENSE
    assert all(found[name].startswith("block:") for name in ("point", "head"))
    assert found["wide"].startswith("punched:")
    threes = {found[name].partition(":")[0] for name in ("stem", "plain")}
    assert threes == {"pattern" if difficult else "punched"}
    sites = masks(seen, found)
    assert {s.name for s in sites} == set(found) - {"deep"}


def test_rules_follow_the_latency_that_they_are_given(seen):
    def clock(layer, structure, share):
        side = structure.split(":")[1].split("x")[0]
        return {"1": 10, "4": 6, "8": 5.2, "16": 4.9, "*": 4.6}.get(side, 20.0)

    assert apply_rules(seen, 0.5, False, latency=clock)["plain"] == "punched:8x8"
    assert apply_rules(seen, 0.5, False, latency=clock, tolerance=0.1)["plain"] == "punched:16x16"
    assert apply_rules(seen, 0.5, False, latency=clock, tolerance=0)["plain"] == "punched:*x*"
    assert apply_rules(seen, 0.5, False, latency=clock, skip=["plain"])["plain"] == DENSE
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(JpqError, match="tolerance"):
            apply_rules(seen, 0.5, False, tolerance=bad)


def share_bounds(structure, size, keep):
    """The least and the largest share of the weights that as many units can hold; equal where units are of one size."""
    bounds = [0.0, 0.0]
    for sizes, count in zip(structure.sizes(size), keep.sum(1).int().tolist(), strict=True):
        units = sizes[sizes > 0].sort().values
        bounds[0] += float(units[:count].sum()) / size.numel()
        bounds[1] += float(units[len(units) - count :].sum()) / size.numel()
    return bounds


def test_choices_fit_their_layers(seen):
    for layer in seen.layers:
        kinds = allowed_structures(layer)
        assert ("pattern" in kinds) == (layer.name in ("stem", "plain"))
        for structure in {s for kind in kinds.values() for s in kind} - {DENSE}:
            own, size = parse_structure(structure, weight_layout(layer)), Size(layer.weight_shape)
            rows, n = own.shape(size)
            assert rows * n > 0
            weight = torch.randn(size)
            share = float((project(weight, own, 0.4) != 0).float().mean())
            low, high = share_bounds(own, size, strongest_units(weight, own, 0.4))
            assert low - 1e-6 <= share <= high + 1e-6
            assert low - 1e-6 <= kept_share(layer, structure, 0.4) <= high + 1e-6
    assert allowed_structures(seen.layer("deep")) == {DENSE: (DENSE,)}
    assert allowed_structures(seen.layer("stem"))["punched"][-1] == "punched:*x*"


def test_hard_tasks(seen):
    assert not is_hard_task(seen, torch.zeros(1, 3, 64, 64))
    assert is_hard_task(seen, torch.zeros(1, 3, 65, 64))
    assert is_hard_task(trace(Kinds(101).eval(), torch.randn(1, 3, 16, 16)), torch.zeros(1, 3, 16, 16))


def test_rules_take_what_the_method_can():
    easy, difficult = (trace(Kinds(c).eval(), torch.randn(1, 3, 16, 16)) for c in (10, 101))
    example = torch.zeros(1, 3, 16, 16)

    def kinds(method, net):
        mapping = structure_mapping.map_structures(method, net, example, 0.5)
        return {structure.partition(":")[0] for structure in mapping.values()}

    assert kinds(compose_method("admm", "rules"), difficult) == {DENSE, "pattern", "block", "punched"}
    assert kinds(compose_method("scheme-mapping"), difficult) == {
        DENSE,
        "block",
        "punched",
    }  # its units may not overlap
    assert kinds(compose_method("admm", "rules"), easy) == {DENSE, "block", "punched"}
    assert not is_allowed(compose_method("scheme-mapping"))("pattern")
    assert structure_mapping.map_structures(compose_method("admm"), easy, example, 0.5) is None


LAYERS = {f"l{i}": {f"c{j}": 1.0 + j for j in range(4)} for i in range(5)}


def planted(asked):
    """Share of the layers with their planted choice."""
    return sum(asked[f"l{i}"] == f"c{i % 4}" for i in range(5)) / 5


def test_search_puts_most_mass_on_the_best_choices():
    found = search_structures(LAYERS, planted, 1e9, seed=3)
    assert all(float(found.logits[f"l{i}"].softmax(0)[i % 4]) > 0.5 for i in range(5))
    assert found.mapping == {f"l{i}": f"c{i % 4}" for i in range(5)}
    assert found.accuracy == found.reward == 1
    assert search_structures(LAYERS, planted, 1e9, seed=3).mapping == found.mapping
    again = search_structures(LAYERS, planted, 1e9, seed=3, samples=20)
    other = search_structures(LAYERS, planted, 1e9, seed=4, samples=20)
    assert any(not torch.equal(again.logits[x], other.logits[x]) for x in LAYERS)


def test_updates_of_a_search_by_hand():
    """Rewards 0 and 1: the first is the baseline and moves nothing; the second's advantage is 0.9 of its excess."""
    one = search_structures({"a": {"x": 1.0, "y": 1.0}}, lambda _: 0.5, 1e9, samples=1)
    assert one.logits["a"].tolist() == [0.0, 0.0]
    for seed in range(20):
        asked = []
        found = search_structures(
            {"a": {"x": 1.0, "y": 1.0, "z": 1.0}},
            lambda m, asked=asked: asked.append(m["a"]) or float(len(asked) - 1),
            1e9,
            samples=2,
            lr=0.1,
            seed=seed,
        )
        if len(asked) < 2 or found.judged < 2 or not found.logits["a"].any():
            continue  # the same mapping twice, which is judged once
        advantage = 0.9 * 1.0
        spread = (0.1 * advantage**2 / (1 - 0.9**2)) ** 0.5
        wanted = torch.full((3,), -1 / 3, dtype=torch.float64)
        wanted["xyz".index(asked[1])] += 1
        assert torch.allclose(found.logits["a"], 0.1 * advantage / spread * wanted)
        return
    raise AssertionError("no seed drew two mappings")


def test_search_without_a_rate_learns_nothing_and_keeps_the_best():
    asked = []
    found = search_structures(LAYERS, lambda m: asked.append(dict(m)) or planted(m), 1e9, lr=0.0, samples=30)
    assert all(bool((theta == 0).all()) for theta in found.logits.values())
    assert found.reward == max(map(planted, asked)) == planted(found.mapping)
    assert len(asked) == found.judged == len({tuple(m.items()) for m in asked})  # nothing is asked twice


def test_search_stays_below_the_limit_where_accuracy_is_equal():
    found = search_structures(LAYERS, lambda _: 0.9, 5.0, samples=400, lr=0.3)
    assert found.ms <= 7
    assert all(int(theta.argmax()) <= 1 for theta in found.logits.values())
    assert reward(0.9, 10.0, 5.0) == pytest.approx(-0.1)
    assert reward(0.9, 5.0, 5.0) == reward(0.9, 1.0, 5.0) == 0.9


def test_search_never_does_worse_than_where_it_started():
    start = {f"l{i}": f"c{i % 4}" for i in range(5)}
    assert search_structures(LAYERS, planted, 1e9, start=start, samples=1).mapping == start


@pytest.mark.parametrize("bad", [{"samples": 0}, {"lr": -1.0}, {"lr": float("nan")}, {"mu": -1.0}, {"limit_ms": 0.0}])
def test_searches_that_make_no_sense(bad):
    with pytest.raises(JpqError, match="A search"):
        search_structures(**{"latencies": LAYERS, "accuracy": planted, "limit_ms": 1.0, **bad})
    with pytest.raises(JpqError, match="at least one choice"):
        search_structures({"l0": {}}, planted, 1.0)


class Unread:
    """A split that nobody may look at."""

    def __getattr__(self, name):
        raise AssertionError(f"the test split's {name} was read")

    __iter__ = __len__ = None


@pytest.mark.parametrize("trained", [False, True])
def test_the_search_reads_held_out_data_only_and_leaves_the_model(trained):
    torch.manual_seed(0)
    data = replace(load("digits", limit=300), test=Unread())
    model = jpq.tasks.models.build("convnet", 10, 1).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    network = trace(model, data.example)
    method = compose_method("admm", "search")
    found, limit = structure_search.search_mapping(
        method, network, model, data, 0.5, ["3"], pretrain=trained, samples=3
    )
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert found.mapping["3"] == DENSE
    assert limit > 0
    again, _ = structure_search.search_mapping(method, network, model, data, 0.5, ["3"], pretrain=trained, samples=3)
    assert (again.mapping, again.accuracy) == (found.mapping, found.accuracy)


@pytest.mark.parametrize("trained", [False, True])
def test_a_mapping_is_judged_alike_whatever_was_judged_before_it(trained):
    data = load("digits", limit=300)
    torch.manual_seed(0)
    model = jpq.tasks.models.build("convnet", 10, 1).eval()
    network = trace(model, data.example)
    proxy = structure_search.MappingEvaluator(network, model, data, 0.5, pretrain=trained, lr=1e-2)
    losses = []
    for asked in (parse_layers(MIXED), dict.fromkeys(parse_layers(MIXED), DENSE), parse_layers(MIXED)):
        proxy(asked)
        losses.append({name: t.clone() for name, t in proxy.model.state_dict().items()})
    first, other, again = losses
    assert all(torch.equal(t, again[name]) for name, t in first.items())
    assert any(not torch.equal(t, other[name]) for name, t in first.items())
    assert any(not torch.equal(t, proxy.before[n]) for n, t in other.items() if "running" in n)  # measured anew


def test_what_the_proxy_trains_stays_masked():
    data = load("digits", limit=300)
    model = jpq.tasks.models.build("convnet", 10, 1).eval()
    network = trace(model, data.example)
    proxy = structure_search.MappingEvaluator(network, model, data, 0.5, pretrain=True, lr=1e-2)
    asked = parse_layers(MIXED)
    proxy(asked)
    for name, structure in asked.items():
        zero = proxy.projected(name, structure) == 0 if structure != DENSE else torch.zeros(())
        assert bool((proxy.weight(name) != proxy.before[f"{name}.weight"]).any())
        assert not (proxy.weight(name) * zero).any()
        assert bool(zero.any()) == (structure != DENSE)


def test_reweighted_presses_each_unit_by_what_it_was():
    torch.manual_seed(0)
    weight = torch.randn(8, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    own = parse_structure("punched:4x2")
    gate = Reweighted(*own.shape(weight.shape), density=0.5, lam=0.03).double()
    gate.set_site(own.sizes(weight.shape), own.quota())
    gate.observe_weights([(weight, own)])
    gate.own_loss().backward()
    norms = own.pool(weight.detach().square())
    assert torch.allclose(weight.grad, 2 * 0.03 * own.expand(1 / (norms + 1e-4), weight.shape) * weight)
    assert torch.equal(gate.keep().sum(), torch.tensor(27.0, dtype=torch.float64))
    assert set(norms[gate.keep() > 0].tolist()) == set(norms.flatten().topk(27).values.tolist())
    with torch.no_grad():
        weight.mul_(0.1)
    gate.observe_weights([(weight, own)])
    held = gate.press.clone()
    gate.after_step(0.1)
    assert torch.equal(gate.press, held)  # constant between updates
    gate.after_step(0.2)
    assert torch.allclose(gate.press, 1 / (norms / 100 + 1e-4))


def config(out, **decide):
    return Config(
        task=Task(limit=300),
        budget=Budget(target_bops="1.5%"),
        decide=Decide(**{"method": "dpf", **decide}),
        train=Train(epochs=3, float_epochs=2, lr=3e-3),
        run=Run(out=out, device="cpu"),
    )


@pytest.mark.parametrize("method", [pytest.param("dpf", marks=pytest.mark.slow), "admm"])
def test_several_structures_in_one_run(method, tmp_path):
    result = jpq.optimize(config(tmp_path, method=method, structure=MIXED))
    small, plan = jpq.load(result.folder)
    asked = parse_layers(MIXED)
    assert plan.structures == {k: v for k, v in asked.items() if v != DENSE}
    table = pd.read_csv(result.folder / "layers.csv", dtype={"name": str})
    assert dict(zip(table.name, table.structure, strict=True)) == asked
    assert result.verified["masked_vs_rebuilt_float64"] <= EXACT
    assert result.verified["rebuilt_vs_onnxruntime"]["argmax_agreement"] > 0.98
    x = load("digits", limit=300).example
    assert difference(small, unpack_model(small, result.folder / "model.packed"), x) < 1e-5
    assert 0 <= result.packed["layers"] - result.compressed.size_bytes < 2 * len(result.layers)
    network = trace(jpq.tasks.models.build("convnet", 10, 1).eval(), x)
    for row in result.layers:
        weight = small.get_submodule(row.name).weight
        mask = torch.ones_like(weight)
        if row.structure != DENSE:
            own = parse_structure(row.structure)
            mask = own.expand(plan.masks[row.name].units().to(weight), weight.shape).expand_as(weight)
        assert not (weight[mask == 0]).any()
        assert float(mask.mean()) == pytest.approx(row.density)
        assert row.bops == network.layer(row.name).macs * int(mask.sum()) * row.w_bits * row.a_bits // mask.numel()
    pattern = small.get_submodule("3").weight.flatten(2)
    assert int((pattern != 0).sum(2).max()) <= 4
    assert result.schemes["by"] == "hand"
    assert result.schemes["latency"] == "modelled"
    ms = [modelled_ms(network.layer(r.name), r.structure, r.density) for r in result.layers]
    assert result.schemes["ms"] == pytest.approx(sum(ms))
    assert json.loads((result.folder / "result.json").read_text())["schemes"]["by"] == "hand"


def test_a_search_is_part_of_the_run_and_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(structure_search, "search_mapping", partial(structure_search.search_mapping, samples=5))
    asked = config(tmp_path / "whole", structure="search")
    whole = jpq.optimize(asked, final=False)
    said = json.loads((whole.folder / structure_mapping.MAPPING_FILE).read_text())
    assert whole.schemes["by"] == said["by"] == "search"
    assert said["latency"] == "modelled"
    assert said["ms"] <= said["limit_ms"] or said["reward"] < said["proxy_accuracy"]
    assert {r.name: r.structure for r in whole.layers} == structure_mapping.read_mapping(
        whole.folder / structure_mapping.MAPPING_FILE
    )
    stopped = replace(asked, run=replace(asked.run, out=tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        jpq.optimize(stopped, Stop("fine-tune", 1), final=False)
    monkeypatch.setattr(structure_search, "search_mapping", None)
    resumed = jpq.optimize(replace(stopped, run=replace(stopped.run, resume=True)), final=False)
    ours, theirs = (jpq.load(r.folder)[0].state_dict() for r in (resumed, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_damaged_mapping_ends_in_a_sentence(tmp_path):
    for text in ("", "{}", '{"layers": 3}', '{"layers": {"a": 1}}'):
        (tmp_path / "one").write_text(text)
        with pytest.raises(JpqError, match="mapping of schemes"):
            structure_mapping.read_mapping(tmp_path / "one")


def test_plans_of_one_structure_are_still_read():
    mask = {"rows": 1, "n": 8, "bits": jpq.plan.MaskPlan.of(torch.ones(1, 8)).bits}
    tree = {"format": 1, "method": "dpf", "layers": {}, "kept": {}, "slices": {}, "model": {}}
    old = from_json(json.dumps({**tree, "masks": {"a": mask, "b": mask}, "structure": "block:1x1"}), "old")
    assert old.structures == {"a": "block:1x1", "b": "block:1x1"}
    new = from_json(old.to_json(), "new")
    assert new == old
    assert from_json(json.dumps({**tree, "structure": ""}), "channels").structures == {}
    with pytest.raises(JpqError, match="is not a plan"):
        from_json(json.dumps({**tree, "masks": {"a": mask}, "structures": {"b": "pattern"}}), "foreign")


@pytest.mark.parametrize(
    ("method", "structure", "words"),
    [
        ("dpf", "3=pattern,33=pattern", "Unknown layer '33'"),
        ("dpf", "3=patern", "Unknown structure 'patern'. Did you mean pattern"),
        ("dpf", "3=pattern,3=dense", "stands there twice"),
        ("dpf", "3=", "Write it like conv1=pattern"),
        ("dpf", "3=block:0x1", "no area"),
        ("dpf", "11=pattern", "11=pattern'?: .*convolution"),
        ("dpf", "3=dense", "nothing would be pruned"),
        ("djpq", "0=punched:2x2,3=pattern", "exactly 1 of each row must stay"),
        ("codeq", "rules", "single weights"),
        ("dhp", "search", "whole channels"),
        ("uniform", "rules", "prunes nothing"),
        ("dpf", "rule", "Did you mean rules"),
        ("dpf", "search", "use jpq.optimize"),
    ],
)
def test_mappings_that_make_no_sense(method, structure, words):
    torch.manual_seed(0)
    model, x = jpq.tasks.models.build("convnet", 10, 1).eval(), torch.randn(2, 1, 8, 8)
    with pytest.raises(JpqError, match=words):
        jpq.compress(model, x, method=method, structure=structure, bops="2%")


@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9.]{0,8}", fullmatch=True),
        st.sampled_from(["dense", "pattern", "2:4", "punched:*x4", "pattern:3x3:1.3.4.5/1.3.4.7"]),
        min_size=1,
    )
)
def test_mappings_are_read_as_they_are_written(asked):
    assert parse_layers(", ".join(f"{name}={structure}" for name, structure in asked.items())) == asked
    assert parse_layers("block:8x1") == {}


def test_a_table_of_latencies_says_how_long_layers_take():
    """Lines for a mask count as they are; for other masks the dense layer's time counts, times what is modelled."""

    class Clock:
        def __call__(self, inputs, outputs, density, w_bits, a_bits, scheme):
            return 5e6 if scheme == "dense" else 1e6 + 1e6 * float(density)

        def measured(self, scheme):
            return scheme in ("dense", "block:4x1")

    network = jpq.trace(jpq.tasks.models.build("convnet", 10, 1), torch.randn(2, 1, 8, 8))
    layer = replace(network.layers[-1], clock=Clock())
    assert layer_ms(layer, "dense", 1.0) == 5.0
    assert layer_ms(layer, "block:4x1", 0.5) == 1.5
    gain = modelled_ms(layer, "block:2x1", 0.5) / modelled_ms(layer, "dense", 1.0)
    assert layer_ms(layer, "block:2x1", 0.5) == pytest.approx(5 * gain)
    assert layer_ms(network.layers[-1], "block:2x1", 0.5) == modelled_ms(network.layers[-1], "block:2x1", 0.5)
    clocked = replace(network, layers=tuple(replace(x, clock=Clock()) for x in network.layers))
    last = layer.name
    assert latency_source(network, {}) == "modelled"
    assert latency_source(clocked, {last: "block:4x1"}) == "measured"
    assert latency_source(clocked, {last: "block:2x1"}) == "measured layers, modelled masks"
