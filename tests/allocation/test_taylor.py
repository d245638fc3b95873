"""Taylor scores against what really happens when a gate closes."""

import pytest
import torch
import torch.nn.functional as F
from runs import trained
from torch import nn
from zoo import ZOO

from jpq.allocation.ranking.evidence import gate_gradients, multiply_units
from jpq.allocation.ranking.rank import rank_units, site_scores
from jpq.compression.attach import attach
from jpq.methods.gates import Ranked
from jpq.methods.quantizers import Fixed, Learned
from jpq.methods.scores import SCORES, Evidence, FullTaylor, SecondTaylor, SiteView, Taylor
from jpq.tasks.data import load
from jpq.tracing.forward import eval_mode
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace
from jpq.types import JpqError


def ranked(model, example, bits=8, sites=channels):
    network = trace(model, example)
    return attach(
        model.eval(), network, sites(network), Ranked, lambda _: (Fixed(bits), Fixed(bits)), [example], "ranked"
    )


def view(uses=1):
    return SiteView("site", torch.ones(1, 1), uses)


def test_worked_examples():
    """g w = 6 and w H w = 4: first order 36, second (6 - 2)^2 = 16; opposite gradients of two batches do not cancel."""
    evidence = Evidence(gradients=(torch.tensor([[6.0]]),), curvature=(torch.tensor([4.0]),))
    assert float(Taylor()(view(), evidence)) == 36
    assert float(SecondTaylor()(view(), evidence)) == 16
    two = Evidence(gradients=(torch.tensor([[1.0]]), torch.tensor([[-1.0]])))
    assert float(Taylor()(view(), two)) == 1
    one = Evidence(gradients=(torch.tensor([[1.0], [-1.0]]),))
    assert float(Taylor()(view(), one)) == 0
    assert float(FullTaylor()(view(), one)) == 1
    assert float(Taylor()(view(uses=3), evidence)) == 12, "a shared gate is divided by its uses"


@pytest.mark.parametrize("name", ["taylor", "taylor-full", "taylor2"])
def test_without_gradients_there_is_no_score(name):
    with pytest.raises(JpqError, match="gates of 'site'"):
        SCORES[name](view(), Evidence())


def test_full_gradient_is_never_below_the_squared_mean():
    torch.manual_seed(0)
    evidence = Evidence(gradients=tuple(torch.randn(9, 5) for _ in range(3)))
    assert bool((FullTaylor()(view(), evidence) >= Taylor()(view(), evidence)).all())


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def test_gate_gradient_is_that_of_the_norm_and_of_the_filter():
    """z dL/dz == gamma dgamma + beta dbeta == w dL/dw of the filter with its norm folded in, and of the readers."""
    torch.manual_seed(0)
    model, x, y = Normed(), torch.randn(6, 2, 5, 5), torch.arange(6) % 3
    model.norm.weight.data.uniform_(0.5, 2)
    model.norm.bias.data.uniform_(-1, 1)
    net, x = smooth(ranked(model, x)), x.double()
    (first,), _ = gate_gradients(net, x, y, F.cross_entropy)
    norm, filters, head = net.model.norm, net.model.conv.weight, net.layer("head").parametrizations.weight.original
    with eval_mode(net):
        F.cross_entropy(net(x), y).backward()
    moved = norm.weight * norm.weight.grad + norm.bias * norm.bias.grad
    assert torch.allclose(first.mean(0), moved, atol=1e-12)
    assert torch.allclose(first.mean(0), (head * head.grad).sum(0), atol=1e-12), "of what reads it"
    # of the folded filter: w' = gamma / std w, b' = gamma / std (b - mean) + beta
    bare = net.model.conv
    folded = (filters * filters.grad).sum((1, 2, 3)) + bare.bias * bare.bias.grad
    centre = (norm.running_mean / (norm.running_var + norm.eps).sqrt()) * norm.weight
    assert torch.allclose(first.mean(0), folded + (norm.bias - centre) * norm.bias.grad, atol=1e-12)


def smooth(net):
    """The network without rounding, in double precision, so that differences are smooth."""
    for layer in net.network.layers:
        for quantizer in net.quantizers(layer.name):
            quantizer.forward = lambda v, q=quantizer: (v, torch.ones(()), q.zero_point, torch.tensor(8.0))
    return net.double()


@pytest.mark.parametrize(
    "name", ["plain", "flat", "residual", "concat", "grouped", "depthwise", "transposed", "squeeze_excite", "signal"]
)
def test_gradients_against_finite_differences_of_the_gate(name):
    """Central differences of each sample's own loss, one gate after the other."""
    torch.manual_seed(0)
    make, example = ZOO[name]
    net, x = smooth(ranked(make(), example)), example.double()
    labels = torch.zeros(len(x), dtype=torch.long)

    def each(out):
        return out.flatten(1).tanh().sum(1)

    first, _ = gate_gradients(net, x, labels, lambda out, _: each(out).mean())
    step = 1e-6
    for s, site in enumerate(net.sites):
        for unit in range(min(site.n, 3)):
            found = []
            for sign in (1, -1):
                gates = [torch.ones(len(x), other.n, dtype=torch.double) for other in net.sites]
                gates[s][:, unit] += sign * step
                with torch.no_grad(), eval_mode(net), multiply_units(net, gates):
                    found.append(each(net(x)))
            slope = (found[0] - found[1]) / (2 * step)
            assert torch.allclose(first[s][:, unit], slope, rtol=1e-4, atol=1e-7)


def linear(bits=8):
    """Two linear layers whose second reads the gates: any loss of its output is one of the gates."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(7, 4)
    return ranked(model, x, bits), x


def removed(net, x, y, loss):
    """Squared change of the loss when each unit's gate closes."""
    (gate,) = net.gates
    with torch.no_grad(), eval_mode(net):
        start, out = loss(net(x), y), []
        for unit in range(gate.n):
            gate.margins[0, unit] = -1
            out.append((loss(net(x), y) - start) ** 2)
            gate.margins[0, unit] = 1
    return torch.stack(out)


@pytest.mark.parametrize("bits", [8, 3])
def test_first_order_is_exact_for_a_linear_loss_and_second_for_a_quadratic_one(bits):
    net, x = linear(bits)
    y = torch.zeros(7, dtype=torch.long)
    for name, loss in (
        ("taylor", lambda out, _: out.mean()),
        ("taylor2", lambda out, _: (out - 1).square().mean()),
        ("taylor2", lambda out, _: out.mean()),
    ):
        (found,) = site_scores(net, SCORES[name], [(x, y)], loss).values()
        wanted = removed(net, x, y, loss)
        assert torch.allclose(found, wanted.double(), rtol=1e-4, atol=1e-9), name
    (first,) = site_scores(net, SCORES["taylor"], [(x, y)], lambda out, _: (out - 1).square().mean()).values()
    assert not torch.allclose(first, removed(net, x, y, lambda out, _: (out - 1).square().mean()).double(), rtol=1e-2)


def test_curvature_of_a_shared_gate_has_the_terms_between_its_readers():
    """A residual gate enters twice: by brute force from the loss at gates 1 - h, 1 and 1 + h, in a float network."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.block(x))

    torch.manual_seed(0)
    x, y = torch.randn(5, 3), torch.zeros(5, dtype=torch.long)
    net, x = smooth(ranked(Twice(), x)), x.double()

    def loss(out, _):
        return out.square().mean()

    _, (second,) = gate_gradients(net, x, y, loss, curvature=True)
    (site,) = net.sites
    assert len(site.taps) == 2
    step = 1e-3
    for unit in range(4):
        values = []
        for shift in (-step, 0.0, step):
            gates = [torch.ones(5, 4, dtype=torch.double)]
            gates[0][:, unit] += shift
            with torch.no_grad(), eval_mode(net), multiply_units(net, gates):
                values.append(float(loss(net(x), y)))
        curve = (values[0] - 2 * values[1] + values[2]) / step**2
        assert float(second[unit]) == pytest.approx(curve, rel=1e-4)


def test_a_channel_that_nobody_reads_scores_nothing():
    net, x = linear()
    net.layer("2").parametrizations.weight.original.data[:, 3] = 0
    for name in ("taylor", "taylor-full", "taylor2"):
        (found,) = site_scores(net, SCORES[name], [(x, torch.arange(7) % 3)]).values()
        assert float(found[3]) == 0
        assert float(found.max()) > 0


def test_collecting_changes_nothing():
    net, x = linear()
    net.train()
    net.set_trainable("decisions")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    flags = [p.requires_grad for p in net.parameters()]
    rank_units(net, SCORES["taylor2"], [(x, torch.arange(7) % 3)])
    after = {k: v for k, v in net.state_dict().items() if "margins" not in k}
    assert all(torch.equal(before[k], v) for k, v in after.items())
    assert flags == [p.requires_grad for p in net.parameters()]
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize(
    ("epochs", "images", "every", "first"),
    [(2, 150, 4, 0.9), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 500, 1, 0.9), (5, 500, 1, 0.7)))],
)
def test_ranks_go_with_the_removal_oracle(epochs, images, every, first):
    """Spearman over all units, or every fourth one, first and second order above L1.

    The first order is above 0.9, as the sheet asks, only while the gradient is not yet small against the curvature.
    """
    data = load("digits", batch_size=128)
    model = trained(data, epochs)
    x, y = data.train.normalise(data.train.images[:images]), data.train.labels[:images]
    net = ranked(model, x)
    oracle = []
    with torch.no_grad(), eval_mode(net):
        start = F.cross_entropy(net(x), y)
        for gate in net.gates:
            for unit in range(0, gate.n, every):
                gate.margins[0, unit] = -1
                oracle.append(float((F.cross_entropy(net(x), y) - start) ** 2))
                gate.margins[0, unit] = 1

    def agreement(name):
        found = torch.cat([values[::every] for values in site_scores(net, SCORES[name], [(x, y)]).values()])
        ranks = [t.argsort().argsort().double() for t in (found, torch.tensor(oracle))]
        return float(torch.corrcoef(torch.stack(ranks))[0, 1])

    assert {len(site.taps) for site in net.sites} == {1}, "no gate is shared"
    assert agreement("taylor2") > 0.9
    assert agreement("taylor") > max(first, agreement("l1"))


def test_learned_widths_are_no_obstacle():
    torch.manual_seed(0)
    model, x = Normed().eval(), torch.randn(6, 2, 5, 5)
    network = trace(model, x)
    widths = lambda _: (Learned(3.4, 2, 8), Learned(4.0, 2, 8))  # noqa: E731
    net = attach(model, network, channels(network), Ranked, widths, [x], "ranked")
    (found,) = site_scores(net, SCORES["taylor2"], [(x, torch.arange(6) % 3)]).values()
    assert bool(found.isfinite().all())
    assert float(found.max()) > 0
