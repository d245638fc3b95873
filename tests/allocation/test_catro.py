"""CATRO: the trace ratio's optimum against brute force, what it must keep, and what public code gets wrong."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jpq
from jpq.allocation.ranking.rank import rank_units
from jpq.compression.attach import attach
from jpq.methods.gates import Ranked
from jpq.methods.quantizers import Fixed
from jpq.methods.scores import Catro, Evidence, SiteView, pick_score
from jpq.methods.scores.catro import best_set, scatters
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace
from jpq.types import JpqError


def chosen(between, within, d):
    gain, _ = best_set(torch.tensor(between).double(), torch.tensor(within).double(), d)
    return set(gain.argsort(descending=True, stable=True)[:d].tolist())


@pytest.mark.parametrize(
    ("between", "within", "d", "best", "path"),
    [
        ((9.0, 1.0, 4.0, 4.0), (9.0, 0.2, 1.0, 2.0), 2, {1, 2}, [0, 1.3, 8 / 3, 5 / 1.2]),
        ((100.0, 20.0, 0.1), (10.0, 10.0, 0.1), 2, {0, 2}, [0, 6, 100.1 / 10.1]),  # not the two best by b / w
    ],
)
def test_worked_examples(between, within, d, best, path):
    assert chosen(between, within, d) == best
    found = best_set(torch.tensor(between).double(), torch.tensor(within).double(), d)[1]
    assert found == pytest.approx([*path, *path[-1:] * (len(found) - len(path))])


@given(st.integers(2, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_brute_force_over_all_sets(n, data):
    """The optimum for every d; the ratio never falls on the way and few rounds are enough."""
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    b, w = torch.rand(n, dtype=torch.double) * 5, torch.rand(n, dtype=torch.double) + 1e-3
    for d in range(1, n + 1):
        gain, path = best_set(b, w, d)
        own = gain.argsort(descending=True, stable=True)[:d]
        ratio = float(b[own].sum() / w[own].sum())
        every = [list(some) for some in combinations(range(n), d)]
        assert ratio == pytest.approx(max(float(b[s].sum() / w[s].sum()) for s in every))
        assert all(late >= early - 1e-12 for early, late in pairwise(path))
        assert len(path) <= 20


def planted(seed=0):
    """Unit 0 tells classes 0 and 1 from 2, unit 1 tells 0 from 1, unit 2 is noise, unit 3 is dead."""
    torch.manual_seed(seed)
    labels = torch.arange(60) % 3
    noise = 0.1 * torch.randn(60, 4, dtype=torch.double)
    x = torch.stack([(labels == 2).double() * 3, (labels == 1).double(), torch.randn(60).double(), labels * 0.0], 1)
    x = x + noise
    x[:, 3] = 0.0
    return x, labels


def score(x, labels, stay, classes=()):
    site = SiteView("site", torch.ones(x.shape[1], 1), kept_count=stay)
    return Catro(classes)(site, Evidence(means=x[None], labels=labels))[0]


def test_between_and_within_make_the_total_scatter():
    x, labels = planted()
    between, within = scatters(x, labels)
    assert torch.allclose(between + within, (x - x.mean(0)).square().sum(0))


def test_what_separates_stays_longest_then_noise_then_what_is_dead():
    x, labels = planted()
    assert score(x, labels, 2).argsort(descending=True).tolist()[:2] in ([0, 1], [1, 0])
    assert score(x, labels, 3).argsort(descending=True).tolist()[2:] == [2, 3]
    assert score(x, labels, 3)[3] == -torch.inf


def test_a_dead_unit_does_not_beat_a_live_one():
    """The plain rule would end at {0, 2}: b - r w of the dead one is 0, above the weak one's negative gain."""
    assert chosen((10.0, 1.0, 0.0), (2.0, 3.0, 1e-9), 2) == {0, 2}
    labels = torch.tensor([0, 0, 1, 1])
    x = torch.tensor([[0.0, 1, 0], [0.1, -1, 0], [1.0, 1.1, 0], [1.1, -0.9, 0]], dtype=torch.double)
    found = score(x, labels, 2)
    assert found.argsort(descending=True).tolist() == [0, 1, 2]


def test_constants_order_and_scale_do_not_matter():
    x, labels = planted()
    found = score(x, labels, 2).argsort(descending=True)
    order = torch.randperm(len(x))
    for same, y in ((x + torch.tensor([5.0, -1, 2, 0]), labels), (x[order], labels[order]), (7 * x, labels)):
        assert torch.equal(score(same, y, 2).argsort(descending=True), found)


def test_only_the_classes_that_are_named_count():
    x, labels = planted()
    assert int(score(x, labels, 1).argmax()) == 0
    assert int(score(x, labels, 1, classes=(0, 1)).argmax()) == 1, "unit 0 tells neither of them apart"
    assert pick_score("catro", "1,0").classes == (0, 1)


def test_readers_of_one_unit_add_up():
    x, labels = planted()
    site = SiteView("site", torch.ones(4, 1), kept_count=2)
    both = Catro()(site, Evidence(means=torch.stack([x, 2 * x]), labels=labels))[0]
    b, w = scatters(x, labels)
    live = torch.tensor([0, 1, 2])
    eps = 1e-8 * (5 * (b + w)).mean()
    assert torch.allclose(both[live], best_set(5 * b[live], 5 * w[live] + eps, 2)[0])


def test_too_few_samples_are_refused():
    x, labels = planted()
    with pytest.raises(JpqError, match=r"1 classes .*two of two classes"):
        score(x[labels == 0], labels[labels == 0], 2)
    with pytest.raises(JpqError, match="0 samples of 0 classes"):
        score(x, labels, 2, classes=(7, 8))
    with pytest.raises(JpqError, match="labelled batches"):
        Catro()(SiteView("site", torch.ones(2, 1)), Evidence())


def test_ranking_of_a_network_keeps_the_best_sets():
    """The open units of each site are the optimum of as many units as stay, from the network's own activations."""
    torch.manual_seed(0)
    data = jpq.tasks.data.load("digits", batch_size=64)
    model = jpq.tasks.models.build("convnet", 10, 1).eval()
    x, y = next(iter(data.train.epoch(0)))
    network = trace(model, x)
    net = attach(model, network, channels(network), Ranked, lambda _: (Fixed(8), Fixed(8)), [x], "catro")
    rank_units(net, Catro(), [(x, y)], share=0.5)
    site, gate = net.sites[0], net.gates[0]
    seen = []
    layer = net.layer(site.taps[0].layer)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        net.eval()(x)
    handle.remove()
    b, w = scatters(seen[0].flatten(2).mean(2), y)
    stay = round(0.5 * site.n)
    own = gate.margins[0].argsort(descending=True)[:stay].sort().values
    kept = best_set(b, w + 1e-8 * (b + w).mean(), stay)[0].argsort(descending=True)[:stay].sort().values
    assert torch.equal(own, kept)
