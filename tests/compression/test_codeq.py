"""CoDeQ: the dead-zone grid, the zero bin that is a gate, squashed bits, and what they land on."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from gated import attached, compare_exported, rebuilt
from outputs import gap
from torch import nn

from jpq import costs
from jpq.compression import discretize
from jpq.compression.attach import attach
from jpq.costs.target import FULL_USE, parse_targets, used_share
from jpq.export.count import measure
from jpq.methods.gates import DeadZone
from jpq.methods.gates.dead_zone import SOFT
from jpq.methods.quantizers import DeadZoneGrid, Fixed, Gated, IntegerQuantizer, Learned, SigmoidWidth
from jpq.methods.structures import Elementwise
from jpq.tasks.models import build
from jpq.tracing.forward import call_model
from jpq.tracing.sites import channels, masks
from jpq.tracing.trace import trace
from jpq.types import JpqError

DOUBLE = torch.float64
ONE = torch.tensor(1.0, dtype=DOUBLE)


def rounded(w, d, bits, top=1.0):
    """what on the grid of range `top`, dead-zone width d."""
    ends = torch.tensor(top, dtype=DOUBLE), torch.as_tensor(d, dtype=DOUBLE)
    return DeadZoneGrid(lambda: ends).quantize(w, ONE, torch.tensor(float(bits), dtype=DOUBLE), True)


def gate(weight, theta=3.0):
    made = DeadZone(1, weight.numel(), theta).to(weight.dtype)
    made.observe_weights([(weight, Elementwise())])
    return made


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_d_equal_to_s_is_plain_absmax_rounding(bits):
    torch.manual_seed(0)
    w = torch.randn(5000, dtype=DOUBLE).clamp(-1, 1)
    n = 2 ** (bits - 1) - 1
    assert torch.allclose(rounded(w, 1 / n, bits), (w * n).round() / n, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("d", [0.01, 0.2, 0.9, 1.9])
def test_zero_bin_top_level_and_count(bits, d):
    w = torch.linspace(-3, 3, 600_001, dtype=DOUBLE)
    out = rounded(w, d, bits)
    apart = (w.abs() - d / 2).abs() > 1e-7  # the step carries 1e-8
    assert torch.equal((out == 0)[apart], (w.abs() <= d / 2)[apart])
    assert float(out.max()) == pytest.approx(1.0, abs=1e-5)  # Q times those 1e-8
    assert torch.allclose(out[w.abs() >= 1].abs(), ONE, atol=1e-5)
    steps = out.mul(1e7).round().unique()
    assert len(steps) == 2 * (2 ** (bits - 1) - 1) + 1
    assert torch.equal(steps, -steps.flip(0))


def test_gradients_are_straight_through():
    """1 for inner, zeroed and clipped weights; wbar - u for the step; -sign(w) in the zero bin for its edge."""
    w = torch.tensor([0.4, -0.6, 0.05, -0.02, 1.7, -2.0], dtype=DOUBLE, requires_grad=True)
    top = torch.tensor(1.0, dtype=DOUBLE)
    d = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    bits = torch.tensor(4.0, dtype=DOUBLE, requires_grad=True)
    g = torch.tensor([0.3, -0.8, 0.5, 1.1, -0.4, 0.9], dtype=DOUBLE)
    out = DeadZoneGrid(lambda: (top, d)).quantize(w, ONE, bits, True)
    assert out[2] == out[3] == 0
    dw, dd, db = torch.autograd.grad(out, (w, d, bits), g)
    assert torch.allclose(dw, g)
    n, half = 7, 0.15
    s = (1 - half) / (n - 0.5) + 1e-8
    delta = half - s / 2
    u = w.detach().sign() * (w.detach().abs() - delta).relu() / s
    wbar = u.round().clamp(-n, n)
    d_s = g @ (wbar - u)
    d_delta = g @ (wbar.sign() - w.detach().sign())
    s_by_d = -0.5 / (n - 0.5)
    assert float(dd) == pytest.approx(float(d_s * s_by_d + d_delta * (0.5 - s_by_d / 2)), rel=1e-9)
    s_by_b = -(1 - half) / (n - 0.5) ** 2 * math.log(2) * (n + 1)
    assert float(db) == pytest.approx(float(d_s * s_by_b - d_delta * s_by_b / 2), rel=1e-9)


def test_a_narrow_zone_only_shrinks_the_zero_bin():
    """Fault to avoid: at d = 0 the zero bin vanishes and 2Q levels are left; theta's bounds keep d above 0."""
    w = torch.linspace(-1.5, 1.5, 30_000, dtype=DOUBLE)  # an even number: 0 is not among them
    assert len(rounded(w, 0.0, 3).mul(1e7).round().unique()) == 6
    made = gate(w)
    made.theta.data.fill_(1e6)
    made.after_step(1.0)
    _, d = made.ends()
    assert float(d.detach()) > 0
    assert len(rounded(w, float(d.detach()), 3, float(made.top)).mul(1e7).round().unique()) == 7


def test_range_is_the_99th_percentile_whatever_the_maximum():
    """Fault to avoid: from the raw maximum one outlier would empty the grid; and no gradient through the percentile."""
    torch.manual_seed(0)
    w = torch.randn(10_000).requires_grad_()
    before, _ = gate(w).ends()
    assert float(before) == pytest.approx(float(w.detach().abs().quantile(0.99)), rel=1e-2)
    with torch.no_grad():
        w[7] = 1e4
    after, d = gate(w).ends()
    assert float(after) == pytest.approx(float(before), rel=1e-2)
    assert not after.requires_grad
    assert torch.autograd.grad(d, w, allow_unused=True) == (None,)
    large = torch.randn(2**20)  # taken from a sample
    assert float(gate(large).ends()[0]) == pytest.approx(float(large.abs().quantile(0.99)), rel=1e-2)


def test_theta_3_is_almost_no_dead_zone():
    made = gate(torch.randn(1000))
    top, d = made.ends()
    assert float(d.detach() / top) == pytest.approx(0.0099, abs=5e-5)
    assert float(made.keep().mean()) > 0.98


def test_gate_keeps_what_the_grid_does_not_zero():
    torch.manual_seed(0)
    w = torch.randn(2000, dtype=DOUBLE)
    for theta in (0.1, 0.5, 1.0, 2.0):
        made = gate(w, theta)
        grid = DeadZoneGrid(made.ends)
        out = grid.quantize(w, ONE, torch.tensor(4.0, dtype=DOUBLE), True)
        assert torch.equal(made.keep()[0] == 1, out.detach() != 0)
        assert torch.equal(made.keep(), (made.margin() > 0).to(DOUBLE))
        assert 0 < float(made.keep().mean()) < 1


def test_gate_obeys_the_laws_of_gates():
    torch.manual_seed(0)
    fresh = DeadZone(1, 9)
    assert fresh.keep().sum() == 9
    made = gate(torch.randn(64), 0.8).eval()
    assert 0 < made.keep().sum() < 64
    assert torch.equal(made.multiplier(), made.keep())
    assert torch.equal(made.train().multiplier(), made.keep())  # without a grid that drops, the mask itself
    alive, margin = made.keep_probability()[0].detach(), made.margin()[0].detach()
    assert bool(((alive >= 0) & (alive <= 1)).all())
    assert bool((alive[margin.argsort()].diff() >= 0).all())
    for theta in (0.0, 1e6, -1e6):
        made.theta.data.fill_(theta)
        made.after_step(1.0)
        assert bool(made.margin().isfinite().all())
    zeros = gate(torch.zeros(8))
    assert bool(zeros.margin().isfinite().all())
    assert bool(
        DeadZoneGrid(zeros.ends).quantize(torch.zeros(8), torch.ones(()), torch.tensor(4.0), True).isfinite().all()
    )


def test_weight_decay_on_theta_raises_the_share_of_zeros():
    """The paper's regulariser lambda * theta^2 with the task off."""
    torch.manual_seed(0)
    made = gate(torch.randn(5000))
    optim = torch.optim.Adam(made.parameters(), 0.05)
    shares, thetas = [], []
    for _ in range(60):
        optim.zero_grad()
        (0.01 * made.theta.square()).backward()
        optim.step()
        made.after_step(0.0)
        shares.append(1 - float(made.keep().mean()))
        thetas.append(float(made.theta.detach()))
    assert all(b < a for a, b in pairwise(thetas))
    assert all(b >= a for a, b in pairwise(shares))
    assert shares[-1] > 0.5
    for _ in range(200):
        made.theta.data.sub_(0.05)
        made.after_step(0.0)
    assert float(made.theta.detach()) > 0  # where it has a slope, and not everything is dead
    assert float(made.keep().sum()) > 0


def normal_slopes(top, theta):
    """(smoothed, true) slope in theta of the share of normal weights that stay, by integrals over |w|.

    The true share is P(|w| > t) with t = R (1 - tanh theta); smoothing averages its slope over a logistic of SOFT nats.
    """
    t, falls = top * (1 - math.tanh(theta)), top * (1 - math.tanh(theta) ** 2)
    x = torch.linspace(1e-5, 8, 400_001, dtype=DOUBLE)
    density = 2 * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    kept = torch.sigmoid((x.log() - math.log(t)) / SOFT)
    smoothed = float(torch.trapezoid(density * kept * (1 - kept) / SOFT, x)) * falls / t
    return smoothed, 2 * math.exp(-t * t / 2) / math.sqrt(2 * math.pi) * falls


def test_smoothed_count_has_the_slope_of_the_true_one():
    """Averaged over half a nat, which is 64 to 90 % of the slope at the edge itself."""
    torch.manual_seed(0)
    w = torch.randn(50_000, dtype=DOUBLE)
    for theta, share in ((0.3, 0.84), (0.7, 0.64), (1.2, 0.90)):
        made = gate(w, theta)
        (slope,) = torch.autograd.grad(made.keep_probability().mean(), made.theta)
        smoothed, true = normal_slopes(float(made.top), theta)
        assert float(slope) == pytest.approx(smoothed, rel=0.01)  # two standard errors of 50,000 weights
        assert smoothed / true == pytest.approx(share, abs=0.005)
    assert not made.size.requires_grad  # the budget moves the zone, never the weights


def test_squashed_bits():
    width = SigmoidWidth(5, 2, 8)
    assert width.soft() == pytest.approx(5)
    assert float(width().detach()) == 5
    slopes = []
    for theta in (0.0, 1.0, 4.0, 12.0, 99.0):
        width.theta.data.fill_(theta)
        width.after_step()
        assert float(width().detach()) in width.choices
        (slope,) = torch.autograd.grad(width(), width.theta)
        slopes.append(float(slope))
    assert all(b <= a for a, b in pairwise(slopes))
    assert slopes[0] == pytest.approx(1.0, abs=0.01)  # never without a slope, not at the smallest width either
    assert slopes[-1] > 0
    width.theta.data.fill_(-3.0)
    a = width.soft()
    width.after_step()
    assert width.soft() == pytest.approx(a)
    same = SigmoidWidth(4, 4, 4)
    assert float(same().detach()) == same.soft() == 4


def widths(layer):
    return SigmoidWidth(4, 2, 8), Fixed(8) if layer.reads_input else SigmoidWidth(5, 2, 8)


def compressed(name, seed=0, dtype=DOUBLE):
    """A zoo net with a dead zone in each layer, zones and bits drawn at random."""
    model, net, example = attached(name, DeadZone, widths, lambda network: masks(network, "elementwise"), seed, dtype)
    for p in net.decisions()["gates"]:
        p.data.uniform_(0.2, 1.5)
    for p in net.decisions()["bits"]:
        p.data.uniform_(0.5, 9)
    net.after_step(0.5)
    return model, net.eval(), example


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "concat", "flat"])
def test_masked_settled_and_rebuilt_agree(name):
    model, net, example = compressed(name)
    found = rebuilt(model, net, example)
    assert gap(found.soft, found.settled) <= 1e-10
    assert gap(found.soft, found.rebuilt) <= 1e-10
    uses = net.exact_usage(found.complete)
    exact = costs.bops(uses)
    assert found.bops == pytest.approx(float(exact), rel=1e-5)
    assert Fraction(measure(found.model, example)["bops"]) == exact
    assert all(0 < u.density < 1 for u in uses)
    for u in uses:  # density is what is counted, and dropped weights are zeros of the rebuilt model
        layer = found.model.get_submodule(u.name)
        assert Fraction(int(layer.mask.sum()), layer.mask.numel()) == u.density
        assert not bool(layer.weight[~layer.mask].any())
        assert not bool(layer.weight_quant(layer.weight)[~layer.mask].any())


def test_exported_file_computes_the_same(tmp_path):
    found = compare_exported(*compressed("residual", dtype=torch.float32), tmp_path / "m.onnx")
    assert found["argmax_differs"] <= found["at_a_rounding_boundary"] <= 3


def test_training_rounds_on_the_dead_zone_grid_and_reaches_every_decision():
    _, net, example = compressed("residual", dtype=torch.float32)
    net.train()
    for g in net.gates:
        assert g.in_grid
        assert bool((g.multiplier() == 1).all())
    call_model(net, example).square().mean().backward()  # the task alone
    for name, layer in net.model.named_modules():
        if hasattr(layer, "weight_quant"):
            g = dict(zip([s.name for s in net.sites], net.gates, strict=True))[name]
            zeros = layer.weight_quant(layer.weight) == 0
            assert torch.equal(zeros.flatten(), g.keep()[0] == 0)
            weight = layer.parametrizations.weight.original
            assert bool((weight.grad[zeros] != 0).any())  # dropped weights go on learning
            assert float(g.theta.grad) != 0
            assert float(layer.weight_quant.tensor_quant.width.theta.grad) != 0
    net.zero_grad()
    costs.bops(net.soft_usage()).log().backward()  # the budget alone: fewer weights and fewer bits are cheaper
    for p in [*net.decisions()["gates"], *net.decisions()["bits"]]:
        assert float(p.grad) > 0
    assert all(p.grad is None for group in net.weights().values() for p in group)


def test_lands_on_its_budget():
    model, x = build("convnet", 10, 1), torch.randn(4, 1, 8, 8)
    network = trace(model, x)
    net = attach(model, network, masks(network, "elementwise"), DeadZone, widths, [x], "codeq")
    for seed in range(3):
        torch.manual_seed(seed)
        for p in net.decisions()["gates"]:
            p.data.uniform_(0.1, 3)
        for p in net.decisions()["bits"]:
            p.data.uniform_(0.1, 9)
        targets = parse_targets({"bops": "0.7%"}, net.exact_usage())
        plan = discretize.discretize(net, targets)
        assert FULL_USE <= used_share(targets[0], net.exact_usage(plan)) <= 1


def test_what_does_not_compose_is_refused():
    model, x = build("convnet", 10, 1), torch.randn(4, 1, 8, 8)
    network = trace(model, x)
    for sites in (channels(network), masks(network, "block:8x4")):
        with pytest.raises(JpqError, match="single weights"):
            attach(model, network, sites, DeadZone, widths, [x], "codeq")
    gated = lambda layer: (Gated(8, 2, 8), Gated(8, 2, 8))  # noqa: E731
    with pytest.raises(JpqError, match="Gated and a dead zone"):
        attach(model, network, masks(network, "elementwise"), DeadZone, gated, [x], "codeq")
    # one neuron at a time is single weights too, and other widths may take part
    pair = lambda layer: (Learned(4, 2, 8), Learned(4, 2, 8))  # noqa: E731
    attach(model, network, masks(network, "per-output"), DeadZone, pair, [x], "codeq")


def test_b_bit_codes_need_more_bits_in_arithmetic():
    """Why landing leaves the dead-zone grid: at d = R the levels of b bits are integers of b + 1."""
    w = torch.linspace(-1, 1, 10_001, dtype=DOUBLE)
    for bits in (3, 4, 6):
        n = 2 ** (bits - 1) - 1
        levels = rounded(w, 1.0, bits).mul(1e7).round().unique().div(1e7)
        step = 0.5 / (n - 0.5)
        whole = (levels / step).round()
        assert torch.allclose(whole * step, levels, atol=1e-6)  # on one uniform grid here
        assert n < float(whole.max()) <= 2**bits - 1
    uneven = rounded(w, 0.6, 4).mul(1e7).round().unique().div(1e7)
    first, step = float(uneven[uneven > 0][0]), float(uneven[-1] - uneven[-2])
    assert first / step == pytest.approx((0.3 * 6.5 / 0.7 - 0.5) + 1, abs=1e-5)  # 3.286: on no grid of this step


def test_papers_costs():
    """Golden: ResNet20 at 4 bits and 2.95 % (32-bit activations) means a density of 0.236; CoDeQ, Table 1."""
    use = costs.LayerUse("all", 1024, 1024, 1, 1, 1, Fraction(236, 1000), 4, 32)
    assert float(costs.bops([use]) / costs.baseline([use])["bops"]) == pytest.approx(0.0295, abs=1e-6)


def test_settled_network_has_plain_quantizers():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(30, 6)
    network = trace(model, x)
    net = attach(model, network, masks(network, "elementwise"), DeadZone, widths, [x], "codeq")
    net.gates[0].theta.data.fill_(0.5)
    net.freeze(net.plan())
    for module in net.modules():
        if isinstance(module, IntegerQuantizer):
            assert module.grid is None
    assert not list(net.gates.parameters())
    net(x).sum().backward()
    w = net.quantizers("0")[0]
    assert bool(w.log_threshold.grad.isfinite().all())  # from here on a range for each channel learns
