"""--channel-multiple: what stays comes in multiples, the budget still holds, and small models compute the same."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from gated import check_no_step_fits, scatter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import jpq
from jpq.compression import discretize, feasibility
from jpq.compression.attach import attach
from jpq.compression.channel_counts import allowed_counts, channel_multiple, nearest_count
from jpq.compression.ladders import Ladders
from jpq.compression.soft_decisions import NATS, soft_decisions
from jpq.config import Budget, Config, Decide, Run, Task, Train
from jpq.costs.target import FULL_USE, all_met, parse_targets, used_share
from jpq.methods.gates import VIB
from jpq.methods.quantizers import Fixed, Learned
from jpq.methods.table import METHODS, method_row
from jpq.tasks.models import build
from jpq.tracing.decompose import decompose
from jpq.tracing.network import Network
from jpq.tracing.sites import channels, masks
from jpq.tracing.trace import trace
from jpq.types import JpqError


class Traced(NamedTuple):
    """A float model, an example of its input, and its network."""

    model: nn.Module
    example: torch.Tensor
    network: Network


@cache
def resnet8():
    """The ResNet8 on images of 32 x 32, built and traced once: tests must not change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        example, model = torch.randn(2, 3, 32, 32), build("resnet8", 10, 3)
        return Traced(model, example, trace(model, example))


@cache
def sites():
    """The channel sites of the ResNet8."""
    return channels(resnet8().network)


MULTIPLES = (1, 4, 5, 8)


@cache
def net(multiple):
    """The ResNet8 with gates and learned widths, landing on multiples; tests set its decisions."""
    widths = lambda x: (Learned(4, 2, 8), Fixed(8) if x.reads_input else Learned(4, 2, 8))  # noqa: E731
    return attach(
        resnet8().model, resnet8().network, sites(), VIB, widths, [resnet8().example], "djpq", channel_multiple=multiple
    )


def may_stay(site, multiple):
    return {k for k in range(1, site.n + 1) if k % multiple == 0 or k == site.n}


@given(seed=st.integers(0, 10**6), share=st.floats(0.003, 0.06), multiple=st.sampled_from(MULTIPLES))
@settings(max_examples=40, deadline=None)
def test_landing_keeps_multiples_and_the_budget(seed, share, multiple):
    network = net(multiple)
    scatter(network, seed)
    targets = parse_targets({"bops": f"{100 * share:.4f}%"}, network.exact_usage())
    plan = discretize.discretize(network, targets)
    assert all_met(targets, network.exact_usage(plan))
    for site in sites():
        assert sum(plan.kept[site.name]) in may_stay(site, multiple)
    check_no_step_fits(network, targets, plan)


@pytest.mark.parametrize("multiple", MULTIPLES)
def test_uses_97_percent_with_multiples_too(multiple):
    for seed, text in ((0, "4%"), (1, "2%"), (2, "1%")):
        scatter(net(multiple), seed)
        targets = parse_targets({"bops": text}, net(multiple).exact_usage())
        plan = discretize.discretize(net(multiple), targets)
        assert FULL_USE <= used_share(targets[0], net(multiple).exact_usage(plan)) <= 1


@given(seed=st.integers(0, 10**6), shift=st.floats(-6, 6))
@settings(max_examples=30, deadline=None)
def test_a_larger_shift_closes_nothing_and_the_best_stay(seed, shift):
    network = net(8)
    scatter(network, seed)
    soft = soft_decisions(network)
    less, more = soft.plan_at(shift), soft.plan_at(shift + 0.5)
    for site, margins in soft.margins.items():
        assert all(b or not a for a, b in zip(less.kept[site], more.kept[site], strict=True))
        kept = [m for m, k in zip(margins, less.kept[site], strict=True) if k]
        gone = [m for m, k in zip(margins, less.kept[site], strict=True) if not k]
        assert not gone or min(kept) >= max(gone)


@given(seed=st.integers(0, 10**6), multiple=st.sampled_from([1, 4, 8]))
@settings(max_examples=20, deadline=None)
def test_single_steps_stand_where_rounding_takes_them(seed, multiple):
    """A step's shift is the turning point: just above it that decision is taken, just below it is not."""
    network = net(multiple)
    scatter(network, seed)
    soft = soft_decisions(network)
    for ladder in Ladders(soft, NATS).all:
        if ladder.site:
            for larger, shift in zip(ladder.values[1:], ladder.shifts, strict=True):
                assert sum(soft.plan_at(shift + 1e-6).kept[ladder.site]) >= larger
                assert sum(soft.plan_at(shift - 1e-6).kept[ladder.site]) < larger


@given(counts=st.sets(st.integers(1, 60), min_size=1), above=st.integers(0, 80))
def test_rounds_to_the_nearest_count_and_up_from_the_middle(counts, above):
    found = nearest_count(sorted(counts), above)
    assert found in counts
    assert not any(abs(c - above) < abs(found - above) for c in counts)
    assert not any(abs(c - above) == abs(found - above) and c > found for c in counts)


def test_without_a_multiple_any_number_may_stay():
    assert all(net(1).counts(site) == tuple(range(1, site.n + 1)) for site in sites())


def test_sites_of_another_size_may_also_keep_all():
    wide = next(site for site in sites() if site.n == 16)
    assert allowed_counts(resnet8().network, wide, 5) == (5, 10, 15, 16)
    assert allowed_counts(resnet8().network, wide, 16) == allowed_counts(resnet8().network, wide, 64) == (16,)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.out = nn.Linear(24, 10)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_a_unit_of_several_channels_counts_as_so_many():
    """Four heads of six channels: two heads are twelve channels, a multiple of 4 and of 6 but not of 8."""
    network = trace(decompose(Heads()), torch.randn(2, 5, 24))
    heads = next(site for site in channels(network) if site.n == 4)
    assert allowed_counts(network, heads, 6) == (1, 2, 3, 4)
    assert allowed_counts(network, heads, 4) == (2, 4)
    assert allowed_counts(network, heads, 8) == (4,)


@pytest.mark.parametrize("method", ["djpq", "l0", "ranked", "two-stage"])
def test_rebuilt_layers_are_as_wide_as_asked_and_compute_the_same(method):
    torch.manual_seed(1)
    model = build("resnet8", 10, 3).eval()
    joint = jpq.compress(
        model,
        resnet8().example,
        method=method,
        bops="2%",
        density=0.4,
        channel_multiple=8,
        w_bits=(8, 8),
        a_bits=(8, 8),
        steps=4,
    )
    joint.discretize()
    small = joint.finalize()
    joint.net.eval()
    with torch.no_grad():
        assert torch.allclose(
            small.double()(resnet8().example.double()), joint.net.double()(resnet8().example.double()), atol=1e-9
        )
    made, full = ([m.out_channels for m in n.modules() if isinstance(m, nn.Conv2d)] for n in (small, model))
    assert all(n % 8 == 0 for n in made)
    assert made != full
    assert joint.share() <= 0.02


def test_a_run_lands_on_multiples(tmp_path):
    config = Config(
        task=Task(limit=200),
        budget=Budget(target_bops="0.6%"),
        decide=Decide(channel_multiple=16, w_bits=(4, 8)),
        train=Train(epochs=2, float_epochs=1),
        run=Run(out=tmp_path, threads=1),
    )
    result = jpq.optimize(config, final=False)
    assert result.targets["bops"]["used"] <= 1
    assert [x.outputs for x in result.layers][:-1] != [x.outputs_all for x in result.layers][:-1]
    assert all(x.outputs % 16 == 0 for x in result.layers[:-1])
    assert Config().hash() == Config(decide=Decide(channel_multiple=None)).hash()


def test_decisions_by_hand_are_rounded_too(tmp_path):
    config = Config(
        task=Task(limit=200),
        decide=Decide(densities="0.3", bits="4/4", channel_multiple=8),
        train=Train(epochs=2, float_epochs=1),
        run=Run(out=tmp_path, threads=1),
    )
    assert [x.outputs for x in jpq.optimize(config, final=False).layers] == [
        8,
        16,
        16,
        10,
    ]  # 0.3 x 32 = 9.6, 0.3 x 64 = 19.2


@pytest.mark.parametrize(
    ("method", "asked", "words"),
    [
        ("djpq", 0, "channel_multiple=0 is outside 1 to 256"),
        ("djpq", 257, "channel_multiple=257 is outside 1 to 256"),
        ("uniform", 8, "method uniform prunes nothing. Choose method djpq"),
        ("upscale", 8, "method upscale keeps channels for each reader on its own"),
        ("pdp", 8, "masks weights inside layers (elementwise)"),
    ],
)
def test_bad_input_gets_one_sentence(method, asked, words):
    with pytest.raises(JpqError) as error:
        channel_multiple(method, method_row(method), asked)
    assert words in str(error.value)


def test_methods_that_are_told_how_many_channels_stay_refuse():
    told = jpq.methods.compatibility.compose_method("spp", "channels")
    with pytest.raises(JpqError, match="is told how many channels stay"):
        channel_multiple("spp", told, 8)
    fine = [name for name, m in METHODS.items() if m.gate and m.structure == "channels" and name != "upscale"]
    assert all(channel_multiple(name, METHODS[name], 8) == 8 for name in fine)
    assert channel_multiple("uniform", METHODS["uniform"], None) == 1


def test_impossible_targets_name_the_fewest_channels():
    targets = parse_targets({"bops": "0.05%"}, net(8).exact_usage())
    feasibility.check_reachable(net(1), targets)
    with pytest.raises(JpqError, match=r"8 channels, or all, at each site.*lower channel_multiple"):
        feasibility.check_reachable(net(8), targets)
    assert not masks(resnet8().network, "elementwise")[0].labels.size
