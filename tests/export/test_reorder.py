"""The law of unconstrained pruning: zeros for what a reader does not keep, or no such channels: the same output."""

import copy
import json

import numpy as np
import pytest
import torch
from thinned import thinned
from torch import nn
from torch.utils._pytree import tree_map
from traces import NETS, traced
from zoo import conv
from zoo.readers import IMAGE, Body

from jpq.export.float_equivalence import (
    draw_decisions,
    float64_outputs,
    masked_weights,
    randomize,
    relative_difference,
)
from jpq.export.unconstrained.channel_blocks import Blocks, find_blocks
from jpq.export.unconstrained.reorder import choose_layout, export_unconstrained
from jpq.export.unconstrained.select import Select, count_copies, insert_selects
from jpq.tasks import zoo
from jpq.tracing.shrink import apply_slices, compute_slices
from jpq.tracing.sites import channels, channels_per_consumer, dropped_classes
from jpq.tracing.trace import trace
from jpq.types import JpqError


def prepared(name):
    model, example, network = traced(name)
    return randomize(model, example), example, network


def decisions(sites, seed, share):
    keep = draw_decisions(sites, seed, share)
    return keep, {name: keep[name][0].bool().tolist() for name in keep}


def spent(model, example):
    return count_copies(model, tree_map(lambda v: v.double() if v.is_floating_point() else v, example))


# fast: the nets of zoo.readers, and of the zoo every second; others in test_unconstrained and test_rebuild
@pytest.mark.parametrize("name", thinned(sorted(NETS), lambda i, name: i % 2 == 1 or not name.startswith("zoo_")))
def test_masked_is_exported(name):
    model, example, network = prepared(name)
    sites = channels_per_consumer(network)
    for seed, share in enumerate((0.2, 0.5, 0.6, 0.7, 0.9)):
        keep, kept = decisions(sites, seed, share)
        with masked_weights(model, network, sites, keep):
            want = float64_outputs(model, example)
        small = export_unconstrained(model, network, sites, kept)
        naive = export_unconstrained(model, network, sites, kept, reorder=False, gather=True)
        assert relative_difference(want, float64_outputs(small, example)) <= 1e-12
        assert relative_difference(want, float64_outputs(naive, example)) <= 1e-12
        here, there = spent(small, example), spent(naive, example)
        assert here.channels == choose_layout(network, sites, kept).copied <= there.channels
        assert here.views + here.gathers == there.gathers
        assert there.views == 0
        assert here.size_bytes <= there.size_bytes


@pytest.mark.parametrize("name", NETS)
def test_any_order_within_blocks_is_the_same_model(name):
    model, example, network = prepared(name)
    held = find_blocks(network)
    want = float64_outputs(model, example)
    for seed in range(3):
        rank, rng = held.natural_rank(), np.random.default_rng(seed)
        for members in held.members:
            n = len(members)
            rank[list(members)] = rng.permutation(n) if seed else np.arange(n)[::-1]
        moved = compute_slices(network, (), lambda labels, rank=rank: held.places(labels, rank))
        assert moved or seed or not held.members
        assert relative_difference(want, float64_outputs(apply_slices(copy.deepcopy(model), moved), example)) <= 1e-12


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("chain", [12]),
        ("depthwise", [9]),
        ("multiplier", [5]),
        ("joined", [6, 5]),
        ("flipped", [8]),
        ("palindrome", [4]),
        ("halves", [6]),
        ("rows", [4]),
        ("pixels", [6]),
        ("unpixels", [5]),
        ("padded", [5, 2, 2]),
        ("again", [8]),
    ],
)
def test_what_may_change_places(name, sizes):
    assert sorted(map(len, find_blocks(prepared(name)[2]).members), reverse=True) == sorted(sizes, reverse=True)


def test_blocks_are_whole_wherever_they_appear():
    """A class that some sequence puts elsewhere keeps its place."""
    found = Blocks(((1, 2, 3),), {1: (0, 0), 2: (0, 1), 3: (0, 2)})
    assert list(found.runs(np.array([-1, 1, 1, 2, 2, 3, 3, 9, 3, 2, 1]))) == [
        (0, 1, -1),
        (1, 6, 0),
        (7, 1, -1),
        (8, 3, 0),
    ]
    rank = np.array([0, 2, 0, 1])
    assert found.places(np.array([1, 1, 2, 2, 3, 3]), rank).tolist() == [2, 3, 4, 5, 0, 1]
    assert found.places(np.array([3, 2, 1]), rank).tolist() == [2, 0, 1], "backward: the mirror image"

    class Cut(Body):  # an op whose labels no rule keeps in order
        def made(self, x):
            x = self.body(x)
            return x[:, torch.tensor([3, 1, 0, 2, 7, 4, 6, 5])]

    assert find_blocks(trace(Cut(conv(3, 8), 8), IMAGE)).members == ()


@pytest.mark.parametrize("name", ["two", "zoo_pre_activation", "zoo_two_outputs", "zoo_tokens"])
def test_two_readers_take_views(name):
    model, example, network = prepared(name)
    sites = channels_per_consumer(network)
    views = 0
    for seed in range(20):
        _, kept = decisions(sites, seed, 0.5)
        found = spent(export_unconstrained(model, network, sites, kept), example)
        assert found.channels == found.gathers == found.runs == found.size_bytes == 0
        views += found.views
    assert views > 10


def test_readers_of_a_concat_that_take_its_ends():
    """One reads the end of the first block with the whole second; another the start of the first block alone."""
    model, example, network = prepared("joined")
    sites = {s.name: s for s in channels_per_consumer(network)}
    kept = {name: [True] * s.n for name, s in sites.items()}
    kept["a.0 for readers.0"] = [True, False, True, False, False, True]
    kept["a.0 for b.0"] = [False, True, False, True, False, False]
    small = export_unconstrained(model, network, tuple(sites.values()), kept)
    assert spent(small, example).gathers == 0
    assert spent(export_unconstrained(model, network, tuple(sites.values()), kept, reorder=False), example).gathers == 2


@pytest.mark.parametrize("name", ["added", "joined", "zoo_residual", "zoo_concat", "zoo_padded_shortcut"])
def test_coupled_sites_need_no_selection(name):
    model, example, network = prepared(name)
    sites = channels(network)
    _, kept = decisions(sites, 0, 0.5)
    found = choose_layout(network, sites, kept)
    assert not found.selects
    assert found.slices == compute_slices(network, dropped_classes(sites, kept)), "the natural order"
    assert spent(export_unconstrained(model, network, sites, kept), example).to_dict() == dict.fromkeys(
        ("views", "gathers", "runs", "channels", "size_bytes"), 0
    )


@pytest.mark.parametrize("name", ["chain", "added", "joined", "flipped"])
def test_no_channel_goes_that_somebody_keeps(name):
    _, _, network = prepared(name)
    sites = channels_per_consumer(network)
    for seed in range(5):
        _, kept = decisions(sites, seed, 0.3)
        gone = dropped_classes(sites, kept)
        wanted = {int(c) for s in sites for c, k in zip(s.labels, kept[s.name], strict=True) if k}
        assert not gone & wanted
        assert gone | wanted == {int(c) for s in sites for c in s.labels}


def test_the_layout_is_plain_data_and_stable():
    model, example, network = prepared("added")
    sites = channels_per_consumer(network)
    _, kept = decisions(sites, 3, 0.5)
    found = choose_layout(network, sites, kept)
    assert choose_layout(network, sites, kept) == found
    assert any(index != sorted(index) for dims in found.slices.values() for index in dims.values())
    cut, selects = json.loads(json.dumps([found.slices, found.selects]))
    again = insert_selects(apply_slices(copy.deepcopy(model), cut), selects)
    small = export_unconstrained(model, network, sites, kept)
    assert relative_difference(float64_outputs(again, example), float64_outputs(small, example)) == 0
    assert str(again) == str(small)
    assert choose_layout(network, sites, {name: [True] * len(k) for name, k in kept.items()}) == type(found)({}, {}, 0)


def test_a_reader_that_no_selection_can_precede_stays_coupled():
    class ByFunction(Body):
        def forward(self, x):
            x = self.body(x)
            return nn.functional.conv2d(x, self.readers[0].weight), self.readers[1](x)

    network = trace(ByFunction(conv(3, 8), 8), IMAGE)
    assert [layer.name for layer in network.layers if not layer.wrappable] == ["readers.0"]
    assert [(s.name, len(s.taps)) for s in channels_per_consumer(network)] == [("body.0", 2)]


def test_selections():
    x = torch.arange(24.0).reshape(1, 6, 2, 2)
    view, gather = Select([2, 3, 4], -3), Select([0, 3, 4], -3)
    assert view(x).data_ptr() == x[:, 2].data_ptr(), "a view"
    assert torch.equal(gather(x), x[:, [0, 3, 4]])
    assert (view.index, gather.runs) == (None, 2)
    assert Select([2, 3, 4], -3, always_gather=True).index is not None
    assert not list(gather.state_dict()), "the plan holds the index"
    with pytest.raises(JpqError, match=r"selects 1 inputs for layer '7'"):
        insert_selects(nn.Sequential(nn.Linear(2, 2)), {"7": [0]})


def test_nothing_left_is_refused():
    _, _, network = prepared("two")
    sites = channels_per_consumer(network)
    kept = {s.name: [s is sites[0]] * s.n for s in sites}
    with pytest.raises(JpqError, match=r"Layer 'readers\.1' would read nothing"):
        choose_layout(network, sites, kept)


LATER = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "densenet121", "googlenet", "mobilenet_v2")
]


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", *LATER])  # zoo and readers have every topology
def test_torchvision(name):
    torch.manual_seed(0)
    model, example = zoo.build_torchvision(name, 10), torch.randn(2, 3, 64, 64)
    network = trace(model, example)
    randomize(model, example)
    sites = channels_per_consumer(network)
    keep, kept = decisions(sites, 0, 0.6)
    small = export_unconstrained(model, network, sites, kept)
    with masked_weights(model, network, sites, keep):
        assert relative_difference(float64_outputs(model, example), float64_outputs(small, example)) <= 1e-9
    naive = choose_layout(network, sites, kept, reorder=False)
    assert spent(small, example).channels < naive.copied
