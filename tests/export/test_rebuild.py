"""The law: zero weights for dropped channels, or no channels at all, give the same output."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from cuts import cut
from zoo import ZOO, PaddedShortcut, Plain

from jpq.export.float_equivalence import (
    check_equivalence,
    decide,
    dropped,
    masked,
    outputs,
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
    constructor, example = ZOO[name]
    torch.manual_seed(0)
    model = constructor()
    network = trace(model, example)
    randomize(model, example)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sites = channels(network)
    assert sites
    for seed in range(6):
        keep = decide(sites, seed, share=(0.0, 0.2, 0.5, 0.5, 0.8, 0.9)[seed])
        gone = dropped(sites, keep)
        small = remove_channels(model, network, gone)
        with masked(model, network, sites, keep):
            wanted = outputs(model, example)
        assert relative_difference(wanted, outputs(small, example)) < 1e-10
        if gone:
            assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
            assert relative_difference(outputs(model, example), wanted) > 1e-6, "the dropped channels did not matter"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_check_sees_one_wrong_channel() -> None:
    model = ZOO["residual"][0]()
    network = trace(model, ZOO["residual"][1])
    randomize(model, ZOO["residual"][1])
    sites = channels(network)
    keep = decide(sites, 0)
    gone = dropped(sites, keep)
    kept = [int(c) for c in sites[0].labels if int(c) not in gone]
    other = (gone - {min(gone & set(sites[0].labels.tolist()))}) | {kept[0]}
    with masked(model, network, sites, keep):
        wanted = outputs(model, ZOO["residual"][1])
    assert relative_difference(wanted, outputs(remove_channels(model, network, other), ZOO["residual"][1])) > 1e-3


@pytest.mark.parametrize("name", ZOO)
def test_the_shrunk_model_traces_to_the_kept_macs(name: str) -> None:
    network, _, gone, again = cut(name, lambda sites: dropped(sites, decide(sites, seed=1, share=0.5)))
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
    gone = dropped(sites, decide(sites, 3, 0.4))
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
    small = remove_channels(model, network, dropped(sites, decide(sites, 0, 0.5)))
    assert small.again is small.b
