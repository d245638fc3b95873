"""Laws of the gates, over the table; and what the sheets say of each."""

import math

import pytest
import torch

from jpq.config import Decide
from jpq.methods.gates import GATES, VIB, Annealed, FixedMask, Frozen, HardConcrete
from jpq.methods.gates.hard_concrete import EDGE
from jpq.testing import check_gate


def make(name, n=64):
    torch.manual_seed(0)
    gate = GATES[name](1, n)
    for p in gate.parameters():
        p.data.add_(torch.linspace(-6, 6, n))
    gate.after_step(0.5)
    return gate


@pytest.mark.parametrize("gate", [*GATES.values(), FixedMask], ids=[*GATES, "mask"])
def test_every_gate(gate):
    """The laws of `jpq.testing`."""
    check_gate(gate)


def test_the_gradient_of_the_cost_is_the_price_of_a_unit():
    """A latent that moves itself notes what the cost asks for each unit."""
    gate = GATES["hyper"](1, 9)
    gate.keep_probability().sum().backward()
    assert bool((gate.price == 1).all())


def test_a_frozen_gate_repeats_the_decision():
    gate = make("vib")
    frozen = Frozen(gate.keep())
    for mode in (True, False):
        frozen.train(mode)
        assert torch.equal(frozen.multiplier(), gate.keep())
    assert not list(frozen.parameters())


@pytest.mark.parametrize("gate", [HardConcrete, Annealed])
def test_at_the_default_weight_an_l0_norm_counts_exactly_at_the_price_of_a_unit(gate):
    made = gate(1, 7)
    assert torch.allclose(Decide().gate_weight * made.penalty(), made.keep_probability())


class TestVIB:
    def test_wherever_an_optimiser_puts_it_noise_is_finite_and_mu_can_be_folded(self):
        gate = VIB(1, 4)
        gate.mu.data = torch.tensor([[-3.0, 0.0, 1e-20, 1.0]])
        gate.log_var.data = torch.tensor([[300.0, -300.0, 300.0, 300.0]])
        gate.after_step(0.0)
        assert bool((gate.scale() > 0).all())
        assert bool(gate.input_noise(100).isfinite().all())
        gate.penalty().sum().backward()
        assert bool(gate.mu.grad.isfinite().all())
        assert bool((gate.log_var.grad < 0).all())  # the penalty still pulls: no unit is stuck

    def test_dropped_iff_variance_exceeds_squared_mean(self):
        gate = VIB(1, 3)
        gate.mu.data = torch.tensor([[0.5, 0.5, 0.5]])
        gate.log_var.data = torch.tensor([[0.26, 0.24, 0.2499]]).log()
        assert gate.keep().tolist() == [[0, 1, 1]]

    def test_jitter_times_mu_has_the_gates_mean_and_variance(self):
        gate = VIB(1, 4)
        gate.mu.data = torch.tensor([[0.5, 1.0, 2.0, 0.1]])
        gate.log_var.data = torch.tensor([[-1.0, -3.0, 0.5, -2.0]])
        n = 40_000
        torch.manual_seed(0)
        z = gate.input_noise(n) * gate.mu
        sigma = gate.log_var[0].mul(0.5).exp()
        assert bool(((z.mean(0) - gate.mu[0]).abs() < 4 * sigma / math.sqrt(n)).all())
        assert bool(((z.var(0) / sigma**2 - 1).abs() < 4 * math.sqrt(2 / n)).all())
        assert not torch.equal(z[0], z[1])

    def test_penalty_is_the_least_kl_over_prior_variances(self):
        gate = VIB(1, 3)
        gate.mu.data = torch.tensor([[0.0, 0.7, -0.7]])
        gate.log_var.data.fill_(-1.0)
        var = torch.logspace(-3, 3, 20_001)[:, None]
        own, mean = gate.log_var.exp(), gate.mu
        kl = 0.5 * ((own + mean**2) / var - 1 + (var / own).log())
        assert torch.allclose(gate.penalty(), kl.min(0).values[None], atol=1e-4)
        assert gate.penalty()[0, 0].abs() < 1e-6
        assert torch.allclose(gate.penalty()[0, 1], gate.penalty()[0, 2])

    def test_penalty_alone_drops_every_unit(self):
        gate = VIB(1, 8)
        optim = torch.optim.Adam(gate.parameters(), 0.1)
        for _ in range(400):
            optim.zero_grad()
            gate.penalty().sum().backward()
            optim.step()
            gate.after_step(0.0)
        assert gate.keep().sum() == 0

    def test_soft_share_tends_to_the_hard_one(self):
        gate = make("vib")
        sharp = VIB(1, 64, tau=1e-4)
        sharp.load_state_dict(gate.state_dict())
        assert torch.allclose(sharp.keep_probability().sum(), gate.keep().sum())


class TestHardConcrete:
    def test_closed_forms_by_monte_carlo(self):
        gate = HardConcrete(1, 5)
        gate.log_alpha.data = torch.tensor([[-3.0, -1.0, 0.0, 1.0, 3.0]])
        torch.manual_seed(0)
        n = 20_000
        z = torch.stack([gate.relaxed()[0] for _ in range(n)])
        for found, want in (
            ((z > 0).float().mean(0), gate.keep_probability()[0]),
            ((z == 1).float().mean(0), torch.sigmoid(gate.log_alpha - 2 / 3 * math.log(11))[0]),
        ):
            assert bool(((found - want).abs() < 4 * (want * (1 - want) / n).sqrt() + 1e-4).all())
        assert bool((z == 0).any())
        assert bool((z == 1).any())

    def test_test_time_gate_switches_at_ln_11(self):
        gate = HardConcrete(1, 4).eval()
        gate.log_alpha.data = torch.tensor([[-EDGE - 1e-3, -EDGE + 1e-3, EDGE - 1e-3, EDGE + 1e-3]])
        z = gate.multiplier()[0]
        assert z[0] == 0
        assert 0 < z[1] < 0.01
        assert 0.99 < z[2] < 1
        assert z[3] == 1

    def test_penalty_falls_with_log_alpha_and_never_loses_its_gradient(self):
        gate = HardConcrete(1, 201)
        gate.log_alpha.data = torch.linspace(-math.log(100), math.log(100), 201)[None]
        penalty = gate.penalty()
        penalty.sum().backward()
        assert bool((penalty.diff(dim=1) > 0).all())
        assert bool((gate.log_alpha.grad > 0).all())

    def test_bounded_where_it_can_return(self):
        gate = HardConcrete(1, 2)
        gate.log_alpha.data = torch.tensor([[-50.0, 50.0]])
        gate.after_step(0.0)
        assert float(gate.log_alpha.detach().abs().max()) == pytest.approx(math.log(100))
