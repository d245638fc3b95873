"""The law: zero weights for dropped channels, or no channels at all, give the same output."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from zoo import ZOO, PaddedShortcut, Plain

from jpq import models
from jpq.exporters.rebuild import apply_slices, shrink, slices
from jpq.network.record import Network
from jpq.network.sites import Site, channels
from jpq.network.trace import trace
from jpq.network.unpack import unpacked
from jpq.types import JpqError


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Float64, with batch statistics and scales that no channel could hide behind; zero-initialised weights filled."""
    g = torch.Generator().manual_seed(seed)
    for p in model.double().parameters():
        with torch.no_grad():
            if p.dim() < 2 or not p.any():
                p.copy_(torch.rand(p.shape, generator=g, dtype=p.dtype) + 0.5)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            assert m.running_mean is not None
            assert m.running_var is not None
            m.running_mean.copy_(torch.randn(m.num_features, generator=g))
            m.running_var.copy_(torch.rand(m.num_features, generator=g) + 0.5)
    return model.eval()


def decide(sites: tuple[Site, ...], seed: int, share: float = 0.6) -> dict[str, Tensor]:
    """Random keep masks, [1, n] each, with at least one unit kept."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for site in sites:
        keep = torch.rand(1, site.n, generator=g) < share
        keep[0, torch.randint(site.n, (1,), generator=g)] = True
        out[site.name] = keep.double()
    return out


def masked(model: nn.Module, network: Network, sites: tuple[Site, ...], keep: dict[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for site in sites:
            for tap in site.taps:
                weight = model.get_parameter(network.layer(tap.layer).weight)
                weight.mul_(tap.structure.expand(keep[site.name], weight.shape))
    return model


def dropped(sites: tuple[Site, ...], keep: dict[str, Tensor]) -> set[int]:
    return {int(c) for s in sites for c, k in zip(s.labels, keep[s.name][0], strict=True) if not k}


@torch.no_grad()
def run(model: nn.Module, example: Any) -> list[Tensor]:
    example = tree_map(lambda v: v.double() if v.is_floating_point() else v, example)
    if isinstance(example, dict):
        return tree_flatten(model(**example))[0]
    return tree_flatten(model(*(example if isinstance(example, tuple) else (example,))))[0]


def worst(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest relative difference over all outputs; shapes must agree."""
    assert [x.shape for x in a] == [x.shape for x in b]
    return max(float((x - y).norm() / x.norm()) for x, y in zip(a, b, strict=True))


def law(model: nn.Module, example: Any, seed: int, share: float = 0.6) -> tuple[float, int]:
    """(relative difference between masked and shrunk, units dropped)."""
    network = trace(model, example)
    sites = channels(network)
    keep = decide(sites, seed, share)
    small = shrink(model, network, dropped(sites, keep))
    return worst(run(masked(model, network, sites, keep), example), run(small, example)), len(dropped(sites, keep))


@pytest.mark.parametrize("name", ZOO)
def test_masked_is_shrunk(name: str) -> None:
    constructor, example = ZOO[name]
    torch.manual_seed(0)
    model = randomised(constructor())
    example = tree_map(lambda v: v.double() if v.is_floating_point() else v, example)
    network = trace(model, example)
    sites = channels(network)
    assert sites
    for seed in range(6):
        keep = decide(sites, seed, share=(0.0, 0.2, 0.5, 0.5, 0.8, 0.9)[seed])
        gone = dropped(sites, keep)
        small = shrink(model, network, gone)
        assert worst(run(masked(model, network, sites, keep), example), run(small, example)) < 1e-10
        if gone:
            assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
            assert worst(run(model, example), run(small, example)) > 1e-6, "the dropped channels did not matter"


@pytest.mark.parametrize("name", ZOO)
def test_the_shrunk_model_traces_to_the_kept_macs(name: str) -> None:
    constructor, example = ZOO[name]
    model = constructor().eval()
    network = trace(model, example)
    sites = channels(network)
    gone = dropped(sites, decide(sites, seed=1, share=0.5))
    again = trace(shrink(model, network, gone), example)
    assert [layer.name for layer in again.layers] == [layer.name for layer in network.layers]
    for old, new in zip(network.layers, again.layers, strict=True):
        assert len(new.inputs) == sum(int(c) not in gone for c in old.inputs)
        assert len(new.outputs) == sum(int(c) not in gone for c in old.outputs)
        share = len(new.inputs) * len(new.outputs) * old.groups / (len(old.inputs) * len(old.outputs) * new.groups)
        assert new.macs == pytest.approx(old.macs * share)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2_x0_5", "googlenet"])
def test_torchvision(name: str) -> None:
    torch.manual_seed(0)
    model, example = torchvision_model(name, 64)
    error, count = law(model, example, seed=0)
    assert error < 1e-9
    assert count > 500


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_all_of_torchvision(name: str) -> None:
    torch.manual_seed(0)
    model, example = torchvision_model(name, 224 if "vit" in name else 128)
    error, count = law(unpacked(model), example, seed=0, share=0.75)
    assert error < 1e-9
    assert count > 0


def torchvision_model(name: str, size: int) -> tuple[nn.Module, Tensor]:
    kw: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        kw = {"aux_logits": False, "init_weights": False}
    if name in ("vit_h_14", "vit_l_16", "vit_l_32", "vit_b_16", "vit_b_32"):
        kw = {"image_size": size}
    model = torchvision.models.get_model(name, weights=None, **kw)
    return randomised(model), torch.randn(2, 3, size, size, dtype=torch.double)


def test_slices_are_plain_data() -> None:
    model = randomised(PaddedShortcut())
    network = trace(model, torch.randn(2, 3, 4, 4).double())
    sites = channels(network)
    gone = dropped(sites, decide(sites, 3, 0.4))
    plan = json.loads(json.dumps(slices(network, gone)))
    assert "pad.before" in plan
    loaded = apply_slices(copy.deepcopy(model), plan)
    x = torch.randn(2, 3, 4, 4).double()
    assert torch.equal(loaded(x), shrink(model, network, gone)(x))
    assert loaded.pad.before + loaded.pad.after + loaded.stem[0].out_channels == loaded.b[0].out_channels


def test_nothing_dropped_changes_nothing() -> None:
    model = Plain().eval()
    network = trace(model, torch.randn(2, 3, 4, 4))
    assert slices(network, ()) == {}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    shrink(model, network, channels(network)[0].labels.tolist()[1:])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "shrink must leave the model alone"


@pytest.mark.parametrize("name", ["resnet20", "vgg7", "lenet5"])
def test_our_models(name: str) -> None:
    torch.manual_seed(0)
    size = 28 if name == "lenet5" else 32
    model = randomised(models.build(name, 10, 3))
    error, count = law(model, torch.randn(2, 3, size, size, dtype=torch.double), seed=0)
    assert error < 1e-10
    assert count > 10


def test_nothing_left_is_refused() -> None:
    model = Plain().eval()
    network = trace(model, torch.randn(2, 3, 4, 4))
    with pytest.raises(JpqError, match="Nothing would be left of dim 0"):
        shrink(model, network, network.layer("0.0").outputs.tolist())


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(JpqError, match=r"slices '9\.weight'"):
        apply_slices(Plain(), {"9.weight": {0: [0]}})
    with pytest.raises(JpqError, match="keeps index 40"):
        apply_slices(Plain(), {"0.0.weight": {0: [0, 40]}})


def test_shared_modules_stay_shared() -> None:
    model = ZOO["shared"][0]().eval()
    network = trace(model, ZOO["shared"][1])
    sites = channels(network)
    small = shrink(model, network, dropped(sites, decide(sites, 0, 0.5)))
    assert small.again is small.b
