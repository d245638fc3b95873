"""Gates that keep k units: the properties that their sheets name, and the faults of public code that stay away."""

import itertools
import math

import pytest
import torch
from torch import nn

from jpq.compression.attach import attach
from jpq.compression.masking import GateSample, MaskParametrization
from jpq.methods.gates import Admm, Feedback, GumbelTopK, LearnedTopK, Reweighted, SoftThreshold
from jpq.methods.gates.feedback import EVERY, FREEZE
from jpq.methods.gates.fixed_count import best_of_all
from jpq.methods.gates.gumbel_topk import draw_mass
from jpq.methods.gates.learned_topk import soft_topk
from jpq.methods.gates.soft_threshold import RAMP
from jpq.methods.quantizers import Fixed
from jpq.methods.structures import Elementwise, KernelPattern, PerOutput, Window, parse_structure
from jpq.tasks.models import build
from jpq.tracing.sites import masks
from jpq.tracing.trace import trace

COUNTED = [GumbelTopK, SoftThreshold, LearnedTopK, Feedback, Admm]


def seen(gate, weight, structure):
    """A gate bound to one weight, as `attach` does it."""
    gate.set_site(structure.sizes(weight.shape), structure.quota())
    gate.observe_weights([(weight, structure)])
    gate.link([gate])
    return gate


# --- all of them


@pytest.mark.parametrize("make", [gate for gate in COUNTED if gate.enforces_quota == "always"])
def test_patterns_are_never_piled_up(make):
    """Units that overlap: a row of ones would multiply the kernel's centre by the number of patterns."""
    torch.manual_seed(0)
    structure, conv = KernelPattern(), nn.Conv2d(3, 4, 3)
    gate = seen(make(*structure.shape(conv.weight.shape)), conv.weight, structure)
    for progress in (0.0, 0.3, 1.0):
        masked = MaskParametrization([(GateSample(gate, [(conv.weight, structure)]), structure)])
        share = (masked(conv.weight) / conv.weight).detach()
        assert bool(((share > -1e-6) & (share < 1 + 1e-6)).all())
        assert float(share.mean()) == pytest.approx(1.0 if make is Admm else 4 / 9, abs=1e-6)
        gate.after_step(progress)
    assert torch.equal(gate.keep().sum(1), torch.ones(12))


@pytest.mark.parametrize("make", [*COUNTED, Reweighted])
@pytest.mark.parametrize(("density", "kept"), [(0.01, 1.0), (0.7, 4.0)])
def test_every_row_keeps_a_unit_and_as_many_as_the_density_says_rounded_half_up(make, density, kept):
    torch.manual_seed(0)
    gate = seen(make(3, 5, density=density), nn.Parameter(torch.randn(3, 5)), PerOutput())
    for progress in (0.5, 1.0):
        gate.after_step(progress)
    assert gate.keep().sum(1).tolist() == [kept] * 3


@pytest.mark.parametrize("make", [Admm, Feedback, GumbelTopK, LearnedTopK, Reweighted])
def test_units_at_ragged_edges_rank_by_the_mean_of_their_weights(make):
    """Of a block of four weights of 0.9 and one of two weights of 1, the smaller one has less energy and stays."""
    structure, weight = parse_structure("block:2x2"), nn.Parameter(torch.tensor([[0.9, 0.9, 1.0], [0.9, 0.9, 1.0]]))
    assert structure.sizes(weight.shape).tolist() == [[4.0, 2.0]]
    gate = seen(make(1, 2, density=1 / 3), weight, structure)
    gate.after_step(1.0)
    assert gate.keep().tolist() == [[0.0, 1.0]]


def test_best_of_all_counts_weights_not_units():
    scores = [torch.tensor([[5.0, 1.0]]), torch.tensor([[4.0, 3.0, 0.0]])]
    sizes = [torch.tensor([[4.0, 4.0]]), torch.tensor([[1.0, 1.0, 0.0]])]  # the last unit is padding
    keep = best_of_all(scores, sizes, 0.6)
    assert [k.tolist() for k in keep] == [[[1.0, 0.0]], [[1.0, 1.0, 0.0]]]
    nothing = best_of_all(scores, sizes, 0.01)
    assert [k.tolist() for k in nothing] == [[[1.0, 0.0]], [[1.0, 0.0, 0.0]]]  # the best unit of a site always stays


# --- DPP


def slow_drawn(scores, k):
    """k softmaxes, one after the other, each over what the earlier draws left."""
    total, left = torch.zeros_like(scores), torch.zeros_like(scores)
    for index in scores.argsort(descending=True)[:k]:
        total = total + torch.softmax(scores + left, 0)
        left[index] = -math.inf
    return total


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("temperature", [5.0, 0.5, 0.01])
def test_the_closed_form_of_k_draws(k, temperature):
    torch.manual_seed(k)
    scores = (torch.randn(4, 7, dtype=torch.double) / temperature).requires_grad_()
    fast = draw_mass(scores, torch.full((4,), k))
    slow = torch.stack([slow_drawn(row, k) for row in scores])
    assert torch.allclose(fast, slow, atol=1e-10)
    weight = torch.randn(4, 7, dtype=torch.double)
    a, b = (torch.autograd.grad((f * weight).sum(), scores)[0] for f in (fast, slow))
    assert torch.allclose(a, b, atol=1e-8)


def test_draws_tend_to_the_mask_in_score_order():
    scores = torch.randn(3, 12, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    soft = draw_mass(scores / 1e-3, torch.full((3,), 4))
    hard = torch.zeros_like(scores).scatter(1, scores.topk(4, 1).indices, 1.0)
    assert (soft - hard).abs().sum() < 0.05  # by position instead of score it misses by whole units


def test_gumbel_mask_has_k_ones_and_gradients_that_sum_to_zero():
    torch.manual_seed(0)
    gate = GumbelTopK(5, 8, density=0.375)
    mask = gate.relaxed()
    assert torch.equal(mask.detach().sum(1), torch.full((5,), 3.0))
    assert set(mask.detach().unique().tolist()) == {0.0, 1.0}
    (mask * torch.randn(5, 8)).sum().backward()
    assert (gate.logits.grad != 0).all(), "dropped units must learn too"
    assert torch.allclose(gate.logits.grad.sum(1), torch.zeros(5), atol=1e-5)


def test_gumbel_frequencies_are_the_softmax():
    torch.manual_seed(0)
    gate = GumbelTopK(1, 3, density=1 / 3, noise=1.0, start="random")
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([[1.0, 0.0, -1.0]]))
    often = torch.stack([gate.relaxed().detach()[0] for _ in range(4000)]).mean(0)
    assert torch.allclose(often, torch.softmax(gate.logits.detach()[0], 0), atol=0.03)


def test_gumbel_temperature_falls_in_a_line_from_5_to_a_half():
    """T(e) = 5 (1 - 0.9 e / (E - 1)), the paper's law: 5, 2.75 and 0.5 at the start, the middle and the end."""
    gate = GumbelTopK(2, 4)
    assert float(gate.temperature) == 5.0
    for progress, expected in ((0.0, 5.0), (0.5, 2.75), (1.0, 0.5)):
        gate.after_step(progress)
        assert float(gate.temperature) == pytest.approx(expected)


def test_gumbel_draws_follow_the_temperature():
    """The relaxed draws behind the mask sharpen as T falls: the gradient is that of `draw_mass` at the gate's own T."""
    torch.manual_seed(0)
    gate = GumbelTopK(1, 6, density=0.5, noise=0.0, start="random")
    weight = torch.randn(1, 6)
    for progress, temperature in ((0.0, 5.0), (0.5, 2.75), (1.0, 0.5)):
        gate.after_step(progress)
        (found,) = torch.autograd.grad((gate.relaxed() * weight).sum(), gate.logits)
        (expected,) = torch.autograd.grad(
            (draw_mass(gate.logits / temperature, torch.tensor([3])) * weight).sum(), gate.logits
        )
        assert torch.allclose(found, expected, atol=1e-6)


def test_gumbel_penalty_is_the_entropy_of_each_row():
    """H = -sum p ln p with p = softmax(Phi): ln n where nothing is preferred, 0 where a row is certain, no padding."""
    gate = GumbelTopK(3, 4, density=0.25, start="random")
    gate.set_site(torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]), None)
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([[0.0, 0, 0, 0], [50, 0, 0, 0], [0, 0, 0, 9]]))
    assert gate.penalty().sum(1).tolist() == pytest.approx([math.log(4), 0.0, math.log(3)], abs=1e-5)


def test_gumbel_keeps_k_of_every_tile():
    torch.manual_seed(0)
    structure, weight = PerOutput(tiles=2), nn.Parameter(torch.randn(3, 8))
    gate = seen(GumbelTopK(*structure.shape(weight.shape), density=0.5), weight, structure)
    mask = structure.expand(gate.relaxed().detach(), weight.shape)
    assert torch.equal(mask.reshape(3, 2, 4).sum(2), torch.full((3, 2), 2.0))


def test_gumbel_metrics_at_their_ends():
    gate = GumbelTopK(2, 4, density=0.25, start="random")
    with torch.no_grad():
        gate.logits.zero_()
    assert gate.metrics() == pytest.approx({"confidence": 0.0, "diversity": 0.0}, abs=1e-6)
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([[50.0, 0, 0, 0], [0, 50.0, 0, 0]]))
    assert gate.metrics()["confidence"] == pytest.approx(1.0)
    assert gate.metrics()["diversity"] == pytest.approx(math.log(2) / math.log(4))


# --- PDP


def test_pdp_mask_is_the_formula_and_its_gradient():
    torch.manual_seed(0)
    weight = torch.randn(1, 9, dtype=torch.double, requires_grad=True)
    gate = seen(SoftThreshold(1, 9, density=4 / 9, tau=0.3), weight, Elementwise()).double()
    gate.after_step(1.0)
    gate.observe_weights([(weight, Elementwise())])
    m = gate.relaxed()
    size = weight.detach().abs().flatten().sort(descending=True).values
    t = float(size[3] + size[4]) / 2
    assert torch.allclose(m, torch.sigmoid((weight**2 - t * t) / 0.3))
    assert int((m >= 0.5).sum()) == 4
    (m * weight).sum().backward()  # the threshold is a constant: no weight gets more than the formula says
    md, w = m.detach(), weight.detach()
    assert torch.allclose(weight.grad, md + 2 * w**2 / 0.3 * md * (1 - md))
    assert (weight.grad[m < 0.5] > 0).all()


@pytest.mark.parametrize(("density", "kept"), [(1.0, 7), (1 / 7, 1)])
def test_pdp_ends_are_exact(density, kept):
    weight = nn.Parameter(torch.tensor([[3.0, -2.0, 1.0, 0.5, -4.0, 0.1, 6.0]]))
    gate = seen(SoftThreshold(1, 7, density=density), weight, Elementwise())
    gate.after_step(1.0)
    assert int(gate.keep().sum()) == kept
    if density == 1.0:
        assert torch.equal(gate.relaxed(), torch.ones(1, 7))


def test_pdp_turns_hard_as_tau_falls():
    weight = nn.Parameter(torch.tensor([[3.0, -2.0, 1.0, 0.5]]))
    gate = seen(SoftThreshold(1, 4, density=0.5, tau=1e-9), weight, Elementwise())
    gate.after_step(1.0)
    assert torch.equal(gate.relaxed(), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_pdp_is_as_soft_whatever_the_scale_of_a_layer(scale):
    """tau = t^2 / 8, with t halfway between the magnitudes 2 and 1."""
    squares = torch.tensor([[9.0, 4.0, 1.0, 0.25]])
    gate = seen(SoftThreshold(1, 4, density=0.5), nn.Parameter(scale * squares.sqrt()), Elementwise())
    gate.after_step(1.0)
    assert torch.allclose(gate.relaxed(), torch.sigmoid(8 * (squares - 1.5**2) / 1.5**2), atol=1e-5)


def test_pdp_shares_weigh_units_of_several_sizes_by_the_mean_of_their_weights():
    """Two blocks of four weights of 0.9 against two of two weights of 1: the small ones stay, and one of the others."""
    parts = [("block:2x2", torch.full((2, 4), 0.9)), ("block:1x2", torch.ones(2, 2))]
    gates = [SoftThreshold(1, 2, density=1 / 3) for _ in parts]
    for gate, (text, weight) in zip(gates, parts, strict=True):
        seen(gate, nn.Parameter(weight), parse_structure(text))
    gates[0].link(gates)
    assert [gate.final for gate in gates] == [0.5, 1.0]


def test_pdp_shares_come_from_one_quantile_and_ramp_up():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(1, n) * scale) for n, scale in ((40, 1.0), (60, 0.1), (100, 0.5))]
    gates = [SoftThreshold(1, w.numel(), density=0.3) for w in weights]
    for gate, weight in zip(gates, weights, strict=True):
        gate.observe_weights([(weight, Elementwise())])
    for gate in gates:
        gate.link(gates)
    kept = [gate.final * gate.n for gate in gates]
    assert sum(kept) == pytest.approx(0.3 * 200, abs=3)  # one weight per layer
    assert gates[0].final > gates[2].final > gates[1].final
    gates[0].after_step(RAMP / 2)
    assert float(gates[0].now) == pytest.approx((1 + gates[0].final) / 2)
    gates[0].after_step(RAMP)
    assert float(gates[0].now) == pytest.approx(gates[0].final)
    # a state brings the share with it, into a session that began at other weights
    state, other = gates[0].state_dict(), SoftThreshold(1, 40, density=0.3)
    other.load_state_dict(state)
    assert other.final == gates[0].final
    SoftThreshold(1, 40).load_state_dict({"now": state["now"], "sizes": state["sizes"]})  # as older ones are


# --- SMART


@pytest.mark.parametrize("tau", [1.0, 0.05, 1e-3])
def test_smart_sums_to_k_and_does_not_mind_a_shift(tau):
    torch.manual_seed(0)
    m, sizes = torch.randn(3, 20, dtype=torch.double), torch.randint(1, 9, (3, 20)).double()
    k = sizes.sum(1) * torch.tensor([0.1, 0.5, 0.9], dtype=torch.double)
    f = soft_topk(m, sizes, k, torch.tensor(tau, dtype=torch.double))
    assert ((sizes * f).sum(1) - k).abs().max() < 1e-6
    assert bool(((f >= 0) & (f <= 1)).all())
    assert torch.allclose(f, soft_topk(m + 3.0, sizes, k, torch.tensor(tau, dtype=torch.double)), atol=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
def test_smart_gradient_is_exact(weighted):
    torch.manual_seed(1)
    m = torch.randn(2, 6, dtype=torch.double, requires_grad=True)
    sizes = torch.randint(1, 5, (2, 6)).double() if weighted else torch.ones(2, 6, dtype=torch.double)
    k, tau = sizes.sum(1) * 0.4, torch.tensor(0.7, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda x: soft_topk(x, sizes, k, tau), (m,), atol=1e-7)
    g = torch.randn(2, 6, dtype=torch.double)
    (grad,) = torch.autograd.grad((soft_topk(m, sizes, k, tau) * g).sum(), m)
    if not weighted:
        assert grad.sum(1).abs().max() < 1e-10
    f = soft_topk(m, sizes, k, tau).detach()
    assert not torch.allclose(grad, f * (1 - f) * g / tau, atol=1e-3), "lambda was taken for a constant"


def test_smart_gradient_is_scaled_by_tau_where_the_gate_asks_for_it():
    """Steps do not explode as tau falls."""
    torch.manual_seed(1)
    m, sizes, tau = torch.randn(2, 6, requires_grad=True), torch.ones(2, 6), torch.tensor(0.3)
    g, k = torch.randn(2, 6), torch.tensor([2.0, 3.0])
    plain, scaled = (torch.autograd.grad((soft_topk(m, sizes, k, tau, s) * g).sum(), m)[0] for s in (False, True))
    assert plain.abs().max() > 1e-3
    assert torch.allclose(scaled, tau * plain, rtol=1e-5)


def test_smart_becomes_the_hard_ranking():
    m = torch.tensor([[0.6, 0.5, 0.4, -0.2]], dtype=torch.double, requires_grad=True)
    one, k = torch.ones(1, 4, dtype=torch.double), torch.tensor([2.0], dtype=torch.double)
    warm = soft_topk(m, one, k, torch.tensor(1.0))
    assert torch.allclose(warm, torch.tensor([[0.57, 0.54, 0.52, 0.37]], dtype=torch.double), atol=0.01)
    assert torch.allclose(soft_topk(m, one, k, torch.tensor(1e-3)), torch.tensor([[1.0, 1, 0, 0]], dtype=torch.double))
    (grad,) = torch.autograd.grad(warm[0, 0], m)
    assert (grad != 0).all(), "blocks outside the top k learn too"


def test_smart_cools_geometrically_to_a_thousandth():
    gate = LearnedTopK(1, 4)
    start = float(gate.temperature())
    for progress, factor in ((0.0, 1.0), (0.5, 1000**-0.5), (1.0, 1e-3), (1.5, 1e-3)):
        gate.after_step(progress)
        assert float(gate.temperature()) == pytest.approx(start * factor, rel=1e-5)


def test_smart_ranks_all_layers_at_once():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(1, 30)), nn.Parameter(torch.randn(1, 30) * 0.01)]
    gates = [LearnedTopK(1, 30, density=0.5) for _ in weights]
    for gate, weight in zip(gates, weights, strict=True):
        gate.observe_weights([(weight, Elementwise())])
    for gate in gates:
        gate.link(gates)
    soft = [gate.relaxed() for gate in gates]
    assert float(sum(f.sum() for f in soft)) == pytest.approx(30, abs=1e-3)
    assert sum(int(gate.keep().sum()) for gate in gates) == 30
    assert int(gates[0].keep().sum()) > 25
    sum((f**2).sum() for f in soft).backward()
    assert all(gate.scores.grad is not None for gate in gates)
    with torch.no_grad():  # a changed score must not be answered from what was ranked before
        gates[1].scores.add_(100.0)
    assert int(gates[1].keep().sum()) == 30
    assert int(gates[0].keep().sum()) == 1  # the best unit of a site always stays


# --- DPF


def test_dpf_gives_dropped_weights_the_gradient_of_kept_ones():
    weight = nn.Parameter(torch.tensor([[1.0, 0.2]]))
    gate = seen(Feedback(1, 2, density=0.5), weight, Elementwise())
    for step in range(EVERY):
        gate.observe_weights([(weight, Elementwise())])
        gate.after_step(FREEZE * (step + 1) / EVERY)
    draw = GateSample(gate)
    masked = MaskParametrization([(draw, Elementwise())])(weight)
    assert masked.tolist() == [[1.0, 0.0]]
    ((masked - torch.tensor([[0.0, 1.0]])) ** 2).sum().backward()
    assert weight.grad.tolist() == [[2.0, -2.0]]


def test_dpf_leaves_each_layer_its_own_part_of_the_common_mask():
    weights = [nn.Parameter(torch.tensor([row])) for row in ([5.0, 0.1, 0.2], [3.0, 4.0])]
    gates = [Feedback(1, weight.numel(), density=0.6) for weight in weights]
    for gate, weight in zip(gates, weights, strict=True):
        gate.observe_weights([(weight, Elementwise())])
    for gate in gates:
        gate.link(gates)
    assert [gate.least().tolist() for gate in gates] == [[[1.0, 0.0, 0.0]], [[1.0, 1.0]]]


def test_dpf_mask_swaps_and_then_stays():
    weight = nn.Parameter(torch.tensor([[1.0, 0.2]]))
    gate = seen(Feedback(1, 2, density=0.5), weight, Elementwise())
    gate.kept.copy_(torch.tensor([[1.0, 0.0]]))
    draw, history = GateSample(gate, []), []
    masked = MaskParametrization([(draw, Elementwise())])
    for _ in range(200):
        gate.observe_weights([(weight, Elementwise())])
        draw.resample()
        loss = ((masked(weight) - torch.tensor([[0.0, 1.0]])) ** 2).sum()
        (grad,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight -= 0.05 * grad
        gate.after_step(0.7)
        history.append(gate.keep()[0].tolist())
    assert history[EVERY - 2] == [1.0, 0.0]
    assert all(kept == [0.0, 1.0] for kept in history[2 * EVERY :])


def test_dpf_follows_the_cubic_and_freezes():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(1, 1000))
    gate = seen(Feedback(1, 1000, density=0.1), weight, Elementwise())
    masks = []
    for step in range(1, 401):
        with torch.no_grad():
            weight.copy_(torch.randn(1, 1000))  # the ranking changes all the time
        gate.observe_weights([(weight, Elementwise())])
        gate.after_step(step / 400)
        masks.append(gate.keep().clone())
        if step % EVERY == 0 and step < 300:
            assert float(masks[-1].mean()) == pytest.approx(1 - 0.9 * (1 - (1 - step / 300) ** 3), abs=2e-3)
    changed = [s + 1 for s in range(1, 400) if not torch.equal(masks[s], masks[s - 1])]
    assert all(s % EVERY == 0 or s == 300 for s in changed)
    assert max(changed) == 300
    assert float(masks[-1].mean()) == pytest.approx(0.1, abs=1e-3)


# --- ADMM


def test_admm_projects_onto_the_nearest_point():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(2, 6))
    gate = seen(Admm(2, 6, density=1 / 3), weight, PerOutput())
    best = min(
        float((weight.detach() * (1 - torch.tensor(mask))).square().sum())
        for rows in itertools.product(itertools.combinations(range(6), 2), repeat=2)
        for mask in [[[float(c in row) for c in range(6)] for row in rows]]
    )
    assert float((weight.detach() - gate.near(0)).square().sum()) == pytest.approx(best)


def test_admm_drives_weights_to_the_structure():
    torch.manual_seed(0)
    weight, target = nn.Parameter(torch.randn(4, 8)), torch.randn(4, 8)
    gate = seen(Admm(8, 4, density=0.5), weight, Window(2, 4))
    optim = torch.optim.SGD([weight], lr=0.2)
    residual = []
    for step in range(2000):
        gate.observe_weights([(weight, Window(2, 4))])
        loss = 0.01 * ((weight - target) ** 2).sum() + gate.own_loss()
        optim.zero_grad()
        loss.backward()
        optim.step()
        gate.after_step((step + 1) / 2000)
        residual.append(gate.metrics()["residual"])
    assert residual[-1] < 0.3 * residual[400]
    mask = Window(2, 4).expand(gate.keep(), weight.shape)
    assert float((weight.detach() * (1 - mask)).norm() / weight.detach().norm()) < 0.1


def test_admm_trains_the_dense_network_also_where_patterns_overlap():
    torch.manual_seed(0)
    model, x = build("convnet", 10, 1).eval(), torch.randn(4, 1, 8, 8)
    network = trace(model, x)
    width = lambda _: (Fixed(8), Fixed(8))  # noqa: E731
    ours, plain = (
        attach(model, network, sites, Admm, width, [x], "admm") for sites in (masks(network, "pattern", ()), ())
    )
    assert torch.equal(ours.train()(x), plain.train()(x))
    assert not torch.equal(ours.eval()(x), plain.eval()(x))


def test_admm_rescales_its_dual_when_rho_rises():
    weight = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    gate = seen(Admm(1, 4, density=0.5), weight, Elementwise())
    for i in range(1, 5):
        gate.after_step(i / 20)
    before, rho = gate.dual(0).clone(), gate.rho
    gate.after_step(5 / 20)
    assert gate.rho == pytest.approx(10 * rho)
    step = weight.detach() - gate.near(0)
    assert torch.allclose(gate.dual(0) * gate.rho, (before + step) * rho, rtol=1e-5)


def test_admm_keeps_a_chosen_unit_that_happens_to_be_zero():
    weight = nn.Parameter(torch.tensor([[5.0, 0.0, 0.0, 0.0]]))
    gate = seen(Admm(1, 4, density=0.5), weight, Elementwise())
    assert int(gate.keep().sum()) == 2


def test_admm_decides_by_the_weights_alone_when_the_search_has_ended():
    """The mask is that of Pi(W), the nearest point to the last weights, whatever U says and however W moved since."""
    torch.manual_seed(0)
    model, x = build("convnet", 10, 1).eval(), torch.randn(2, 1, 8, 8)
    network = trace(model, x)
    sites = masks(network, "pattern", ())
    net = attach(model, network, sites, Admm, lambda _: (Fixed(8), Fixed(8)), [x], "admm").train()
    net(x)
    for i in range(1, 20):
        for draw in net.draws:
            for weight, _ in draw.reach:
                weight.data.add_(0.3 * weight.abs().mean() * torch.randn_like(weight))
        net.after_step(i / 20)
    stale = [gate.keep().clone() for gate in net.gates]
    net.finish_search()
    assert any(not torch.equal(gate.keep(), before) for gate, before in zip(net.gates, stale, strict=True))
    for draw in net.draws:
        ((weight, structure),) = draw.reach
        energy = structure.pool(weight.detach().square())
        assert torch.equal(draw.gate.keep().argmax(1), energy.argmax(1))
        assert bool((draw.gate.keep().sum(1) == 1).all())
        assert draw.gate.dual(0).abs().max() > 0  # a search that goes on to the next budget has its U
