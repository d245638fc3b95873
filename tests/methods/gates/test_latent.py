"""DHP: latents generate the weights, shrink by a proximal step, and channels go by index."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gated import gated
from torch import nn

import jpq
from jpq import costs
from jpq.compression.hypernetwork import EMBEDDING, Generated, generate_weight
from jpq.compression.masking import original
from jpq.export.count import measure
from jpq.export.rebuild import rebuild
from jpq.export.verify import difference
from jpq.methods.gates import Latent, latent
from jpq.methods.gates.latent import LEAST, LONGEST, RATE, THRESHOLD
from jpq.tracing.network import LayerKind
from jpq.training.loop import build_optimizer


def hypers(net):
    return {name: m for name, m in net.model.named_modules() if isinstance(m, Generated)}


def stirred(net):
    """Latents and hypernetworks away from where they start: no bias is 0, no latent 1."""
    for p in [*net.gates.parameters(), *(p for h in hypers(net).values() for p in h.parameters())]:
        p.data += 0.3 * torch.randn_like(p)
    for layer in net.network.layers:
        owner, _, name = layer.weight.rpartition(".")
        weight = original(net.model.get_submodule(owner), name)
        weight.data += 0.05 * torch.randn_like(weight)
    return net


def test_formula_kernel_by_kernel():
    torch.manual_seed(0)
    c, n, m, k = 3, 4, EMBEDDING, 9
    z_in, z_out, b0 = torch.randn(c), torch.randn(n), torch.randn(c, n)
    w1, b1, w2 = torch.randn(c, n, m), torch.randn(c, n, m), torch.randn(c, n, k, m)
    made = generate_weight(z_in, z_out, b0, w1, b1, w2)
    assert made.shape == (n, c, k)
    for i in range(c):
        for j in range(n):
            e = (z_in[i] * z_out[j] + b0[i, j]) * w1[i, j] + b1[i, j]
            assert torch.allclose(made[j, i], w2[i, j] @ e, atol=1e-5)


def test_slice_then_generate_equals_generate_then_slice():
    torch.manual_seed(1)
    c, n, m, k = 6, 5, EMBEDDING, 9
    rows, columns = torch.tensor([0, 2, 4]), torch.tensor([1, 2, 5])
    z_in, z_out, b0 = torch.randn(c), torch.randn(n), torch.randn(c, n)
    w1, b1, w2 = torch.randn(c, n, m), torch.randn(c, n, m), torch.randn(c, n, k, m)
    whole = generate_weight(z_in, z_out, b0, w1, b1, w2)[rows][:, columns]
    cut = lambda t: t[columns][:, rows]  # noqa: E731
    sliced = generate_weight(z_in[columns], z_out[rows], cut(b0), cut(w1), cut(b1), cut(w2))
    assert torch.allclose(sliced, whole, atol=1e-6)


@pytest.mark.parametrize("name", ["residual", "depthwise", "grouped", "concat", "transposed", "flat"])
def test_starts_at_the_pretrained_weights(name):
    model, net, _ = gated(name, Latent)
    for layer in net.network.layers:
        made = net.model.get_submodule(layer.name).weight
        assert torch.allclose(made, model.get_submodule(layer.name).weight, atol=1e-6), layer.name
    made = hypers(net)
    convs = {layer.name for layer in net.network.layers if layer.kind is LayerKind.CONV}
    assert made
    assert {name.partition(".parametrizations")[0] for name in made} <= convs
    for h in made.values():
        assert not h.b0.any()
        assert not h.b1.any()


def test_the_hypernetwork_starts_at_the_papers_variance():
    torch.manual_seed(0)
    zeros = torch.zeros(64, 32, 3, 3)
    h = Generated(zeros, [], np.arange(32), np.arange(32, 96))
    assert float(h.w1.detach().var()) == pytest.approx(1, rel=0.03)
    # var(O) * fan_in would be 1; asking for a certain weight fixes one of the m directions of each kernel
    assert float(h.w2.detach().var()) * EMBEDDING * 32 * 9 == pytest.approx(1 - 1 / EMBEDDING, rel=0.03)
    assert float(h(zeros).detach().abs().max()) < 1e-6


def test_own_latents_where_no_site_decides():
    _, net, _ = gated("plain", Latent)
    first = hypers(net)["0.0.parametrizations.weight.0"]
    assert len(first.own) == 3  # the image
    assert all(gate.z.data_ptr() != first.own.data_ptr() for gate in net.gates)
    _, net, _ = gated("depthwise", Latent)
    depthwise = hypers(net)["1.0.parametrizations.weight.0"]
    assert len(depthwise.own) == 1
    assert len(depthwise.outputs) == 8


def test_one_latent_on_both_sides_of_an_add():
    model, net, example = gated("residual", Latent)
    site = next(i for i, s in enumerate(net.sites) if len(s.producers) == 2)
    gate = net.gates[site]
    makers = [h for name, h in hypers(net).items() if any(name.startswith(m + ".") for m in net.sites[site].producers)]
    assert len(makers) == 2
    assert all(gate in h._gates for h in makers)
    stirred(net)
    gate.z.data[0, :3] = 0.0
    net.eval().freeze(net.plan())
    small, plan = rebuild(net, model)
    cuts = [plan.slices[f"{m}.weight"][0] for m in net.sites[site].producers]
    assert cuts[0] == cuts[1] == [3, 4, 5, 6, 7]
    assert difference(net, small, example) < 1e-9


@pytest.mark.parametrize("name", ["residual", "depthwise", "squeeze_excite", "pixel_shuffle", "concat", "flat"])
def test_export_computes_what_the_network_without_the_channels_did(name):
    model, net, example = gated(name, Latent)
    torch.manual_seed(3)
    stirred(net)
    for gate in net.gates:
        gate.z.data[0, LEAST:] *= (torch.rand(gate.n)[LEAST:] > 0.5).float()
    net.eval()
    kept = sum(int(g.keep().sum()) for g in net.gates)
    assert kept < sum(g.n for g in net.gates)
    with torch.no_grad():
        before = net(example)
        net.freeze(net.plan())
        assert torch.equal(net(example), before)
    assert not hypers(net)
    small, plan = rebuild(net, model)
    assert difference(net, small, example) < 1e-9
    assert int(costs.macs(net.exact_usage(plan))) == measure(small, example)["macs"]
    assert not any("parametrizations" in name for name in small.state_dict())


def test_zero_latents_do_not_make_zero_slices():
    _, net, _ = gated("plain", Latent)
    stirred(net)
    gate = net.gates[0]
    gate.z.data[0, 0] = 0.0
    maker = net.model.get_submodule(net.sites[0].producers[0])
    assert bool(maker.weight[0].any())  # judged by its weights it would stay
    assert gate.keep()[0, 0] == 0
    net.eval()
    net.draws[0].resample()
    assert not net.model.get_submodule(net.sites[0].taps[0].layer).weight[:, 0].any()  # its readers cut it by index


def test_proximal_step_gives_exact_zeros_and_changes_no_sign():
    gate = Latent(1, 8)
    gate.z.data = torch.tensor([[0.01, -0.01, 0.5, -0.5, 1.0, 1.0, 1.0, 0.0]])
    before = gate.z.detach().clone()
    gate.price.fill_(0.02 / RATE)
    gate.after_step(0.0)
    assert gate.z[0, :2].tolist() == [0, 0]
    assert gate.z[0, 2:].tolist() == pytest.approx([0.48, -0.48, 0.98, 0.98, 0.98, 0])
    assert bool((gate.z * before >= 0).all())
    assert not gate.price.any()


def test_a_step_is_plain_gradient_then_prox(monkeypatch):
    monkeypatch.setattr(latent, "LONGEST", math.inf)
    gate = Latent(1, 6)
    gate.price.fill_(0.1 / RATE)
    gate.z.grad = torch.tensor([[0.0, 0.2, 0.5, 0.95, 1.05, 1.5]]) / RATE
    gate.after_step(0.0)
    assert gate.z[0].tolist() == pytest.approx([0.9, 0.7, 0.4, 0.0, 0.0, -0.4])
    assert gate.z.grad is None


def test_latents_belong_to_no_optimiser_and_are_not_decayed():
    _, net, _ = gated("plain", Latent)
    optim = build_optimizer(net, 1e-3, 0.5, 0.1, 0.1)
    held = {id(p) for group in optim.param_groups for p in group["params"]}
    assert not held & {id(p) for p in net.gates.parameters()}
    assert held >= {id(p) for h in hypers(net).values() for p in h.parameters()}


def test_the_least_number_survives():
    gate = Latent(1, 10)
    gate.z.data = torch.linspace(1e-6, 1e-5, 10)[None]
    assert gate.keep().tolist() == [[0] * 6 + [1] * 4]
    gate.z.data = torch.tensor([[1.0] * LEAST + [THRESHOLD * 0.9] * 6])
    before = gate.z.detach().clone()
    gate.price.fill_(1.0)
    gate.after_step(0.0)
    assert torch.equal(gate.z, before)  # no more shrinking
    assert Latent(1, 2).keep().sum() == 2


def test_the_price_is_the_budgets_and_does_not_move_latents_by_gradient():
    _, net, _ = gated("residual", Latent)
    costs.macs(net.soft_usage()).log().backward()
    full = costs.macs(net.exact_usage())
    plan = net.plan()
    for gate, site in zip(net.gates, net.sites, strict=True):
        assert gate.z.grad is None
        fewer = {**plan.kept, site.name: tuple(u > 0 for u in range(site.n))}
        saved = full - costs.macs(net.exact_usage(jpq.Plan(plan.method, plan.layers, fewer)))
        assert float(gate.price[0, 0]) == pytest.approx(float(saved) / float(full), rel=1e-4)


def test_search_ends_within_a_unit_of_the_wanted_share():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 4),
    )
    x = torch.randn(64, 1, 8, 8)
    y = model(x).argmax(1)
    net = jpq.compress(model, x, method="dhp", macs="40%", steps=150)
    optim = torch.optim.Adam(net.groups(lr=1e-3))
    net.train()
    for _ in range(150):
        optim.zero_grad()
        (F.cross_entropy(net(x), y) + net.pressure()).backward()
        optim.step()
        net.step()
    assert net.share("macs") <= 0.6  # the proximal step did most of it
    net.discretize()
    assert 0.4 - 1 / 24 <= net.share("macs") <= 0.4
    assert all(int(g.keep().sum()) >= LEAST for g in net.net.gates)
    assert math.isfinite(float(F.cross_entropy(net(x), y)))


def test_masks_inside_layers_are_refused():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    with pytest.raises(jpq.JpqError, match="channels"):
        jpq.compress(model, torch.randn(2, 1, 8, 8), method="dhp", structure="elementwise", bops="1%")


def test_a_large_gradient_moves_latents_by_a_bounded_step_in_its_direction():
    gate = Latent(1, 8)
    grad = torch.linspace(-3e4, 5e4, 8)[None]
    gate.z.grad = grad.clone()
    gate.after_step(0.0)
    step = 1 - gate.z.detach()
    assert torch.allclose(step.square().mean().sqrt(), torch.tensor(LONGEST))
    assert torch.allclose(step / step.norm(), grad / grad.norm(), atol=1e-5)


def test_a_small_gradient_is_taken_as_it_is():
    gate = Latent(1, 8)
    gate.z.grad = torch.full((1, 8), 0.5 * LONGEST / RATE)
    gate.after_step(0.0)
    assert torch.allclose(gate.z.detach(), torch.full((1, 8), 1 - 0.5 * LONGEST))
