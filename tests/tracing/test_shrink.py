"""Channels that the model's code cannot lose: the search for culprits finds what trying each site alone finds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import IMAGE, Head, conv

from jpq.tracing import shrink
from jpq.tracing.shrink import FIXED_SIZE_REASON, remove_channels
from jpq.tracing.sites import Site, channels
from jpq.tracing.trace import trace


def numbered_sites(n: int) -> list[Site]:
    return [Site(str(k), 1, 4, (), np.arange(4), ()) for k in range(n)]


@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize("culprits", [0, 1, 2, 5, 64])
def test_culprits_are_found_by_halving(n: int, culprits: int) -> None:
    sites = numbered_sites(n)
    guilty = set(np.random.default_rng(n * 100 + culprits).permutation(n)[:culprits].tolist())
    runs = 0

    def passes(tried: Sequence[Site]) -> bool:
        nonlocal runs
        runs += 1
        return not guilty & {int(site.name) for site in tried}

    assert [int(s.name) for s in shrink._passing(passes, sites)] == [k for k in range(n) if k not in guilty]
    k = len(guilty)
    assert runs <= 2 + 2 * k * (1 + np.log2(max(n / max(k, 1), 1))) + k, "about 2 k log(n / k)"


def test_sites_that_pass_alone_but_not_together_all_stay() -> None:
    assert shrink._passing(lambda tried: len(tried) < 3, numbered_sites(8)) == []


class Trained(nn.Sequential):
    """A model whose own `train` must be told the mode."""

    def train(self, mode: bool) -> Trained:
        return super().train(mode)


def test_a_train_method_without_a_default_is_called_with_its_mode() -> None:
    model = Trained(conv(3, 6), Head(6)).eval()
    assert [site.name for site in channels(trace(model, IMAGE))] == ["0.0"]


class Culprits(nn.Module):
    """A chain of convolutions, of which some have widths that the code asserts."""

    def __init__(self, n: int, fixed: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(conv(3 if k == 0 else 6, 6) for k in range(n))
        self.fixed, self.head = set(fixed), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        for k, block in enumerate(self.blocks):
            x = block(x)
            if k in self.fixed:
                assert x.shape[1] == 6
        return self.head(x)


@pytest.mark.parametrize("fixed", [(0,), (3,), (0, 1, 6), (1, 2, 4, 5)])
def test_frozen_sites_are_those_of_the_exhaustive_search(
    fixed: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Culprits(7, fixed)
    network = trace(model, IMAGE)
    monkeypatch.setattr(shrink, "_passing_alone", lambda test, sites: [site for site in sites if test([site])])
    exhaustive = trace(model, IMAGE)
    assert [s.name for s in channels(network)] == [s.name for s in channels(exhaustive)]
    assert len(channels(network)) == 7 - len(fixed)
    for k in fixed:
        labels = network.layer(f"blocks.{k}.0").outputs.tolist()
        assert {network.frozen[c] for c in labels} == {FIXED_SIZE_REASON}


def test_the_check_counts_runs_of_a_deep_network(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    fit = shrink._Trial.shapes_fit

    def counted(self: shrink._Trial, sites: Sequence[Site]) -> bool:
        runs.append(len(sites))
        return fit(self, sites)

    monkeypatch.setattr(shrink._Trial, "shapes_fit", counted)
    network = trace(Culprits(32, [17]), torch.zeros(1, 3, 4, 4))
    assert len(channels(network)) == 31
    assert len(runs) <= 20, "not one run for each of 32 sites"


class Scaled(nn.Module):
    """Two convolutions, and code between them that may compute with their number of channels."""

    def __init__(self, scale: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.scale(F.relu(self.a(x)))).mean((2, 3))


@pytest.mark.parametrize(
    ("scale", "freed"),
    [
        (lambda h: h / h.shape[1], 0),
        (lambda h: h * h.size(1) ** -0.5, 0),
        (lambda h: h.clamp(max=h[0].numel() / 100), 0),
        (lambda h: h * torch.full_like(h, 1 / h.shape[1]), 0),
        (lambda h: h / torch.tensor(h.shape[1]), 0),
        (lambda h: h * torch.as_tensor([h.shape[1] ** -0.5]), 0),
        (lambda h: h / torch.tensor(float(h.size(1))).sqrt(), 0),
        (lambda h: h / h.new_tensor([2.0, h.shape[1]])[1], 0),
        (lambda h: h / torch.arange(1, h.shape[1] + 1)[-1], 0),
        (lambda h: h / torch.tensor(list(range(1, h.shape[1] + 1)))[-1], 0),
        (lambda h: h / torch.ones(h.shape[1]).sum(), 0),
        (lambda h: h * torch.from_numpy(np.array(1 / h.shape[1])).to(h.dtype), 0),
        (lambda h: F.avg_pool2d(h, 2, divisor_override=h.shape[1]), 0),
        (lambda h: h.roll(h.shape[1] // 2, 2) * h, 0),
        (lambda h: h.flatten(2).topk(h.shape[1] // 2)[0].mean(-1)[..., None, None], 0),
        (lambda h: F.scaled_dot_product_attention(h, h, h, scale=h.shape[1] ** -0.5), 0),
        (lambda h: h / 8, 1),  # the number stays
        (lambda h: h / torch.tensor([8.0, float("nan")])[0], 1),
        (lambda h: h / torch.as_tensor(h.new_tensor(h.shape[2])), 1),
        (lambda h: h / h[0, 0].numel(), 1),  # positions
        (lambda h: h.clamp(0, 6) ** 2 + 1e-5, 1),
        (lambda h: torch.arange(h.shape[1]).sum() * 0 + h, 1),
        (lambda h: h.roll(2, 2) / torch.ones(h.shape[2]).sum(), 1),
        (lambda h: h * 2 if h.shape[1] > 3 else h, 0),
        (lambda h: h if h.shape[1] > 3 else h.neg().neg(), 1),
    ],
)
def test_channels_whose_number_the_code_computes_with_stay(scale: Callable[[Tensor], Tensor], freed: int) -> None:
    network = trace(Scaled(scale), IMAGE)
    assert len(channels(network)) == freed
    if not freed:
        assert {network.frozen[c] for c in network.layer("a").outputs.tolist()} == {FIXED_SIZE_REASON}


class Averaged(nn.Module):
    """Convolutions of 12 and 8 channels: a third fewer of the first are as many as the second has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x / x.shape[1])
        return self.c(x / x.shape[1]).mean((2, 3))


def test_a_number_of_channels_that_another_layer_has_too_is_noticed() -> None:
    assert not channels(trace(Averaged(), IMAGE))


def test_channels_are_removed_from_a_model_that_holds_a_computed_weight() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    model.append(nn.utils.weight_norm(nn.Conv2d(2, 2, 1))).eval()  # its weight has a gradient's history
    network = trace(model, IMAGE)
    small = remove_channels(model, network, channels(network)[0].labels[:3].tolist())
    assert small(IMAGE).shape == model(IMAGE).shape


def test_norms_without_parameters_know_how_many_channels_are_left() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 6, 6)
    network = trace(model, x)
    small = remove_channels(model, network, channels(network)[0].labels[:3].tolist())
    assert small[1].num_features == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of another number of channels than the norm has
        assert small(x).shape == (2, 4, 6, 6)
