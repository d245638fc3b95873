"""DSP: filters that sort themselves into groups, channels that go group by group, and the branches that are left."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from gated import gated
from torch import nn

import jpq
from jpq.export.branches import Branches, restore_branches, split_into_branches
from jpq.export.count import measure
from jpq.export.rebuild import rebuild
from jpq.export.verify import difference
from jpq.methods.gates import Lasso
from jpq.methods.gates.lasso import LEAST, SPAN, STRENGTH, TAU, coefficients, regulariser, running_sums
from jpq.methods.quantizers import Fixed, IntegerQuantizer, quantize_results
from jpq.methods.structures import Inputs, Kernels
from jpq.tracing.sites import masks

ROWS = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 2.0]])  # the sheet's W, kernels of one weight


def hard(groups, count=2):
    return F.one_hot(torch.tensor(groups), count).T.double()


def gate_on(weight, groups=2, density=0.5):
    structure = Kernels()
    gate = Lasso(*structure.shape(weight.shape), density=density, groups=groups)
    gate.set_site(structure.sizes(weight.shape), None)
    gate.observe_weights([(weight, structure)])
    gate.link([gate])
    return gate


@pytest.mark.parametrize(
    ("p", "want"),
    [
        (hard([0, 0, 1, 1]), 6.0),
        (hard([0, 1, 0, 1]), 8.485),
        (hard([0, 0, 0, 0]), 24.0),
        (torch.ones(1, 4).double(), 8.485),
    ],
)
def test_the_worked_examples(p, want):
    assert float(regulariser(ROWS.double().square(), p, 1.0)) == pytest.approx(want, abs=2e-3)


@pytest.mark.parametrize(
    ("shares", "beta", "kept"),
    [((0.05, 0.10, 0.25, 0.60), 0.2, (0, 0, 1, 1)), ((0.25, 0.60, 0.05, 0.10), 0.2, (1, 1, 0, 0))],
)
def test_channels_go_while_the_running_sum_stays_below_beta(shares, beta, kept):
    assert (running_sums(torch.tensor([shares])) >= beta).int().tolist() == [list(kept)]


def test_a_larger_beta_drops_a_superset():
    torch.manual_seed(0)
    gate = gate_on(nn.Parameter(torch.randn(12, 9, 3, 3)))
    gate.alpha.copy_(torch.randn(2, 12))
    sums = running_sums(gate._energies())
    dropped = [sums < beta for beta in (0.05, 0.2, 0.5, 0.9)]
    assert all(bool((b | ~a).all()) for a, b in pairwise(dropped))
    assert bool((dropped[3].sum() > dropped[0].sum()).item())


def test_closed_forms_equal_finite_differences():
    torch.manual_seed(0)
    weight = torch.randn(6, 5, 4, dtype=torch.float64, requires_grad=True)  # filters, channels, taps
    p = torch.softmax(torch.randn(3, 6, dtype=torch.float64), 0).requires_grad_(True)
    value = lambda w, q: regulariser(w.square().sum(2), q, 2.0)  # noqa: E731
    assert torch.autograd.gradcheck(value, (weight, p))
    (grad,) = torch.autograd.grad(value(weight, p), weight)
    assert torch.allclose(grad, weight * coefficients(weight.square().sum(2), p, 2.0)[:, :, None])
    size, norm = p.sqrt().sum(1, keepdim=True), (p.square() @ weight.square().sum(2)).sqrt()
    squares, kappa = weight.square().sum(2), 2.0 * (3 / 6) ** 1.5
    closed = kappa * (size**2 * p * ((1 / norm) @ squares.T) + norm.sum(1, keepdim=True) * size / p.sqrt())
    assert torch.allclose(torch.autograd.grad(value(weight, p), p)[0], closed, rtol=1e-6)


def test_channels_of_zeros_give_no_nan():
    squares = torch.zeros(4, 3)
    squares[:, 0] = 1.0
    p = torch.full((2, 4), 0.5, requires_grad=True)
    assert torch.equal(coefficients(squares, p, 1.0)[:, 1:], torch.zeros(4, 2))
    (grad,) = torch.autograd.grad(regulariser(squares, p, 1.0) + coefficients(squares, p, 1.0).sum(), p)
    assert bool(grad.isfinite().all())


def test_the_noise_is_not_divided_by_the_temperature():
    torch.manual_seed(0)
    gate = gate_on(nn.Parameter(torch.randn(4000, 4, 1, 1)))
    gate.alpha[0] = 0.5
    first = (gate._drawn()[0] > 0.5).float().mean()  # P(alpha / tau + noise wins) = sigmoid(1), not sigmoid(0.5)
    assert abs(float(first) - float(torch.sigmoid(torch.tensor(1.0)))) < 4 * 0.0075


def learned(labels_from, steps, seed=0):
    """A layer of two planted families of filters, trained on a task while it sorts itself."""
    torch.manual_seed(seed)
    weight = nn.Parameter(0.1 * torch.randn(16, 8, 1, 1))
    weight.data[:8, :4] += torch.randn(8, 4, 1, 1)
    weight.data[8:, 4:] += torch.randn(8, 4, 1, 1)
    gate = gate_on(weight)
    target = labels_from(weight.detach())
    optimizer = torch.optim.Adam([weight], 0.01)
    start = regulariser(weight.detach().square().sum((2, 3)), torch.full((2, 16), 0.5), 1.0)
    for i in range(steps):
        gate.relaxed()
        x = torch.randn(32, 8, 1, 1)
        optimizer.zero_grad()
        (F.conv2d(x, weight) - F.conv2d(x, target)).square().mean().backward()
        optimizer.step()
        gate.after_step((i + 1) / steps * SPAN * 0.999)
    return gate, weight, float(start)


def test_planted_families_are_separated_and_the_regulariser_falls():
    gate, weight, start = learned(torch.clone, 400)
    groups = gate.alpha.argmax(0)
    agree = (groups == torch.arange(16) // 8).float().mean()
    assert max(float(agree), 1 - float(agree)) >= 0.9
    assert float(regulariser(weight.detach().square().sum((2, 3)), gate.members, 1.0)) < start


X = 0.5  # position t / T of the one step below; its shrinkage rate is 2 STRENGTH X^2


def logit_gradient(before, task_step):
    """[G, filters]: the gradient that one step gives the logits when the task moves the weight like this."""
    weight = nn.Parameter(before.clone())
    gate = gate_on(weight).double()
    gate.observe_weights([(weight, Kernels())])
    gate.relaxed()
    weight.data += task_step
    torch.manual_seed(1)
    gate.after_step(X * SPAN)
    return gate.first / 0.1  # Adam's first moment after one step


def shrinkage_and_membership(before):
    """(W -> dR/dW at the membership that the gate draws in that step, ln p): by autograd on the regulariser alone."""
    torch.manual_seed(1)
    log_p = gate_on(nn.Parameter(before.clone())).double()._drawn().log().requires_grad_(True)

    def slope(weight):
        weight = weight.clone().requires_grad_(True)
        value = regulariser(weight.square().sum((2, 3)), torch.softmax(log_p, 0), 3.0)
        return torch.autograd.grad(value, weight, create_graph=True)[0]

    return slope, log_p


def planted_layer():
    torch.manual_seed(0)
    return torch.randn(6, 5, 3, 3, dtype=torch.float64), 0.1 * torch.randn(6, 5, 3, 3, dtype=torch.float64)


def test_logits_get_the_mixed_second_derivative():
    """dR/dp at W2, and < d2R/dp dW at W, W2' - W1 >: what the task does to the shrunk weight reaches the logits."""
    before, step = planted_layer()
    slope, log_p = shrinkage_and_membership(before)
    rate = 2 * STRENGTH * X**2
    shrunk = before - rate * slope(before)
    moved = (shrunk + step - rate * slope(shrunk + step) - shrunk).detach()
    own = regulariser((shrunk + step).detach().square().sum((2, 3)), torch.softmax(log_p, 0), 3.0)
    (expected,) = torch.autograd.grad(own + (slope(before) * moved).sum(), log_p)
    assert torch.allclose(logit_gradient(before, step), expected / TAU, rtol=1e-8)


def test_the_task_reaches_the_logits():
    """Two task steps after which all kernels have the same norms, so that R's own gradient is the same, differ."""
    before, step = planted_layer()
    slope, _ = shrinkage_and_membership(before)
    shrunk = (before - 2 * STRENGTH * X**2 * slope(before)).detach()
    mirrored = -2 * shrunk - step  # W1 + step with the other sign
    assert torch.allclose((shrunk + step).square(), (shrunk + mirrored).square())
    one, other = logit_gradient(before, step), logit_gradient(before, mirrored)
    assert float((one - other).norm()) > 0.1 * float(one.norm())


def test_same_seed_same_groups():
    assert torch.equal(learned(torch.clone, 20)[0].alpha, learned(torch.clone, 20)[0].alpha)


def test_one_group_is_plain_input_channel_pruning():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 10, 3, 3))
    gate = gate_on(weight, groups=1, density=0.4)
    gate.after_step(SPAN)
    energy = weight.detach().square().sum((0, 2, 3))
    assert bool((gate.kept == gate.kept[0]).all())
    assert torch.equal(gate.kept[0] > 0, energy >= energy.topk(4).values[-1])


def test_density_is_met_over_all_layers_together():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(64, 128, 3, 3)), nn.Parameter(torch.randn(128, 64, 1, 1) * 3)]
    gates = [gate_on(w, groups=4, density=0.3) for w in weights]
    for gate in gates:
        gate.alpha.copy_(torch.randn(4, gate.rows))
        gate.link(gates)
    for gate in gates:
        gate.after_step(SPAN)
    kept = sum(float((g.kept * g.sizes).sum()) for g in gates)
    share = kept / sum(float(g.sizes.sum()) for g in gates)
    assert 0.295 <= share <= 0.3
    assert all(bool(g.decided) for g in gates)
    for gate in gates:  # all filters of a group decide alike
        for members in gate.members:
            rows = gate.kept[members > 0]
            assert bool((rows == rows[:1]).all())


def test_the_image_stays():
    gate = gate_on(nn.Parameter(torch.randn(8, LEAST - 1, 3, 3)), density=0.1)
    gate.after_step(1.0)
    assert gate.kept.all()


def grouped(name="plain"):
    make = lambda rows, n: Lasso(rows, n, density=0.4, groups=2)  # noqa: E731
    model, net, example = gated(name, make, sites=lambda network: masks(network, "kernels"))
    for gate in net.gates:
        gate.alpha.copy_(torch.randn_like(gate.alpha))
    return model, net, example


def test_masked_kernels_stay_exactly_zero_in_every_step():
    _, net, example = grouped()
    net.train()
    optimizer = torch.optim.Adam([p for group in net.weights().values() for p in group], 0.05)
    for i in range(8):
        optimizer.zero_grad()
        net(example).square().sum().backward()
        optimizer.step()
        net.after_step(SPAN + i / 100)
        net(example)
        for gate, site in zip(net.gates, net.sites, strict=True):
            weight = net.model.get_submodule(site.taps[0].layer).weight
            assert not weight[gate.kept == 0].any()
    assert any(bool((g.kept == 0).any()) for g in net.gates)


def test_one_row_is_the_plain_group_lasso_over_all_its_taps():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(3, 8))]
    gate = Lasso(1, 8, density=0.5)
    taps = [(weight, Inputs()) for weight in weights]
    gate.set_site(sum(Inputs().sizes(weight.shape) for weight in weights), None)
    gate.observe_weights(taps)
    gate.relaxed()
    before = [weight.detach().clone() for weight in weights]
    gate.after_step(SPAN / 2)
    norms = torch.cat(before).norm(dim=0)
    left = 1 - 2 * STRENGTH / 4 * 9**0.5 / norms  # rate 2 STRENGTH x dx at x = dx = 1/2; kappa = root of the size
    for weight, old in zip(weights, before, strict=True):
        assert torch.allclose(weight.detach(), old * left, atol=1e-5)
    gate.observe_weights(taps)
    gate.after_step(SPAN)
    energy = torch.cat(weights).detach().square().sum(0)
    assert sorted(energy.topk(4).indices.tolist()) == gate.keep()[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("name", ["plain", "residual"])
def test_branches_compute_and_cost_what_the_masked_layer_does(name):
    model, net, example = grouped(name)
    net.after_step(1.0)
    net.eval().freeze(net.plan())
    small, _ = rebuild(net, model)
    assert difference(net, small, example) < 1e-9
    packed = split_into_branches(small)
    cut = [m for m in packed.modules() if isinstance(m, Branches)]
    assert cut
    assert all(len(m.convs) <= 2 for m in cut)
    assert difference(small, packed, example) < 1e-9
    with torch.no_grad():
        assert float((small(example) - packed(example)).abs().max()) < 1e-5
    assert measure(packed, example)["macs"] == measure(small, example)["macs"]
    assert measure(packed, example)["bops"] == measure(small, example)["bops"]


def test_filters_that_read_nothing_give_their_bias():
    conv = nn.Conv2d(4, 6, 3, padding=1)
    mask = torch.ones(6, 4, 3, 3, dtype=torch.bool)
    mask[:2] = False
    mask[2:, :2] = False
    conv.weight.data *= mask
    conv.register_buffer("mask", mask)
    x = torch.randn(2, 4, 5, 5)
    packed = split_into_branches(nn.Sequential(conv))
    assert isinstance(packed[0], Branches)
    assert torch.allclose(packed(x), conv(x), atol=1e-6)
    assert torch.equal(packed(x)[:, 0], conv.bias[0].expand(2, 5, 5))


def test_branches_round_their_result_as_the_layer_does():
    conv = nn.Conv2d(4, 6, 3)
    mask = torch.ones(6, 4, 3, 3, dtype=torch.bool)
    mask[2:, :2] = False
    conv.weight.data *= mask
    conv.register_buffer("mask", mask)
    quantize_results(conv, IntegerQuantizer(torch.tensor(1.0), Fixed(3), True))
    model, x = nn.Sequential(conv).eval(), torch.randn(2, 4, 5, 5)
    branched = split_into_branches(model)
    assert torch.allclose(branched(x), model(x))
    restore_branches(model, "0", branched.state_dict())
    model.load_state_dict(branched.state_dict())
    assert torch.equal(model(x), branched(x))


def test_nothing_to_cut_is_refused():
    with pytest.raises(jpq.JpqError, match="dsp"):
        split_into_branches(nn.Sequential(nn.Conv2d(4, 6, 3)))


@pytest.mark.parametrize("density", [0.05, 0.02, 0.001])
def test_no_filter_loses_everything(density):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(16, 16, 3, 3)), nn.Parameter(torch.randn(16, 16, 3, 3) / 10)]
    gates = [gate_on(w, groups=4, density=density) for w in weights]
    for gate in gates:
        gate.alpha.copy_(torch.randn(4, gate.rows))
        gate.link(gates)
    for gate in gates:
        gate.after_step(SPAN)
    assert all(bool((g.kept.sum(1) >= 1).all()) for g in gates)
