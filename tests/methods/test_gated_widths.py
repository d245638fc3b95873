"""Bit doubling by gates: the nested sum, its gates, and that it lands on the plain grid."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
import torchvision
from gated import attached, compare_exported, rebuilt
from outputs import gap
from torch import nn

from jpq import costs
from jpq.compression import discretize, soft_decisions
from jpq.compression.attach import attach
from jpq.costs.target import FULL_USE, parse_targets, used_share
from jpq.export.count import measure
from jpq.methods.gates import Frozen, HardConcrete
from jpq.methods.quantizers import Fixed, Gated, IntegerQuantizer
from jpq.methods.quantizers.gated import CLOSED, LADDER, NATS, _Nest
from jpq.tasks.models import build
from jpq.tracing.forward import call_model
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace
from jpq.types import JpqError

DOUBLE = torch.float64


def opened(count, low=2, high=16):
    """A width whose first `count` gates are surely open and the rest surely closed, in double precision."""
    width = Gated(low, low, high).double()
    width.phi.data = torch.tensor([9.0 if i < count else -9.0 for i in range(len(width.phi))], dtype=DOUBLE)
    width.draw = lambda: (width.phi > 0).to(DOUBLE)
    return width


def chain(x, top, z, choices, signed):
    """The paper's formulas as a chain of differentiable operations, straight-through on round only."""
    straight = lambda u: u + (u.round() - u).detach()  # noqa: E731
    # two ReLUs, as the paper clips, so that x_max gets a gradient; just inside, so that nothing rounds past the top
    low = -top if signed else torch.zeros_like(top)
    inner = top * (1 - 1e-7) if signed else top
    clipped = torch.where(x > top, inner, torch.where(x < low, -inner if signed else low, x))
    rest, total, product = clipped, torch.zeros(()), torch.ones(())
    for i, bits in enumerate(choices):
        step = top * (1 + signed) / (2**bits - 1)
        part = step * straight(rest / step)
        rest = rest - part
        product = product if i == 0 else product * z[i - 1]
        total = total + product * part
    return total


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_gates_open_up_to_b_are_plain_rounding_to_b_bits(count, signed):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(20_000, dtype=DOUBLE) * 0.8, torch.tensor([0.0, 1.3, -1.3, 9.0, -9.0], dtype=DOUBLE)])
    width = opened(count)
    bits = LADDER[count]
    quantizer = IntegerQuantizer(torch.tensor(1.3, dtype=DOUBLE), width, signed).double().train()
    nested, scale, _, said = quantizer(x)
    assert float(said.detach()) == bits
    r, n = float(quantizer.threshold.detach()), 2 ** (bits - signed) - 1
    plain = (x / (r / n)).round().clamp(-n if signed else 0, n) * (r / n)
    assert torch.allclose(nested, plain, atol=1e-12)
    assert torch.allclose(quantizer.eval()(x)[0], plain, atol=1e-12)
    assert nested[20_000] == 0
    assert float(scale.detach()) == pytest.approx(r / n)
    assert len((nested / scale).round().unique()) <= 2 * n + 1


def test_each_step_is_a_whole_fraction_of_the_coarser_one():
    top = torch.tensor(1.0, dtype=DOUBLE)
    steps = []
    for count, bits in enumerate(LADDER):
        width = opened(count, high=32)
        assert float(width()) == bits
        quantizer = IntegerQuantizer(top, width, True).double()
        quantizer.log_threshold.data.zero_()
        steps.append(float(quantizer.scale().detach()))
    assert [a / b for a, b in pairwise(steps)] == pytest.approx([5, 17, 257, 65537])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(), (5, 1)])
def test_gradients_equal_autograd_of_the_papers_chain(signed, shape):
    torch.manual_seed(0)
    x = (torch.randn(5, 200, dtype=DOUBLE)).requires_grad_()
    top = (torch.rand(shape, dtype=DOUBLE) + 0.7).requires_grad_()
    z = torch.tensor([0.6, 0.3], dtype=DOUBLE, requires_grad=True)
    g = torch.randn(5, 200, dtype=DOUBLE)
    ours, theirs = _Nest.apply(x, top, z, (2, 4, 8), signed), chain(x, top, z, (2, 4, 8), signed)
    assert torch.allclose(ours, theirs, atol=1e-6)  # the chain clips at 1e-7 below the range
    for a, b in zip(*(torch.autograd.grad(y, (x, top, z), g) for y in (ours, theirs)), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_one_sample_multiplies_the_residual_and_all_finer_ones():
    """Fault in public code: two draws of the same gate, one for the residual and one for the nested product."""
    torch.manual_seed(1)
    width, draws = Gated(8, 2, 8).double(), []
    drawn = width.draw
    width.draw = lambda: draws.append(drawn()) or draws[-1]
    width.phi.data.fill_(0.0)
    quantizer = IntegerQuantizer(torch.tensor(1.0, dtype=DOUBLE), width, True).double().train()
    x = torch.randn(50, dtype=DOUBLE)
    for _ in range(5):
        out = quantizer(x)[0]
        assert torch.allclose(out, chain(x, quantizer.log_threshold.exp(), draws[-1], (2, 4, 8), True), atol=1e-6)
    assert len(draws) == 5
    assert any(0 < float(z[0].detach()) < 1 for z in draws)


def test_share_of_open_draws_is_the_closed_form():
    width = Gated(8, 2, 16)
    width.phi.data = torch.tensor([-2.0, 0.0, 1.5])
    torch.manual_seed(0)
    n = 20_000
    z = torch.stack([width.draw().detach() for _ in range(n)])
    q = width.open().detach()
    assert bool((((z > 0).float().mean(0) - q).abs() < 4 * (q * (1 - q) / n).sqrt()).all())
    assert bool((z == 0).any())
    assert bool((z == 1).any())
    expected = 2 + 2 * q[0] + 4 * q[0] * q[1] + 8 * q.prod()
    assert width.soft() == pytest.approx(float(expected))


def test_evaluation_opens_a_gate_at_minus_0_935():
    assert pytest.approx(-0.935, abs=1e-3) == CLOSED
    width = Gated(8, 2, 4)
    for nudge, bits in ((-1e-3, 2), (1e-3, 4)):
        width.phi.data.fill_(CLOSED + nudge)
        assert float(width().detach()) == bits
        closed = float(torch.sigmoid(2 / 3 * torch.tensor(1 / 11).log() - width.phi.detach()))
        assert (closed < 0.34) == (bits == 4)


def test_expected_bits_fall_with_every_gate():
    width = Gated(8, 2, 16)
    for phi in ([2.0, 2.0, 2.0], [-3.0, 0.0, 3.0], [-4.0, -4.0, -4.0]):
        width.phi.data = torch.tensor(phi)
        (slope,) = torch.autograd.grad(width(), width.phi)
        assert bool((slope > 0).all()), "a closed gate too must be able to return"


def test_a_closed_gate_closes_all_finer_ones():
    width = Gated(8, 2, 8)
    width.phi.data = torch.tensor([-3.0, 3.0])
    assert float(width().detach()) == 2
    width.phi.data = torch.tensor([3.0, -3.0])
    assert float(width().detach()) == 4


def test_landing_moves_gates_by_what_they_lack():
    width = Gated(8, 2, 8)
    for phi in ([3.0, 1.0], [-2.0, 1.0], [0.5, -4.0], [-4.0, -4.0]):
        width.phi.data = torch.tensor(phi)
        assert width.nearest(width.soft()) == float(width().detach())
        for small, large in ((2, 4), (4, 8)):
            at = width.switch(small, large)
            assert width.nearest(at + 1e-4) >= large > width.nearest(at - 1e-4)
            assert (at > width.soft()) == (float(width().detach()) < large)
        assert (width.nearest(-1e6), width.nearest(1e6)) == (2, 8)
    assert NATS == soft_decisions.NATS


@pytest.mark.parametrize(("low", "high", "choices"), [(2, 8, (2, 4, 8)), (3, 8, (4, 8)), (2, 5, (2, 4)), (4, 4, (4,))])
def test_bounds_choose_the_ladder(low, high, choices):
    width = Gated(5, low, high)
    assert width.choices == choices
    assert len(width.phi) == len(choices) - 1
    assert float(width().detach()) in choices
    x = torch.randn(100)
    quantizer = IntegerQuantizer(torch.tensor(1.0), width, True).train()
    quantizer(x)[0].sum().backward()
    with pytest.raises(JpqError, match="No power of two"):
        Gated(6, 5, 7)


def test_the_range_stays_positive_whatever_the_optimiser_does():
    """Fault in public code: a range learned linearly near 0 turns negative."""
    quantizer = IntegerQuantizer(torch.tensor(1e-3), Gated(8, 2, 8), True).train()
    optim = torch.optim.SGD(quantizer.parameters(), 1.0)
    for _ in range(50):
        optim.zero_grad()
        quantizer(torch.randn(100) * 1e-3)[0].sum().mul(1e3).backward()
        optim.step()
        quantizer.width.after_step()
        assert float(quantizer.threshold.detach()) > 0
        assert bool(quantizer(torch.randn(10))[0].isfinite().all())


class Fork(nn.Module):
    """Two layers of different size read what one layer makes."""

    def __init__(self):
        super().__init__()
        self.stem, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        y = torch.relu(self.stem(x))
        return self.b(y) + self.c(y)


def fork(gate):
    torch.manual_seed(0)
    model, x = Fork(), torch.randn(4, 3, 6, 6)
    network = trace(model, x)
    pair = lambda layer: (Gated(8, 2, 8), Gated(8, 2, 8))  # noqa: E731
    return attach(model, network, (), gate, pair, [x], "bayesian-bits"), network


def widths(layer):
    return Gated(8, 2, 8), Fixed(8) if layer.reads_input else Gated(8, 2, 8)


def compressed(name, seed=0, dtype=DOUBLE):
    """A zoo net with gated widths and channel gates, decisions drawn at random."""
    model, net, example = attached(name, HardConcrete, widths, seed=seed, dtype=dtype)
    for p in [*net.decisions()["gates"], *net.decisions()["bits"]]:
        p.data.copy_(torch.randn_like(p) * 3)
    for gate in net.gates:
        gate.log_alpha.data[0, 0], gate.log_alpha.data[0, -1] = 3.0, -4.0
    net.after_step(0.5)
    return model, net.eval(), example


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "concat", "flat"])
@pytest.mark.parametrize("seed", [0, 1])
def test_gated_settled_and_rebuilt_agree(name, seed):
    model, net, example = compressed(name, seed)
    found = rebuilt(model, net, example)
    assert {b for x in found.plan.layers.values() for b in (x.w_bits, x.a_bits)} <= {2, 4, 8}
    assert gap(found.soft, found.settled) <= 1e-10
    assert gap(found.soft, found.rebuilt) <= 1e-10
    exact = costs.bops(net.exact_usage(found.complete))
    assert found.bops == pytest.approx(float(exact), rel=1e-5)
    assert Fraction(measure(found.model, example)["bops"]) == exact
    assert not [m for m in net.modules() if isinstance(m, Gated)]  # plain grids from here on


def test_gated_network_exports(tmp_path):
    found = compare_exported(*compressed("residual", dtype=torch.float32), tmp_path / "m.onnx")
    assert found["argmax_differs"] <= found["at_a_rounding_boundary"] <= 3


def test_training_reaches_weights_ranges_gates_and_channels():
    _, net, example = compressed("residual", dtype=torch.float32)
    for p in net.decisions()["bits"]:
        p.data.fill_(0.0)
    torch.manual_seed(3)
    net.train()
    totals = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for _ in range(8):  # some draws are exactly 0 or 1, where no gradient passes
        net.zero_grad()
        (call_model(net, example).square().mean() + costs.bops(net.soft_usage()).log()).backward()
        for name, p in net.named_parameters():
            assert bool(p.grad.isfinite().all()), name
            totals[name] += p.grad.abs()
    assert all(bool((totals[name] > 0).any()) for name in totals)


def test_lands_on_its_budget():
    model, x = build("convnet", 10, 1), torch.randn(4, 1, 8, 8)
    network = trace(model, x)
    net = attach(model, network, channels(network), HardConcrete, widths, [x], "bayesian-bits")
    for seed in range(5):
        torch.manual_seed(seed)
        for p in [*net.decisions()["gates"], *net.decisions()["bits"]]:
            p.data.normal_(0, 3)
        targets = parse_targets({"bops": "1%"}, net.exact_usage())
        plan = discretize.discretize(net, targets)
        assert FULL_USE <= used_share(targets[0], net.exact_usage(plan)) <= 1
        assert {b for layer in plan.layers.values() for b in (layer.w_bits, layer.a_bits)} <= {2, 4, 8}


def test_a_changed_width_gets_a_range_of_its_own():
    """Landing may move a gate: the range of another width would leave half of the grid unused."""
    net, network = fork(gate=Frozen.all)
    plan = net.plan()
    for name in plan.layers:
        plan.layers[name] = type(plan.layers[name])(2, 2, plan.layers[name].signed)
    net.freeze(plan)
    for layer in network.layers:
        w, _ = net.quantizers(layer.name)
        weight = net.layer(layer.name).weight.detach()
        error = (w(weight)[0] - weight).square().mean()
        assert float(error.detach()) < 0.3 * float(weight.square().mean())
        assert w.grid is None


def test_producers_of_mobilenet_come_from_the_graph():
    """Fault in public code: a table of producers by name that misses most layers of MobileNetV2."""
    model = torchvision.models.mobilenet_v2(num_classes=10).eval()
    network = trace(model, torch.randn(1, 3, 32, 32))
    made = {int(c) for layer in network.layers for c in layer.outputs}
    readers = [layer for layer in network.layers if not layer.reads_input]
    assert len(readers) == 52
    assert all(set(layer.inputs.tolist()) <= made for layer in readers)
    # and channels behind residual adds are counted as pruned exactly where they are sliced
    assert any(len(site.producers) > 1 for site in channels(network))
