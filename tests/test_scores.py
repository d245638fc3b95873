"""Scores: worked examples, laws over the table, and how a ranking reaches the gates."""

import pytest
import torch
from torch import nn
from zoo import ZOO
from zoo_readers import IMAGE, READERS

import jpq
from jpq.allocators import rank
from jpq.gates import Ranked
from jpq.network.attach import attach
from jpq.network.consumers import per_consumer
from jpq.network.trace import trace
from jpq.quantizers import Fixed
from jpq.scores import FPGM, L1, L2, LAMP, SCORES, Evidence, HRank, SiteView
from jpq.types import JpqError

NOTHING = Evidence()


def view(*rows):
    return SiteView("site", torch.tensor(rows, dtype=torch.float64))


@pytest.mark.parametrize(
    ("norms", "expected"),
    [  # worked by hand; undoing the sort by the sorting permutation itself would give [.22, 1, .10, .43] for the last
        ([1, 1, 1, 1], [1 / 4, 1 / 3, 1 / 2, 1]),
        ([1, 2, 3, 4], [1 / 10, 2 / 9, 3 / 7, 1]),
        ([3, 1, 4, 2], [3 / 7, 1 / 10, 1, 2 / 9]),
    ],
)
def test_lamp(norms, expected):
    assert LAMP()(view(*[[n] for n in norms]), NOTHING)[0].tolist() == pytest.approx(expected)


def test_magnitudes():
    rows = view([3.0, -4.0], [0.0, 1.0], [0.0, 0.0])
    assert L1()(rows, NOTHING)[0].tolist() == [7, 1, 0]
    assert L2()(rows, NOTHING)[0].tolist() == [5, 1, 0]


def test_fpgm_finds_what_lies_amid_the_others():
    assert FPGM()(view([0.0], [1.0], [3.0]), NOTHING)[0].tolist() == [4, 3, 5]
    assert FPGM()(view([5.0], [6.0], [8.0]), NOTHING)[0].tolist() == [4, 3, 5], "not where zero is"


def test_hrank():
    maps = torch.zeros(2, 3, 4, 4)
    maps[:, 0], maps[0, 1], maps[:, 2] = torch.eye(4), torch.ones(4, 4), 0.0
    assert HRank()(view([0.0]), Evidence(maps))[0].tolist() == [4, 0.5, 0]
    with pytest.raises(JpqError, match="activations of 'site'"):
        HRank()(view([0.0]), NOTHING)


@pytest.mark.parametrize("name", SCORES)
def test_every_score_follows_its_units(name):
    """Permuted units get permuted scores (no ties here), one number each."""
    torch.manual_seed(0)
    site, order = view(*torch.rand(6, 5).tolist()), torch.tensor([3, 1, 5, 0, 2, 4])
    maps = torch.zeros(1, 6, 7, 7)
    for i in range(6):
        maps[0, i, : i + 1, : i + 1] = torch.eye(i + 1)
    score = SCORES[name](site, Evidence(maps))
    moved = SCORES[name](SiteView("site", site.weights[order]), Evidence(maps[:, order]))
    assert score.shape == (1, 6)
    assert torch.allclose(score[:, order], moved)
    assert len(score.unique()) == 6


def ranked(make, example, score):
    torch.manual_seed(0)
    model = make().eval()
    network = trace(model, example)
    net = attach(model, network, per_consumer(network), Ranked, lambda _: (Fixed(8), Fixed(8)), [example], "upscale")
    rank(net, SCORES[score], example)
    return net


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", ["joined", "padded", "rows", "zoo_flat", "zoo_attention", "zoo_signal", "zoo_volume"])
def test_ranks_every_kind_of_layer(name, score):
    make, example = ZOO[name[4:]] if name.startswith("zoo_") else (READERS[name], IMAGE)
    net = ranked(make, example, score)
    everywhere = [gate.margins.flatten() for gate in net.gates]
    groups = {}
    for site, margins in zip(net.sites, everywhere, strict=True):
        groups.setdefault(site.taps[0].layer if len(site.taps) == 1 else site.name, []).append(margins)
    pools = [torch.cat(everywhere)] if SCORES[score].everywhere else [torch.cat(g) for g in groups.values()]
    for pool in pools:
        assert torch.allclose(pool.sort().values, torch.arange(1, len(pool) + 1) / len(pool))


def test_a_reader_ranks_its_own_inputs():
    net = ranked(READERS["chain"], IMAGE, "l1")
    for site, gate in zip(net.sites, net.gates, strict=True):
        (tap,) = site.taps
        weight = net.layer(tap.layer).weight.detach()
        sums = tap.structure.pool(weight.abs())[0]
        assert torch.equal(gate.margins[0].argsort(), sums.argsort())
    assert len({tuple(g.margins[0].tolist()) for g in net.gates}) == 3, "each its own"


def test_a_layer_without_a_module_of_its_own_has_no_activations():
    class ByFunction(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return nn.functional.linear(self.a(x).relu(), self.b.weight)

    with pytest.raises(JpqError, match="layer 'b' reads"):
        ranked(ByFunction, torch.randn(2, 4), "hrank")


def test_an_unknown_score():
    with pytest.raises(JpqError, match="Unknown score 'l3'"):
        jpq.compress(READERS["chain"](), IMAGE, method="upscale", bops="50%", score="l3")
