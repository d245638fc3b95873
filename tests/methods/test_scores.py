"""Scores: worked examples, laws over the table, and how a ranking reaches the gates."""

from itertools import product

import pytest
import torch
from thinned import thinned
from torch import nn
from traces import traced
from zoo.readers import IMAGE, READERS

import jpq
from jpq.allocation.ranking.evidence import collect_evidence
from jpq.allocation.ranking.rank import _concatenate, _join_evidence, _select_units, quantiles, rank_units, site_scores
from jpq.compression.attach import attach
from jpq.methods.gates import Ranked
from jpq.methods.quantizers import Fixed
from jpq.methods.scores import FPGM, L1, L2, LAMP, SCORES, Chain, Evidence, HRank, Random, SiteView, pick_score
from jpq.testing import check_score
from jpq.testing.scores import example_evidence, example_site
from jpq.tracing.forward import batch_size, collect_tensors
from jpq.tracing.sites import channels_per_consumer
from jpq.tracing.trace import trace
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
def test_every_score(name):
    """The laws of `jpq.testing`; and six units of different weights and evidence are all told apart."""
    check_score(type(SCORES[name]))
    assert len(SCORES[name](example_site(), example_evidence()).unique()) == 6


def ranked(model, example, score, network=None):
    torch.manual_seed(0)
    model = model.eval()
    network = network or trace(model, example)
    net = attach(
        model, network, channels_per_consumer(network), Ranked, lambda _: (Fixed(8), Fixed(8)), [example], "upscale"
    )
    labels = torch.arange(batch_size(example)) % 2
    rank_units(net, SCORES[score], [(example, labels)] * SCORES[score].batches, loss=spread)
    return net


def spread(out, labels):
    """A loss for outputs of any kind."""
    return sum(t.square().mean() for t in collect_tensors(out) if t.is_floating_point())


NORMED = ("joined", "padded", "rows", "zoo_volume")  # networks whose every channel passes a norm with a scale


RANKED = ["joined", "padded", "rows", "zoo_flat", "zoo_attention", "zoo_signal", "zoo_volume"]
PAIRS = list(product(RANKED, SCORES))


# fast: every second score on each net, and every score on half of the nets
@pytest.mark.parametrize(
    ("name", "score"), thinned(PAIRS, lambda i, pair: (RANKED.index(pair[0]) + [*SCORES].index(pair[1])) % 2 == 0)
)
def test_ranks_every_kind_of_layer(name, score):
    model, example, network = traced(name)
    if "scales" in SCORES[score].needs and name not in NORMED:
        with pytest.raises(JpqError, match="pass no normalisation"):
            ranked(model, example, score, network)
        return
    net = ranked(model, example, score, network)
    everywhere = [gate.margins.flatten() for gate in net.gates]
    groups = {}
    for site, margins in zip(net.sites, everywhere, strict=True):
        groups.setdefault(site.taps[0].layer if len(site.taps) == 1 else site.name, []).append(margins)
    pools = [torch.cat(everywhere)] if SCORES[score].everywhere else [torch.cat(g) for g in groups.values()]
    for pool in pools:
        assert torch.allclose(pool.sort().values, torch.arange(1, len(pool) + 1) / len(pool))


def test_a_reader_ranks_its_own_inputs():
    model, example, network = traced("chain")
    net = ranked(model, example, "l1", network)
    for site, gate in zip(net.sites, net.gates, strict=True):
        (tap,) = site.taps
        weight = net.used_weight(net.network.layer(tap.layer)).detach()
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
        ranked(ByFunction(), torch.randn(2, 4), "hrank")


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_units_maps_are_those_of_all_its_channels_in_every_group(groups):
    """Channels of a unit are alive in one group and dead in another: what is read of it is both."""
    torch.manual_seed(0)
    grouped = nn.Conv2d(8, 8, 1, groups=groups)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), grouped, nn.ReLU(), nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        model[0].weight[:2], model[0].bias[:2] = 0, 0  # of the first group
    x = torch.randn(4, 3, 5, 5)
    network = trace(model.eval(), x)
    net = attach(model, network, channels_per_consumer(network), Ranked, lambda _: (Fixed(8), Fixed(8)), [x], "upscale")
    at = next(i for i, site in enumerate(net.sites) if site.taps[0].layer == "2")
    found = collect_evidence(net, {"activations", "means"}, [(x, None)], 1, spread)[at]
    read = model[:2](x).detach()
    assert net.sites[at].n == 8 // groups
    by_unit = read.reshape(4, groups, 8 // groups, 5, 5).mean((1, 3, 4))
    assert torch.allclose(found.activations.mean((2, 3)), by_unit, atol=0.02)
    assert torch.allclose(found.activations.mean((2, 3)), found.means[0], atol=1e-6)
    ranks = site_scores(net, SCORES["hrank"], [(x, None)])[net.sites[at].name]
    assert (ranks[:2] > 0).all() == (groups > 1)


def test_quantiles_by_hand():
    assert quantiles(torch.tensor([3.0, 1.0, 2.0, 1.0])).tolist() == [1.0, 0.25, 0.75, 0.5]  # the earlier one is lower
    former = torch.tensor([0.7, -0.1, 0.2, -0.3, 0.0])  # three are closed: they keep their order, below all others
    assert torch.allclose(quantiles(torch.tensor([1.0, 9.0, 5.0, 8.0, 7.0]), former), torch.tensor([4, 2, 5, 1, 3]) / 5)


def evidence_of(units, side):
    """Evidence of `units` units, whose maps have this many rows and columns; every entry tells its unit."""
    of = torch.arange(float(units))
    chain = Chain(*(torch.stack([of, -of]).double() + i for i in range(3)))
    maps = of[None, :, None, None].repeat(2, 1, side, side)
    return Evidence(maps, maps.mean((2, 3))[None], torch.arange(2), (maps.mean((2, 3)),), (of,), of.double(), chain)


def test_evidence_of_sites_is_joined_unit_by_unit_and_units_are_selected_everywhere():
    joined = _join_evidence([evidence_of(2, 3), evidence_of(3, 2)])
    units = torch.tensor([0.0, 1.0, 0.0, 1.0, 2.0])
    pick = torch.tensor([False, True, True, False, True])
    for found, of in ((joined, units), (_select_units(joined, pick), units[pick])):
        assert found.activations.shape == (2, len(of), 3, 3)
        assert torch.equal(found.activations[0, :, 0, 0], of)
        assert torch.equal(found.means[0, 1], of)
        assert torch.equal(found.gradients[0][1], of)
        assert torch.equal(found.curvature[0], of)
        assert torch.equal(found.scales, of.double())
        for i, norms in enumerate((found.chain.filter_norms, found.chain.producer_norms, found.chain.consumer_norms)):
            assert torch.equal(norms, torch.stack([of, -of]).double() + i)
        assert found.labels.tolist() == [0, 1]
    assert joined.activations[0, 4, 2].tolist() == [0, 0, 0]  # smaller maps are padded with zeros
    assert joined.activations[0, 4].tolist() == [[2, 2, 0], [2, 2, 0], [0, 0, 0]]


def test_parts_of_other_lengths_are_padded_behind():
    found = _concatenate([torch.ones(1, 2, 1), torch.full((2, 1, 3), 2.0)], 0, 1)
    assert found.tolist() == [[[1, 0, 0], [1, 0, 0]], [[2, 2, 2], [0, 0, 0]], [[2, 2, 2], [0, 0, 0]]]


def test_random_is_the_generators_and_nothing_else():
    draws = [Random()(view(*[[0.0]] * 50), Evidence(generator=torch.Generator().manual_seed(s))) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].shape == (1, 50)
    assert float(draws[0].min()) >= 0


def test_norm_scales_are_those_of_all_norms_that_units_pass():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.first = nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6)
            self.inner, self.last = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            x = self.first(self.stem(x)).relu()
            return self.head((x + self.last(self.inner(x))).mean((2, 3)))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 1, 4, 4)
    for norm in (model.first, model.last):
        norm.weight.data.uniform_(-1, 1)
    net = jpq.compress(model, x, "ranked", bops="1%", score="bn-scale").net
    (found,) = site_scores(net, SCORES["bn-scale"]).values()
    both = (norm.weight.detach().abs().double() for norm in (model.first, model.last))
    assert torch.equal(found, sum(both))


def test_scores_see_the_weights_that_the_forward_pass_uses():
    """At 2 bits a channel whose readers quantize to nothing scores 0, whatever its float weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(8, 4)
    network = trace(model, x)
    with torch.no_grad():
        model[2].weight[:, 2] = torch.tensor([1e-3, -1e-3, 1e-3])
    net = attach(model, network, channels_per_consumer(network), Ranked, lambda _: (Fixed(2), Fixed(8)), [x], "ranked")
    evidence = [(x, torch.arange(8) % 3)]
    (site,) = net.sites
    for name in ("l1", "l2", "taylor", "lookahead"):
        found = site_scores(net, SCORES[name], evidence)[site.name]
        assert float(found[2]) == 0, name
        assert float(found.sum()) > 0


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("l3", ""), "Unknown score 'l3'. Did you mean"),
        (("taylr", ""), "Did you mean taylor"),
        (("l1", "0,1"), "score l1 does not look at classes. Choose score catro"),
        (("catro", "3"), "two classes at least"),
        (("catro", "0,dog"), "by their numbers: classes='0,3,5'"),
        (("catro", "1,1"), "two classes at least"),
    ],
)
def test_bad_names_and_classes(asked, says):
    with pytest.raises(JpqError, match=says):
        pick_score(*asked)


@pytest.mark.parametrize("score", ["taylor", "taylor2", "catro"])
def test_scores_that_need_labels_say_so(score):
    with pytest.raises(JpqError, match=r"evidence=\[\(inputs, classes\)"):
        jpq.compress(READERS["chain"](), IMAGE, method="upscale", bops="50%", score=score)


def test_an_unknown_score():
    with pytest.raises(JpqError, match="Unknown score 'l3'"):
        jpq.compress(READERS["chain"](), IMAGE, method="upscale", bops="50%", score="l3")
