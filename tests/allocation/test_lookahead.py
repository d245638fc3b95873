"""Lookahead scores against the Frobenius change of products of layers, and on graphs with branches."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from jpq.allocation.ranking.neighbour_norms import NeighbourNorms, batchnorm_scales
from jpq.allocation.ranking.rank import rank_units, site_scores
from jpq.compression.attach import attach
from jpq.methods.gates import Ranked
from jpq.methods.quantizers import Fixed
from jpq.methods.scores import SCORES, Chain, Evidence, Lookahead, SiteView
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace
from jpq.types import JpqError


def exact(model, x):
    """Attached, in double precision, with quantizers that change nothing."""
    model = model.eval()
    network = trace(model, x)
    net = attach(model, network, channels(network), Ranked, lambda _: (Fixed(8), Fixed(8)), [x], "ranked").double()
    for layer in network.layers:
        for quantizer in net.quantizers(layer.name):
            quantizer.forward = lambda v, q=quantizer: (v, torch.ones(()), q.zero_point, torch.tensor(8.0))
    return net


def of(net, name, x):
    """Site's first maker -> scores."""
    return dict(
        zip(
            [s.producers[0] for s in net.sites],
            site_scores(net, SCORES[name], [(x.double(), None)]).values(),
            strict=True,
        )
    )


def line(*sizes):
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)))


def test_worked_example():
    """W1 = [[1,0],[0,2]], W2 = [[3,1],[2,1]], W3 = [[1,0],[0,2]]: S = [[9,4],[16,16]], a filter's sum over its row."""
    model, x = line(2, 2, 2, 2), torch.randn(4, 2)
    for layer, weight in zip(model, ([[1, 0], [0, 2]], [[3, 1], [2, 1]], [[1, 0], [0, 2]]), strict=True):
        layer.weight.data = torch.tensor(weight, dtype=torch.float32)
    net = exact(model, x)
    assert of(net, "lookahead", x)["1"].tolist() == [9 + 4, 16 + 16]
    assert of(net, "lfp", x)["1"].tolist() == [(9 + 1) * 1, (4 + 1) * 4]
    assert of(net, "lbp", x)["1"].tolist() == [9 * 1 + 1 * 4, 4 * 1 + 1 * 4]


def test_single_weights_and_filters_against_the_product_of_the_layers():
    """S[k, j] is the squared change for every weight; LAP sums it over a filter; LFP is a filter's own change."""
    torch.manual_seed(0)
    model, x = line(3, 5, 4, 6), torch.randn(4, 3)
    net = exact(model, x)
    w1, w2, w3 = (layer.weight.detach().double() for layer in model)
    squared = torch.zeros(4, 5, dtype=torch.double)
    for k in range(4):
        for j in range(5):
            less = w2.clone()
            less[k, j] = 0
            squared[k, j] = (w3 @ w2 @ w1 - w3 @ less @ w1).square().sum()
    assert torch.allclose(of(net, "lookahead", x)["1"], squared.sum(1), rtol=1e-10)
    filters = [torch.where(torch.arange(4)[:, None] == k, 0.0, w2) for k in range(4)]
    change = torch.stack([(w3 @ w2 - w3 @ less).square().sum() for less in filters])
    assert torch.allclose(of(net, "lfp", x)["1"], change, rtol=1e-10)
    before = torch.stack([(w2 @ w1)[k].square().sum() for k in range(4)])
    assert not torch.allclose(of(net, "lbp", x)["1"], before), "a sum over single weights, not the filter's product"


class Convs(nn.Module):
    def __init__(self, norms=True, kernel=3):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, kernel), nn.Conv2d(4, 5, kernel), nn.Conv2d(5, 3, kernel)
        self.na, self.nb = (nn.BatchNorm2d(n) if norms else nn.Identity() for n in (4, 5))
        self.nc = nn.BatchNorm2d(3) if norms else nn.Identity()

    def forward(self, x):
        return self.nc(self.c(self.nb(self.b(self.na(self.a(x)).relu())).relu())).mean((2, 3))


def normed():
    torch.manual_seed(0)
    model = Convs().eval()
    for norm in (model.na, model.nb, model.nc):
        norm.weight.data.uniform_(0.5, 2)
        norm.running_var.uniform_(0.2, 3)
    return model, torch.randn(2, 2, 9, 9)


def folded(model, names):
    """The same network with some of its norms folded into the layers before them."""
    pairs = {"na": "a", "nb": "b", "nc": "c"}
    other = Convs()
    other.load_state_dict(model.state_dict())
    for name in names:
        norm, layer = getattr(other, name), getattr(other, pairs[name])
        a = norm.weight.data / (norm.running_var + norm.eps).sqrt()
        layer.weight.data *= a[:, None, None, None]
        layer.bias.data = (layer.bias.data - norm.running_mean) * a + norm.bias.data
        setattr(other, name, nn.Identity())
    return other.eval()


def test_norms_on_both_sides_fold_and_the_one_behind_does_not():
    model, x = normed()
    found = of(exact(model, x), "lookahead", x)["b"]
    assert torch.allclose(of(exact(folded(model, ["na", "nb"]), x), "lookahead", x)["b"], found, rtol=1e-4)
    assert not torch.allclose(of(exact(folded(model, ["nc"]), x), "lookahead", x)["b"], found, rtol=1e-2)
    squares = {n: getattr(model, n).weight.detach().double().square() for n in "abc"}
    scale = {
        n: (m.weight**2 / (m.running_var + 1e-10)).detach().double() for n, m in (("a", model.na), ("b", model.nb))
    }
    before = squares["a"].sum((1, 2, 3)) * scale["a"]
    after = squares["c"].sum((0, 2, 3)) * scale["b"]
    by_hand = (squares["b"].sum((2, 3)) * before).sum(1) * after
    assert torch.allclose(found, by_hand, rtol=1e-6), "the norm before scales A, the layer's own scales B"


def test_scales_between_layers_do_not_matter_to_lap_and_do_to_magnitude():
    torch.manual_seed(0)
    model, x = line(3, 5, 4, 6, 5, 2), torch.randn(4, 3)
    names = ("lookahead", "l1")
    first = {name: of(exact(model, x), name, x) for name in names}
    d = torch.tensor([0.25, 4.0, 2.0, 0.5])
    model[1].weight.data *= d[:, None]
    model[2].weight.data /= d
    second = {name: of(exact(model, x), name, x) for name in names}
    assert torch.allclose(first["lookahead"]["1"], second["lookahead"]["1"], rtol=1e-6)
    assert torch.allclose(first["lookahead"]["2"], second["lookahead"]["2"], rtol=1e-6)
    assert not torch.allclose(first["l1"]["1"], second["l1"]["1"], rtol=0.1)
    assert not torch.allclose(first["lookahead"]["0"], second["lookahead"]["0"], rtol=1e-2)


def test_a_flattened_channel_owns_its_features():
    """Two channels of three features: B of channel k sums ITS columns of the linear layer, not every second one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(6, 4, bias=False)).eval()
    x = torch.randn(2, 1, 3)
    net = exact(model, x)
    w, head = (model[i].weight.detach().double() for i in (0, 2))
    blocks = head.square().sum(0).reshape(2, 3).sum(1)
    assert torch.allclose(of(net, "lookahead", x)["0"], w.square().sum((1, 2)) * blocks, rtol=1e-10)
    assert not torch.allclose(blocks, head.square().sum(0).reshape(3, 2).sum(0)), "the fault of the public code shows"


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.last = nn.Linear(3, 4, bias=False), nn.Linear(4, 5), nn.Linear(5, 4, bias=False)
        self.side, self.head = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x):
        y = self.stem(x) + self.side(x)  # two that meet in one sum: no identity leads past either
        return self.head(y + self.last(self.inner(y).relu()))


def test_an_identity_counts_one_and_branches_that_meet_add_up():
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(2, 3)
    net = exact(model, x)
    chains = NeighbourNorms(net, batchnorm_scales(net, x.double()))
    site = next(s for s in net.sites if "last" in s.producers)
    own, reached, after = chains.of(site)
    w = {n: getattr(model, n).weight.detach().double().square() for n in ("stem", "side", "inner", "last", "head")}
    at = {maker: i for i, maker in enumerate(site.producers)}
    assert torch.allclose(after[at["stem"]], w["inner"].sum(0) + 1), "its reader, and the way past it"
    assert torch.allclose(after[at["side"]], w["inner"].sum(0) + 1)
    assert torch.allclose(after[at["last"]], w["head"].sum(0)), "nothing is added behind it"
    assert torch.allclose(reached[at["stem"]], w["stem"].sum(1)), "the input counts one"
    assert torch.allclose(own[at["last"]], w["last"].sum(1))
    hidden = next(s for s in net.sites if s.producers == ("inner",))
    _, reached, after = chains.of(hidden)
    before = w["stem"].sum(1) + w["side"].sum(1)
    assert torch.allclose(reached[0], (w["inner"] * before).sum(1))
    assert torch.allclose(after[0], w["last"].sum(0))


def test_depthwise_and_grouped_layers_count_their_real_connections():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.depth = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4)
            self.b, self.group, self.head = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1, groups=2), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.head(self.group(self.b(self.depth(self.a(x)).relu())))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 2, 5, 5)
    net = exact(model, x)
    chains = NeighbourNorms(net, {})
    w = {n: m.weight.detach().double().square().sum((2, 3)) for n, m in model.named_children()}
    site = next(s for s in net.sites if "a" in s.producers)
    assert site.producers == ("a", "depth")
    _, reached, after = chains.of(site)
    deep = w["depth"].sum(1)
    assert torch.allclose(after[0], deep), "the depthwise layer, and no way past it"
    assert torch.allclose(reached[1], deep * w["a"].sum(1)), "j = k"
    assert torch.allclose(after[1], w["b"].sum(0))
    read = torch.cat([w["group"][:2].sum(0), w["group"][2:].sum(0)])  # inputs 0-2 by the first group, 3-5 by the other
    found = chains.consumed[[layer.name for layer in net.network.layers].index("group")]
    labels = net.network.layer("group").inputs
    wanted = {}
    for c, v in zip(labels.tolist(), read.tolist(), strict=True):
        wanted[c] = wanted.get(c, 0.0) + v
    assert found == pytest.approx(wanted)


def test_a_filter_that_nobody_reads_scores_nothing():
    torch.manual_seed(0)
    model, x = line(3, 5, 4), torch.randn(4, 3)
    model[1].weight.data[:, 2] = 0
    found = of(exact(model, x), "lookahead", x)["0"]
    assert float(found[2]) == 0
    assert float(found.sum()) > 0


def test_equal_neighbours_make_lap_magnitude():
    torch.manual_seed(0)
    model, x = line(3, 5, 4, 6), torch.randn(4, 3)
    for layer, dim in ((model[0], 1), (model[2], 0)):
        layer.weight.data /= layer.weight.data.norm(dim=dim, keepdim=True)
    found = of(exact(model, x), "lookahead", x)["1"]
    assert torch.allclose(found, model[1].weight.detach().double().square().sum(1), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "site", "follows"),
    [("lookahead-forward", "1", True), ("lookahead-backward", "0", True), ("lookahead", "1", False)],
)
def test_one_direction_sees_what_the_other_end_lost(name, site, follows):
    """A planted case: a layer loses the unit that one unit beside it lives on, and the order turns round."""
    model, x = line(2, 3, 2, 2), torch.randn(4, 2)
    model[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    model[1].weight.data = torch.tensor([[3.0, 1.5, 0.0], [0.5, 2.0, 2.4]]).sqrt()  # what it loses: the last column
    model[2].weight.data = torch.eye(2)
    if name == "lookahead-backward":
        model[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        model[1].weight.data = torch.tensor([[3.0, 0.1, 1.0], [0.0, 2.0, 1.0]])
        model[2].weight.data = torch.tensor([[1.0, 0.0], [0.0, 0.1]])
    net = exact(model, x)
    evidence = [(x.double(), None)]
    base = of(net, "lookahead", x)[site]
    rank_units(net, SCORES[name], evidence, share=2 / 3 if site == "1" else 0.5)
    margins = {s.producers[0]: g.margins[0] for s, g in zip(net.sites, net.gates, strict=True)}[site]
    same = torch.equal(margins.argsort(), base.argsort())
    assert same is not follows


def test_without_the_chain_there_is_no_score():
    with pytest.raises(JpqError, match="both sides of 'site'"):
        Lookahead()(SiteView("site", torch.ones(2, 1)), Evidence())


def test_huge_norms_stay_finite():
    big = torch.full((1, 2), 1e60, dtype=torch.float64)
    chain = Chain(big, big * torch.tensor([1.0, 2.0]), big)
    found = SCORES["lookahead"](SiteView("site", torch.ones(2, 1)), Evidence(chain=chain))[0]
    assert bool(found.isfinite().all())
    assert found[1] > found[0]
