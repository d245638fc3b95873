"""The law: zero weights for dropped channels, or no channels at all, give the same output."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from cuts import cut
from thinned import thinned
from traces import traced
from zoo import ZOO, PaddedShortcut, Plain

from jpq.export.float_equivalence import (
    check_equivalence,
    draw_decisions,
    dropped_labels,
    float64_outputs,
    masked_weights,
    randomize,
    relative_difference,
)
from jpq.tasks import models
from jpq.tracing.shrink import apply_slices, compute_slices, remove_channels
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace
from jpq.types import JpqError


@pytest.mark.parametrize("name", ZOO)
def test_masked_is_shrunk(name: str) -> None:
    model, example, network = traced(f"zoo_{name}")
    randomize(model, example)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sites = channels(network)
    assert sites
    for seed in range(6):
        keep = draw_decisions(sites, seed, share=(0.0, 0.2, 0.5, 0.5, 0.8, 0.9)[seed])
        gone = dropped_labels(sites, keep)
        small = remove_channels(model, network, gone)
        with masked_weights(model, network, sites, keep):
            wanted = float64_outputs(model, example)
        assert relative_difference(wanted, float64_outputs(small, example)) < 1e-10
        if gone:
            assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
            dense = float64_outputs(model, example)
            assert relative_difference(dense, wanted) > 1e-6, "the dropped channels did not matter"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_check_sees_one_wrong_channel() -> None:
    model, example, network = traced("zoo_residual")
    randomize(model, example)
    sites = channels(network)
    keep = draw_decisions(sites, 0)
    gone = dropped_labels(sites, keep)
    kept = [int(c) for c in sites[0].labels if int(c) not in gone]
    other = (gone - {min(gone & set(sites[0].labels.tolist()))}) | {kept[0]}
    with masked_weights(model, network, sites, keep):
        wanted = float64_outputs(model, example)
    wrong = float64_outputs(remove_channels(model, network, other), example)
    assert relative_difference(wanted, wrong) > 1e-3


@pytest.mark.parametrize("name", thinned(ZOO, lambda i, _: i % 2 == 1))  # the others are cut in test_inspect
def test_the_shrunk_model_traces_to_the_kept_macs(name: str) -> None:
    network, _, gone, again = cut(name, lambda sites: dropped_labels(sites, draw_decisions(sites, seed=1, share=0.5)))
    assert [layer.name for layer in again.layers] == [layer.name for layer in network.layers]
    for old, new in zip(network.layers, again.layers, strict=True):
        assert len(new.inputs) == sum(int(c) not in gone for c in old.inputs)
        assert len(new.outputs) == sum(int(c) not in gone for c in old.outputs)
        share = len(new.inputs) * len(new.outputs) * old.groups / (len(old.inputs) * len(old.outputs) * new.groups)
        assert new.macs == pytest.approx(old.macs * share)


def test_slices_are_plain_data() -> None:
    model = PaddedShortcut().double().eval()
    network = trace(model, torch.randn(2, 3, 4, 4).double())
    sites = channels(network)
    gone = dropped_labels(sites, draw_decisions(sites, 3, 0.4))
    plan = json.loads(json.dumps(compute_slices(network, gone)))
    assert "pad.before" in plan
    loaded = apply_slices(copy.deepcopy(model), plan)
    x = torch.randn(2, 3, 4, 4).double()
    assert torch.equal(loaded(x), remove_channels(model, network, gone)(x))
    assert loaded.pad.before + loaded.pad.after + loaded.stem[0].out_channels == loaded.b[0].out_channels


def test_nothing_dropped_changes_nothing() -> None:
    model = Plain().eval()
    network = trace(model, torch.randn(2, 3, 4, 4))
    assert compute_slices(network, ()) == {}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    remove_channels(model, network, channels(network)[0].labels.tolist()[1:])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "shrink must leave the model alone"


@pytest.mark.parametrize("name", ["resnet20", "vgg7", "lenet5"])
def test_our_models(name: str) -> None:
    torch.manual_seed(0)
    size = 28 if name == "lenet5" else 32
    model, x = models.build(name, 10, 3), torch.randn(2, 3, size, size)
    network = trace(model, x)
    verdict = check_equivalence(randomize(model, x), network, channels(network), x, seed=0)
    assert verdict.difference < 1e-10
    assert verdict.sensitivity > 1e-3
    assert verdict.dropped > 10


def test_nothing_left_is_refused() -> None:
    model = Plain().eval()
    network = trace(model, torch.randn(2, 3, 4, 4))
    with pytest.raises(JpqError, match="Nothing would be left of dim 0"):
        remove_channels(model, network, network.layer("0.0").outputs.tolist())


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(JpqError, match=r"slices '9\.weight'"):
        apply_slices(Plain(), {"9.weight": {0: [0]}})
    with pytest.raises(JpqError, match="keeps index 40"):
        apply_slices(Plain(), {"0.0.weight": {0: [0, 40]}})


def test_shared_modules_stay_shared() -> None:
    model = ZOO["shared"][0]().eval()
    network = trace(model, ZOO["shared"][1])
    sites = channels(network)
    small = remove_channels(model, network, dropped_labels(sites, draw_decisions(sites, 0, 0.5)))
    assert small.again is small.b
