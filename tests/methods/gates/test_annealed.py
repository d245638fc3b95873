"""DAIS: indicators that anneal, and two halves of the data that never meet."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from gated import gated

import jpq
from jpq import costs
from jpq.costs.target import Controller, Target
from jpq.methods.gates import Annealed
from jpq.methods.gates.annealed import COLD, STRENGTH
from jpq.tasks.data import load
from jpq.training.epochs import Phase
from jpq.training.history import NullObserver
from jpq.training.loop import Objective, Recorder, build_optimizer, fit
from jpq.types import JpqError


def annealed(alpha, progress):
    gate = Annealed(1, len(alpha))
    gate.alpha.data = torch.tensor([alpha])
    gate.after_step(progress)
    return gate


def test_temperature_follows_the_law():
    gate = Annealed(1, 1)
    assert float(gate.temperature) * COLD == 1  # T = 1
    for progress in (0.0, 0.25, 0.5, 1.0):
        gate.after_step(progress)
        assert float(gate.temperature) * COLD == pytest.approx(1 / (1 + 49 * progress))
    assert float(gate.temperature) * COLD == pytest.approx(0.02)


def test_cold_indicators_are_binary_and_the_rest_falls_on_the_way():
    alpha = torch.linspace(-5, 5, 40).tolist()
    rest = []
    for progress in torch.linspace(0, 1, 12).tolist():
        indicator = annealed(alpha, progress).relaxed()
        rest.append(float((indicator - indicator.round()).abs().max()))
    assert all(b < a for a, b in pairwise(rest))
    gate = annealed(alpha, 1.0)
    gate.temperature.fill_(1e-6)
    assert torch.equal(gate.relaxed(), (gate.alpha > 0).float())
    assert torch.equal(gate.keep(), (gate.alpha > 0).float())


def test_starts_at_half_with_everything_kept():
    torch.manual_seed(0)
    gate = Annealed(1, 500)
    assert bool((gate.alpha > 0).all())
    assert float(gate.alpha.detach().max()) * COLD <= 0.1
    assert float(gate.relaxed().detach().max()) < 0.53
    lasso = float(gate.relaxed().detach().abs().sum())
    assert float(gate.penalty().detach().sum()) == pytest.approx(STRENGTH * lasso)


def test_budget_presses_above_and_never_below():
    """The paper also pushes up where E < (1 - tol) F; here landing spends what is left (see `Annealed`)."""
    _, net, _ = gated("residual", Annealed)
    full = costs.macs(net.exact_usage())
    for limit, signs in ((0.5, {1.0}), (1.0, {0.0}), (2.0, {0.0})):
        controller = Controller((Target("macs", "", math.floor(full * limit)),), pressure={"macs": 1.0})
        controller.start = {"macs": 1.0}
        loss = controller.loss(net.soft_usage(), 1.0) + 0 * sum(g.alpha.sum() for g in net.gates)
        grads = torch.autograd.grad(loss, [g.alpha for g in net.gates])
        assert {float(s) for g in grads for s in g.sign().unique()} == signs


def test_gradient_of_the_budget_is_the_closed_form():
    _, net, _ = gated("plain", Annealed)
    for gate in net.gates:
        gate.after_step(0.3)
    cost = costs.macs(net.soft_usage())
    grads = torch.autograd.grad(cost.log(), [g.alpha for g in net.gates])
    full = costs.macs(net.exact_usage())
    for i, (gate, site, grad) in enumerate(zip(net.gates, net.sites, grads, strict=True)):
        plan = net.plan()
        kept = tuple(u != 0 for u in range(site.n))
        saved = full - costs.macs(net.exact_usage(jpq.Plan(plan.method, plan.layers, {**plan.kept, site.name: kept})))
        one = gate.relaxed().detach()[0, 0]
        slope = float(one * (1 - one) / gate.temperature)  # I (1 - I) / T
        assert float(grad[0, 0]) == pytest.approx(float(saved) / float(full) * slope, rel=1e-4), i


def test_layers_joined_by_an_add_share_one_indicator():
    _, net, _ = gated("residual", Annealed)
    joined = [s for s in net.sites if len(s.producers) > 1]
    assert joined
    assert all(len(s.producers) == 2 and s.n == 8 for s in joined)


# --- bi-level


@pytest.fixture(scope="module")
def digits():
    return load("digits", batch_size=64, augment=False, limit=400)


def attached(digits):
    torch.manual_seed(0)
    model = jpq.tasks.models.build("convnet", 10, 1)
    return model, jpq.compress(model.eval(), digits.example, "dais", bops="1%", steps=100)


def test_halves_are_disjoint_whole_and_the_same_in_every_epoch(digits):
    key = lambda x: {row.numpy().tobytes() for row in x}  # noqa: E731
    every = key(digits.train.normalise(digits.train.images))
    seen = [set(), set()]
    orders = []
    for epoch in range(3):
        for half, part in zip(digits.train.halves(), seen, strict=True):
            batches = [x for x, _ in half.epoch(epoch)]
            now = key(torch.cat(batches))
            orders.append(batches[0])
            assert not part or now == part
            part |= now
    one, other = seen
    assert not one & other
    assert one | other == every
    assert abs(len(one) - len(other)) <= 1
    assert not torch.equal(orders[0], orders[2])  # shuffled anew
    counts = [torch.bincount(h.labels, minlength=10) for h in digits.train.halves()]
    assert int((counts[0] - counts[1]).abs().max()) <= 2  # stratified


def test_too_few_samples_cannot_be_halved(digits):
    few = load("digits", limit=4)
    with pytest.raises(JpqError, match="at least 4"):
        few.train.halves()


class Each(NullObserver):
    """Copies of all parameters after every step."""

    def __init__(self, net):
        self.net, self.copies = net, []

    def step(self, loss, bops_share, limit_share):
        self.copies.append({k: p.detach().clone() for k, p in self.net.named_parameters()})


def test_a_step_of_one_side_leaves_the_other_bit_for_bit(digits):
    _, joint = attached(digits)
    net = joint.net
    deciding = {id(p) for group in net.decisions().values() for p in group}
    side = {k: "decisions" if id(p) in deciding else "weights" for k, p in net.named_parameters()}
    assert {k for k in side if "alpha" in k or k.endswith("bits")} == {k for k in side if side[k] == "decisions"}
    each, read = Each(net), []
    net.register_forward_pre_hook(lambda m, args: read.append(args[0]) if m.training else None)
    optim = build_optimizer(net, 1e-2, 0.1, 0.05, 0.02)
    phase = Phase("search", 2)
    start = {k: p.detach().clone() for k, p in net.named_parameters()}
    fit(net, digits, phase, Objective(controller=joint.controller, gate_weight=0.1), optim, Recorder(lambda: 0.0), each)
    copies = [start, *each.copies]
    assert len(copies) > 9
    for i, (a, b) in enumerate(pairwise(copies)):
        learns = ("weights", "decisions")[i % 2]
        changed = {k for k in a if not torch.equal(a[k], b[k])}
        assert {side[k] for k in changed} == {learns}, i
    halves = [h.normalise(h.images) for h in digits.train.halves()]
    for i, x in enumerate(read):  # and each side reads its own half
        held = [any(torch.equal(row, image) for image in halves[i % 2]) for row in x[:5]]
        assert all(held)
    net.set_trainable("both")
    assert all(p.requires_grad for p in net.parameters())


def test_the_weights_side_pays_no_budget(digits):
    _, joint = attached(digits)
    x, y = next(iter(digits.train.epoch(0)))
    objective = Objective(controller=joint.controller, gate_weight=0.1)
    pressure = dict(joint.controller.pressure)
    torch.manual_seed(0)
    assert float(objective(joint.net, x, y, 0.5, "weights").detach()) == pytest.approx(
        float(F.cross_entropy(joint.net(x), y).detach())
    )
    assert joint.controller.pressure == pressure
    objective(joint.net, x, y, 0.5, "decisions")
    assert joint.controller.pressure != pressure


def test_a_users_own_loop_alternates_by_itself(digits):
    _, joint = attached(digits)
    optim = torch.optim.AdamW(joint.groups(weight_decay=0.1))
    joint.train()
    for i in range(6):
        assert joint.turn == ("weights", "decisions")[i % 2]
        x, y = next(iter(digits.train.halves()[i % 2].epoch(i)))
        before = {k: p.detach().clone() for k, p in joint.net.named_parameters()}
        optim.zero_grad()
        (F.cross_entropy(joint(x), y) + joint.pressure()).backward()
        optim.step()
        joint.step()
        changed = {k for k, p in joint.net.named_parameters() if not torch.equal(p, before[k])}
        decided = {k for k in changed if "alpha" in k or k.endswith(".bits")}
        assert changed
        assert decided == (changed if i % 2 else set())
    joint.discretize()
    assert joint.turn == "both"
    assert all(p.requires_grad for p in joint.net.parameters())


def test_parameters_that_a_user_froze_stay_frozen(digits):
    _, joint = attached(digits)
    bias = next(p for k, p in joint.net.named_parameters() if k.endswith("bias"))
    bias.requires_grad_(False)
    for side in ("weights", "decisions", "both"):
        joint.net.set_trainable(side)
        assert not bias.requires_grad


def test_other_methods_learn_everything_from_every_batch(digits):
    torch.manual_seed(0)
    joint = jpq.compress(jpq.tasks.models.build("convnet", 10, 1).eval(), digits.example, "djpq", bops="1%")
    assert not joint.net.bilevel
    assert joint.turn == "both"
