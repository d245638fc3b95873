"""GDP: what its sheet promises, and the faults that it warns of."""

import math
from itertools import pairwise

import pytest
import torch
from gated import gated
from zoo import ZOO

from jpq import costs
from jpq.export.count import measure
from jpq.export.rebuild import rebuild
from jpq.export.verify import difference
from jpq.methods.gates import Polarized
from jpq.methods.gates.polarized import COLD, CUT, HOT, RATE, START
from jpq.tracing.channel_shares import ChannelShares


def polarized(x, progress=0.5):
    gate = Polarized(1, len(x)).double()
    gate.x.data = torch.tensor([x], dtype=torch.float64)
    gate.last.copy_(gate.x.data)
    gate.after_step(progress)
    return gate


def slope(gate):
    return torch.autograd.grad(gate.relaxed().sum(), gate.x)[0][0]


def test_the_gate_and_its_slope():
    gate = polarized([-3.0, -0.2, 0.0, 1e-4, 0.3, 2.0, 50.0])
    x, eps = gate.x.detach()[0], gate.eps.double()
    assert float(eps) == pytest.approx(math.sqrt(HOT * COLD))
    assert torch.allclose(gate.relaxed()[0], x**2 / (x**2 + eps))
    assert torch.allclose(slope(gate), 2 * x * eps / (x**2 + eps) ** 2)
    assert torch.autograd.gradcheck(lambda v: v**2 / (v**2 + eps), (x.clone().requires_grad_(),))
    assert bool(((gate.relaxed() >= 0) & (gate.relaxed() < 1)).all())
    assert float(gate.relaxed()[0, 2]) == float(slope(gate)[2]) == 0
    root = float(eps.sqrt())
    assert float(polarized([root]).relaxed()) == pytest.approx(0.5)
    around = polarized([root / math.sqrt(3) * f for f in (0.99, 1.0, 1.01)])
    assert slope(around).argmax() == 1
    assert float(around.relaxed()[0, 1]) == pytest.approx(0.25)


def test_starts_where_the_paper_does_and_sharpens_a_thousandfold():
    gate = Polarized(1, 2)
    assert float(gate.relaxed()[0, 0]) == pytest.approx(1 / 1.1)
    gate.after_step(1.0)
    assert float(gate.eps) / START**2 == pytest.approx(1e-4)


def test_dropped_iff_below_the_cut():
    gate = polarized([0.0, 1.0], 1.0)
    edge = math.sqrt(float(gate.eps) * CUT / (1 - CUT))
    gate.x.data = torch.tensor([[edge * 0.999, edge * 1.001]], dtype=torch.float64)
    assert gate.keep().tolist() == [[0, 1]]
    assert gate.relaxed()[0, 0] < CUT < gate.relaxed()[0, 1]


def test_proximal_step_gives_exact_zeros_and_changes_no_sign():
    gate = polarized([0.001, -0.001, 0.5, -0.5, 0.0, 0.01])
    before = gate.x.detach().clone()
    gate.price.copy_(torch.tensor([[0.1, -0.1, 0.1, 0.1, 5.0, 0.0]]))
    gate.after_step(0.5)
    after = gate.x.detach()[0]
    assert after.tolist() == pytest.approx([0, 0, 0.5 - RATE * 0.1, -0.5 + RATE * 0.1, 0, 0.01])
    assert after[0] == after[1] == after[4] == 0
    assert bool((after * before[0] >= 0).all())
    assert not gate.price.any()  # paid
    still = Polarized(1, 1, proximal=False)
    still.price.fill_(3.0)
    still.after_step(0.5)
    assert float(still.x) == START


def test_no_step_diverges_where_the_plain_penalty_does():
    rate = 4 * COLD  # lr * lambda / eps = 4
    plain = torch.full((1,), 0.02, requires_grad=True)
    signs = set()
    for _ in range(20):
        (grad,) = torch.autograd.grad((plain**2 / (plain**2 + COLD)).sum(), plain)
        plain.data -= rate * grad
        signs.add(float(plain.detach().sign()))
    assert signs == {-1.0, 1.0}  # it jumps to and fro
    gate = polarized([0.02, 3.0], 1.0)
    optimizer = torch.optim.SGD(gate.parameters(), rate)
    for _ in range(20):
        optimizer.zero_grad()
        gate.relaxed().sum().backward()
        optimizer.step()
        gate.after_step(1.0)
        assert gate.x[0, 0] == 0
    assert gate.x[0, 1] > 2.9


def test_zero_is_for_good_whatever_momentum_says():
    gate = Polarized(1, 1)
    optimizer = torch.optim.Adam(gate.parameters(), 1.0)
    crossed = 0
    for _ in range(10):
        optimizer.zero_grad()
        gate.relaxed().sum().backward()
        optimizer.step()
        crossed += float(gate.x) < 0
        gate.after_step(0.5)
        assert float(gate.x) >= 0
    assert crossed > 1  # Adam went on
    assert float(gate.x) == 0
    assert gate.keep().sum() == 0


def test_the_share_between_shrinks_while_training():
    torch.manual_seed(0)
    worth = torch.rand(1, 200)
    gate = Polarized(1, 200)
    optimizer = torch.optim.Adam(gate.parameters(), 0.05)
    shares = []
    for step in range(600):
        optimizer.zero_grad()
        ((gate.relaxed() * (0.4 - worth)).sum() + 0.1 * gate.keep_probability().sum()).backward()
        optimizer.step()
        gate.after_step(step / 600)
        g = gate.relaxed().detach()
        shares.append(float(((g > 0.05) & (g < 0.95)).float().mean()))
    points = shares[::50] + shares[-1:]
    assert points[0] == 1
    assert all(b <= a for a, b in pairwise(points))
    assert points[-1] == 0
    assert torch.equal(gate.keep() > 0, worth > 0.5)


def test_the_price_is_what_the_cost_asks_for():
    _, net, _ = gated("residual", Polarized)
    cost = costs.macs(net.soft_usage()).log() * 3
    cost.backward()
    for gate, site in zip(net.gates, net.sites, strict=True):
        assert gate.x.grad is not None
        slope = 2 * gate.x * gate.eps / (gate.x**2 + gate.eps) ** 2
        assert torch.allclose(gate.price * slope, gate.x.grad, rtol=1e-5)  # mu = d cost / d g, and nothing else
        assert bool((gate.price > 0).all()), site.name
    with torch.no_grad():
        net.gates[0].keep_probability()  # and without a graph nothing is charged


@pytest.mark.parametrize("name", ["residual", "pre_activation", "depthwise", "concat"])
def test_bilinear_cost_is_the_counted_one_for_every_binary_gate(name):
    _, net, example = gated(name, Polarized)
    shares = ChannelShares(net.network, net.sites)
    for seed in range(4):
        torch.manual_seed(seed)
        model, net, example = gated(name, Polarized)
        for gate in net.gates:
            on = torch.rand_like(gate.x) > 0.5
            on[0, seed % gate.n] = True
            gate.x.data = torch.where(on, 1e9, 0.0)
        inputs, outputs = shares.soft_shares([g.relaxed().detach().double() for g in net.gates])
        soft = sum(
            layer.macs * float(i) * float(o) for layer, i, o in zip(net.network.layers, inputs, outputs, strict=True)
        )
        net.eval().freeze(net.plan())
        small, plan = rebuild(net, model)
        assert soft == pytest.approx(measure(small, example)["macs"], rel=1e-6)
        assert int(costs.macs(net.exact_usage(plan))) == measure(small, example)["macs"]


def test_no_gate_before_a_depthwise_layer():
    _, net, _ = gated("depthwise", Polarized)
    depthwise = {layer.name for layer in net.network.layers if layer.depthwise}
    assert depthwise
    assert not depthwise & {tap.layer for site in net.sites for tap in site.taps}


@pytest.mark.parametrize("name", ["residual", "flat"])
def test_folded_and_sliced_equals_gated(name):
    assert name in ZOO
    model, net, example = gated(name, Polarized)
    torch.manual_seed(1)
    for gate in net.gates:
        gate.x.data = torch.rand_like(gate.x) * 5 + 0.5
        gate.x.data[0, ::3] = 0.0
    soft = [g.relaxed() for g in net.gates]
    net.eval()
    assert all(torch.equal(g.multiplier(), z) for g, z in zip(net.gates, soft, strict=True))  # no other function
    with torch.no_grad():
        before = net(example)
    net.freeze(net.plan())
    small, _ = rebuild(net, model)
    with torch.no_grad():
        assert float((net(example) - before).abs().max() / before.abs().max()) < 1e-5
    assert difference(net, small, example) < 1e-9
