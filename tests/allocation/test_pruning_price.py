"""The price of more pruning, on a net whose last channels are dead, and on one whose bits have room."""

import copy
from dataclasses import replace

import pytest
import torch
from convnet import EXAMPLE
from torch import nn

from jpq.allocation.measured import pruning_price
from jpq.allocation.measured.calibration import mix_pairs
from jpq.allocation.measured.pruning_price import PruningPrice, _close_cheapest, _orders, _priced_target, price_pruning
from jpq.allocation.uniform_bits import uniform_plan
from jpq.compression.attach import attach
from jpq.compression.calibration import reestimate_batchnorm
from jpq.costs import COSTS, bops, macs
from jpq.costs.target import Target, parse_targets
from jpq.methods.gates import VIB
from jpq.methods.quantizers import Fixed, Learned
from jpq.tasks import CLASSIFICATION
from jpq.tasks.models import build
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace

X = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def dead_from(model: nn.Module, dead: int) -> None:
    """Give the convnet `dead` channels at the end of its first two layers that nothing reads and nothing makes."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for maker, norm, reader in zip(convs[:2], norms[:2], convs[1:3], strict=True):
            maker.weight[-dead:] = 0
            norm.weight[-dead:], norm.bias[-dead:] = 0, 0
            reader.weight[:, -dead:] = 0


def searched(bits: int, low: int = 2, dead: int = 16):
    """(float model, attached net whose last channels have the smallest margins, its plan at these bits)."""
    torch.manual_seed(0)
    model = build("convnet", 10, 1).eval()
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, nn.Linear)).weight.mul_(40)  # sure of its classes
        if dead:
            dead_from(model, dead)
    reestimate_batchnorm(model, [(X, X)])
    network = trace(model, EXAMPLE)

    def widths(layer):
        return Learned(bits, low, 8), Fixed(8) if layer.reads_input else Learned(bits, low, 8)

    net = attach(model, network, channels(network), VIB, widths, [X], "djpq")
    with torch.no_grad():
        for gate in net.gates:
            gate.log_var.copy_(torch.linspace(-6, -2, gate.n)[None])
        if dead:
            net.gates[-1].log_var.fill_(-6)  # the last layer's channels live
    return model, net, uniform_plan(net, bits, bits)


def price(model, net, plan, target=None):
    targets = target or parse_targets({"bops": "90%"}, net.exact_usage())
    return price_pruning(net, plan, model, targets, lambda: [X], CLASSIFICATION.divergence, "nats")


def test_dead_channels_are_the_cheaper_way_to_save():
    found = price(*searched(bits=3))
    assert found.closed == round(0.1 * found.open)
    assert found.channels == pytest.approx(0, abs=1e-4)
    assert found.bits > 10 * max(found.channels, 1e-4)
    assert found.pays
    assert found.sentence().startswith("Closing the cheapest 10 % of the open channels (16 of 160) would cost nothing")
    assert "pruning pays here, and all channels stay" in found.sentence()


def test_bits_with_room_are_the_cheaper_way_to_save():
    model, net, plan = searched(bits=8, dead=0)
    found = price(model, net, plan)
    assert found.channels > 2 * found.bits
    assert not found.pays
    assert "more pruning does not pay here, and all channels stay" in found.sentence()
    assert found.record()["pays"] is False


def divergence(net, plan, model):
    """That of a copy of the net under a plan, its BatchNorm measured anew, from the float model on mixed images."""
    trial = copy.deepcopy(net)
    trial.freeze(plan)
    reestimate_batchnorm(trial, [(X, X)])
    with torch.no_grad():
        return float(CLASSIFICATION.divergence(trial.eval()(mix_pairs(X)), model(mix_pairs(X))))


def test_both_figures_are_what_the_plans_give():
    model, net, plan = searched(bits=5, dead=0)
    before = copy.deepcopy(net.state_dict())
    found = price(model, net, plan)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())  # nothing is changed

    worst = sorted(
        (float(m), s.name, u) for s, g in zip(net.sites, net.gates, strict=True) for u, m in enumerate(g.margin()[0])
    )
    kept = {name: list(units) for name, units in plan.kept.items()}
    for _, name, unit in worst[: found.closed]:
        kept[name][unit] = False
    pruned = replace(plan, kept={name: tuple(units) for name, units in kept.items()})
    assert found.channels == pytest.approx(
        divergence(net, pruned, model) - divergence(net, plan, model), rel=0.05, abs=1e-4
    )
    assert found.saving == pytest.approx(1 - float(bops(net.exact_usage(pruned)) / bops(net.exact_usage(plan))))


def test_bits_save_as_much_as_channels_do_and_cost_what_their_plan_gives(monkeypatch):
    plans = []
    lower = pruning_price._lower_bits
    monkeypatch.setattr(pruning_price, "_lower_bits", lambda *given: plans.append(lower(*given)) or plans[-1])
    model, net, plan = searched(bits=5, dead=0)
    found = price(model, net, plan)
    (fewer,) = plans
    full, saved = (float(bops(net.exact_usage(p))) for p in (plan, fewer))
    assert saved <= (1 - found.saving) * full
    assert fewer.kept == plan.kept
    assert all(
        x.w_bits <= plan.layers[name].w_bits and x.a_bits <= plan.layers[name].a_bits
        for name, x in fewer.layers.items()
    )

    assert found.bits == pytest.approx(divergence(net, fewer, model) - divergence(net, plan, model), rel=0.05, abs=1e-4)


@pytest.mark.parametrize("multiple", [1, 4])
def test_the_cheapest_of_the_open_channels_close_and_those_that_are_closed_count_for_nothing(multiple):
    _, net, plan = searched(bits=4, dead=0)
    net.multiple = multiple
    plan = replace(plan, kept={s.name: tuple(u >= 8 for u in range(s.n)) for s in net.sites})  # margins fall with u
    kept = {s.name: s.n - 8 for s in net.sites}
    counts = _close_cheapest(net, plan, kept)
    asked = round(0.1 * sum(kept.values()))
    assert asked % 4
    assert asked <= sum(kept.values()) - sum(counts.values()) < asked + multiple
    assert all(n % multiple == 0 for n in counts.values())
    margins = {s.name: g.margin()[0] for s, g in zip(net.sites, net.gates, strict=True)}
    gone = [float(m) for name, n in counts.items() for m in margins[name][8 + n :]]
    left = [float(m) for name, n in counts.items() for m in margins[name][8 : 8 + n]]
    assert multiple > 1 or max(gone) <= min(left)
    for s in net.sites:  # the open ones first
        assert _orders(net, plan)[s.name] == [*range(8, s.n), *range(8)]


def test_a_step_of_a_site_costs_the_margins_of_the_channels_that_it_closes():
    """One channel that is nearly closed, in a site whose others are the surest of all."""
    _, net, plan = searched(bits=4, dead=0)
    with torch.no_grad():
        net.gates[0].log_var.fill_(-6)
        net.gates[0].log_var[0, 3] = 3
    kept = {s.name: s.n for s in net.sites}
    assert _close_cheapest(net, plan, kept)[net.sites[0].name] == net.sites[0].n - 1


def test_the_target_that_is_priced_is_the_tightest_of_those_that_bits_lower():
    _, net, plan = searched(bits=4)
    uses = net.exact_usage(plan)
    loose, tight = (
        Target(cost, "", round(factor * float(COSTS[cost](uses)))) for cost, factor in (("bops", 2), ("size", 1.1))
    )
    least = Target("macs", "", 1)
    for targets in ((loose, tight, least), (least, tight, loose)):
        assert _priced_target(net, plan, targets) is tight
    assert _priced_target(net, plan, (loose, least)) is loose
    assert _priced_target(net, plan, (least,)) is None


def test_of_few_channels_there_is_no_tenth():
    model, net, plan = searched(bits=3)
    few = {s.name: tuple(u < (3 if i else 2) for u in range(s.n)) for i, s in enumerate(net.sites)}
    assert sum(map(sum, few.values())) == 8
    assert price(model, net, replace(plan, kept=few)) is None


def test_widths_at_their_smallest_leave_pruning_alone():
    found = price(*searched(bits=3, low=3))
    assert found.bits is None
    assert found.pays
    assert "only pruning makes this model cheaper" in found.sentence()


def test_nothing_is_measured_where_bits_do_not_count(monkeypatch):
    model, net, plan = searched(bits=3)
    limit = int(macs(net.exact_usage()))
    assert price(model, net, plan, (Target("macs", "90%", limit),)) is None
    monkeypatch.setattr("jpq.allocation.measured.pruning_price.MOST_WORK", 1.0)  # a large network
    assert price(model, net, plan) is None


def test_a_pruned_plan_says_how_many_channels_went():
    record = PruningPrice(12, 120, 160, "bops", 0.15, 0.08, 0.03, "nats", 256, 0.5)
    assert record.sentence() == (
        "Closing the cheapest 10 % of the open channels (12 of 120) would cost 0.08 nats before training; taking the "
        "same bit-operations (15.0 %) from the bits would cost 0.03 nats: more pruning does not pay here, and the "
        "search closed 40 of 160 channels."
    )


@pytest.mark.parametrize(
    ("unit", "shown"), [("nats", ("cost nothing", "neither is dearer")), ("", ("cost 4.7e-05", "cost 4.9e-05"))]
)
def test_small_errors_of_images_are_shown_where_small_divergences_of_classes_are_noise(unit, shown):
    found = PruningPrice(2, 24, 24, "bops", 0.147, 4.7e-5, 4.9e-5, unit, 128, 1.0)
    assert all(words in found.sentence() for words in shown)


@pytest.mark.parametrize(("channels", "bits"), [(0.0, 0.0), (1e-5, -2e-4), (2e-4, 1e-4)])
def test_where_neither_way_costs_anything_neither_is_said_to_pay(channels, bits):
    found = PruningPrice(12, 120, 160, "bops", 0.15, channels, bits, "nats", 256, 0.5)
    assert found.sentence() == (
        "Closing the cheapest 10 % of the open channels (12 of 120) would cost nothing before training, and so would "
        "taking the same bit-operations (15.0 %) from the bits: neither is dearer here, and the search closed 40 of "
        "160 channels."
    )
