"""SPP: probabilities that go up and down, exactly the asked number at the end, and weights that wait unchanged."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from gated import gated
from torch import nn

from jpq.compression.masking import GateSample, MaskParametrization
from jpq.export.rebuild import rebuild
from jpq.export.verify import difference
from jpq.methods.gates import Stochastic
from jpq.methods.gates.stochastic import RISE, SPAN, TURN, UPDATES, probability_change
from jpq.methods.structures import Axis


def columns(n=8, density=0.5, seed=0):
    """A gate on the input columns of one linear weight, as `attach` makes it."""
    torch.manual_seed(seed)
    weight = nn.Parameter(torch.randn(5, n))
    axis = Axis(1, np.arange(n), n)
    gate = Stochastic(1, n, density)
    gate.set_site(axis.sizes(weight.shape), None)
    gate.observe_weights([(weight, axis)])
    return gate, weight


def steps(gate, count, start=0):
    """`count` updates, one optimiser step each, the gate drawing before each."""
    for i in range(start + 1, start + count + 1):
        gate.relaxed()
        gate.after_step((i + 0.5) / UPDATES * SPAN)
        assert int(gate.updates) == i


def test_the_worked_example():
    found = probability_change(torch.arange(8.0), torch.tensor(4))
    want = [0.05, 0.02973, 0.01768, 0.01013, 0.0, -0.01704, -0.04571, -0.09392]
    assert found.tolist() == pytest.approx(want, abs=6e-6)


@pytest.mark.parametrize("left", [1, 2, 5, 40, 300])
def test_identities_of_the_change(left):
    a = (math.log(2) - math.log(TURN)) / left
    turn = -math.log(TURN) / a
    at = lambda r: probability_change(torch.as_tensor(r, dtype=torch.float64), torch.tensor(left))  # noqa: E731
    assert float(at(0.0)) == pytest.approx(RISE)
    assert float(at(turn)) == pytest.approx(TURN * RISE)
    assert float(at(float(left))) == pytest.approx(0, abs=1e-9)
    offset = torch.linspace(0, turn, 30, dtype=torch.float64)
    assert torch.allclose(at(turn + offset) + at(turn - offset), torch.full((30,), 2 * TURN * RISE).double())
    ranks = at(torch.arange(left + 600))
    assert bool(ranks.isfinite().all())  # far ranks are bounded
    assert bool((ranks[: left + 20].diff() < 0).all())
    assert torch.equal(ranks > 1e-12, torch.arange(left + 600) < left)


def test_twenty_updates_at_the_last_rank_and_a_unit_is_out():
    gate, weight = columns()
    weight.data = torch.arange(1.0, 9.0).expand(5, 8).clone()
    steps(gate, 19)
    assert gate.keep().sum() == 8
    steps(gate, 1, 19)
    assert gate.p[0, 0] == 1
    assert gate.keep().tolist() == [[0, 1, 1, 1, 1, 1, 1, 1]]


def test_an_early_bad_rank_recovers_and_what_is_out_stays_out():
    gate, weight = columns()
    weight.data = torch.arange(1.0, 9.0).expand(5, 8).clone()
    steps(gate, 12)
    high = float(gate.p[0, 1])
    assert high > 0.3
    weight.data[:, 1] = 50.0
    falling = []
    for i in range(12, 45):
        steps(gate, 1, i)
        falling.append(float(gate.p[0, 1]))
    assert falling[-1] == 0
    assert gate.p[0, 0] == 1
    weight.data[:, 0] = 100.0  # too late
    steps(gate, UPDATES - 45, 45)
    assert gate.p[0, 0] == 1
    assert gate.keep()[0, 1] == 1
    assert gate.keep().sum() == 4


@pytest.mark.parametrize(("n", "density"), [(8, 0.5), (16, 0.25), (64, 0.75), (33, 0.9), (5, 0.5), (4, 1.0)])
def test_exactly_the_asked_number_goes_and_never_more_on_the_way(n, density):
    gate, weight = columns(n, density, seed=n)
    wanted = math.floor(density * n + 0.5)
    for i in range(UPDATES):
        steps(gate, 1, i)
        weight.data += 0.05 * torch.randn_like(weight)  # ranks that wander
        assert gate.keep().sum() >= wanted
    assert gate.keep().sum() == wanted
    assert set(gate.p.unique().tolist()) <= {0.0, 1.0}
    mask = gate.keep().clone()
    weight.data = torch.randn_like(weight)
    for _ in range(5):  # fixed from now on
        assert torch.equal(gate.relaxed(), mask)
        gate.after_step(1.0)
        assert torch.equal(gate.keep(), mask)


def test_a_stale_count_would_overshoot():
    """With K from the beginning instead of from each update, units beyond the target rise too."""
    ranks = torch.arange(512.0)
    p, out = torch.zeros(512), torch.zeros(512, dtype=torch.bool)
    for _ in range(400):
        order = ranks.masked_fill(out, math.inf).argsort().argsort().float()
        p = torch.where(out, p, (p + probability_change(order, torch.tensor(384))).clamp(0, 1))
        out = p >= 1 - 1e-6
        if int(out.sum()) >= 384:
            break
    assert int(out.sum()) > 384
    gate, weight = columns(512, 0.25)
    weight.data = torch.arange(1.0, 513.0).expand(5, 512).clone()
    steps(gate, UPDATES - 1)
    assert int(gate.out.sum()) == 384


def test_few_steps_still_make_all_updates():
    gate, _ = columns(64, 0.5)
    for progress in (0.3, 0.6, 0.92):
        gate.relaxed()
        gate.after_step(progress)
    assert int(gate.updates) == UPDATES
    assert gate.keep().sum() == 32


def test_ranks_average_over_updates_not_iterations():
    gate, weight = columns(4, 0.5)
    weight.data = torch.tensor([4.0, 3.0, 2.0, 1.0]).expand(5, 4).clone()
    for _ in range(10):  # many iterations before the first update
        gate.relaxed()
        gate.after_step(0.0)
    steps(gate, 1)
    assert gate.rank.tolist() == [[3, 2, 1, 0]]
    weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(5, 4).clone()
    steps(gate, 1, 1)
    assert gate.rank.tolist() == [[1.5, 1.5, 1.5, 1.5]]
    assert gate._order().tolist() == [[0, 1, 2, 3]]  # ties go by number


def test_importance_is_the_l1_norm_over_all_taps():
    gate, weight = columns()
    other = nn.Parameter(torch.randn(3, 8))
    gate.observe_weights([(weight, Axis(1, np.arange(8), 8)), (other, Axis(1, np.arange(8), 8))])
    assert torch.allclose(gate.importance()[0], weight.abs().sum(0) + other.abs().sum(0))


def test_masks_are_drawn_per_unit_with_their_probability():
    gate, weight = columns(6)
    gate.p.copy_(torch.tensor([[0.0, 0.1, 0.3, 0.5, 0.9, 1.0]]))
    count = 4000
    draws = []
    for _ in range(count):
        draws.append(gate.relaxed()[0])
        gate.drawn.fill_(False)
    mean, want = torch.stack(draws).mean(0), 1 - gate.p[0]
    assert bool(((mean - want).abs() <= 4 * (want * (1 - want) / count).sqrt()).all())
    masked = MaskParametrization([(GateSample(gate), gate.weights[0][1])])(weight)
    assert all(bool((c == 0).all()) or bool((c != 0).all()) for c in masked.T)


def test_one_draw_for_all_the_forward_passes_of_a_step():
    gate, _ = columns(64)
    gate.p.fill_(0.5)
    first = gate.relaxed()
    assert all(torch.equal(gate.relaxed(), first) for _ in range(5))
    gate.after_step(0.0)
    assert not torch.equal(gate.relaxed(), first)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_masked_weights_wait_unchanged_whatever_the_optimiser_does(make):
    gate, weight = columns()
    gate.p.copy_(torch.tensor([[0.5] * 8]))
    more = {"momentum": 0.9} if make is torch.optim.SGD else {}
    optimizer = make([weight], lr=0.1, weight_decay=0.1, **more)
    draw = GateSample(gate, [])
    tap = MaskParametrization([(draw, gate.weights[0][1])])
    moved = 0
    for _ in range(30):
        draw.resample()
        before = weight.detach().clone()
        optimizer.zero_grad()
        (tap(weight) - 1).square().sum().backward()
        optimizer.step()
        would = weight.detach().clone()
        gate.after_step(0.0)
        off = gate.z[0] == 0
        assert torch.equal(weight[:, off], before[:, off])
        assert torch.equal(weight[:, ~off], would[:, ~off])
        moved += int((would[:, off] != before[:, off]).any())
    assert moved > 10  # momentum and decay would have moved them


def test_survivors_take_the_mean_of_their_masks_into_their_weights():
    gate, weight = columns()
    gate.p.copy_(torch.tensor([[1.0, 1.0, 1.0, 0.99, 0.2, 0.0, 0.4, 0.0]]))
    weight.data = torch.arange(1.0, 9.0).expand(5, 8).clone()
    gate.eval()
    before = (weight * gate.multiplier()).detach().clone()
    left = gate.p.clone()
    with torch.no_grad():
        gate._update()  # 0.99 rises to 1
    left[0, 3] = 1.0
    assert gate.p.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
    after = (weight * gate.multiplier()).detach()
    change_at = (after - before)[:, 4:]
    rates = probability_change(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor(1))  # what this one update took off p
    assert bool((rates < 1e-6).all())
    moved = (left[0, 4:] - (left[0, 4:] + rates).clamp(0, 1)) * torch.arange(5.0, 9.0)
    assert torch.allclose(change_at, moved.expand(5, 4), atol=1e-6)


@pytest.mark.parametrize(
    ("p", "kept"), [([0.5, 0.5, 0.5, 0.5], [1.0, 0.0, 1.0, 0.0]), ([0.9, 0.1, 0.5, 0.5], [0.0, 1.0, 1.0, 0.0])]
)
def test_the_cut_at_the_end_takes_the_likeliest_and_of_equal_ones_the_least_important(p, kept):
    gate, _ = columns(4)
    gate.updates.fill_(UPDATES)
    gate.p.copy_(torch.tensor([p]))
    gate.rank.copy_(torch.tensor([[3.0, 0.0, 2.0, 1.0]]))
    gate.after_step(1.0)
    assert gate.keep().tolist() == [kept]


def test_same_seed_same_run():
    runs = []
    for _ in range(2):
        gate, weight = columns(16, seed=3)
        optimizer = torch.optim.SGD([weight], 0.1)
        draw = GateSample(gate, [])
        for i in range(60):
            draw.resample()
            optimizer.zero_grad()
            MaskParametrization([(draw, gate.weights[0][1])])(weight).square().sum().backward()
            optimizer.step()
            gate.after_step(i / 60)
        runs.append((weight.detach().clone(), gate.p.clone()))
    assert all(torch.equal(a, b) for a, b in pairwise([r[0] for r in runs]))
    assert torch.equal(runs[0][1], runs[1][1])


def test_the_state_between_steps_is_all_in_the_state_dict():
    gate, _ = columns(16, seed=1)
    steps(gate, 30)
    other, _ = columns(16, seed=1)
    other.relaxed()  # as attach does
    other.load_state_dict(gate.state_dict())
    for one in (gate, other):
        torch.manual_seed(5)
        steps(one, 20, 30)
    assert all(torch.equal(a, b) for a, b in zip(gate.buffers(), other.buffers(), strict=True))


def test_decided_probabilities_equal_the_hard_mask():
    model, net, example = gated("residual", Stochastic)
    for i in range(1, 12):
        net.train()
        net(example)
        net.after_step(i / 11)
    assert all(set(g.p.unique().tolist()) <= {0.0, 1.0} for g in net.gates)
    assert all(int(g.keep().sum()) == math.floor(g.n / 2 + 0.5) for g in net.gates)
    with torch.no_grad():
        before = net.eval()(example)
        net.freeze(net.plan())
        assert torch.equal(net(example), before)
    small, plan = rebuild(net, model)
    assert difference(net, small, example) < 1e-9
    assert any(not all(kept) for kept in plan.kept.values())
