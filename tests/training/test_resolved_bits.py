"""Bits that are solved again for a network in training: single steps, within the budget, judged on held-out samples."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import islice

import pytest
import torch
from places import at_bits, job_of, places, settings, without_a_unit
from small_net import Small, trained_small

from jpq.allocation.decision_data import calibration_batches
from jpq.allocation.measured.decide import plan_widths
from jpq.allocation.prepare import prepare
from jpq.compression.calibration import reestimate_batchnorm
from jpq.compression.model import CompressedModel
from jpq.compression.power_of_two_steps import round_activation_steps
from jpq.config import Budget, Decide
from jpq.costs.target import all_met, parse_targets
from jpq.tasks.data import Batches, Data
from jpq.training.contest import NORM_BATCHES, sample_losses
from jpq.training.resolve_bits import NORM_EPOCH, Moves, change_bits, solve_bits_again


@pytest.fixture(scope="module")
def data() -> Data:
    return places()


@pytest.fixture(scope="module")
def model(data: Data) -> Small:
    return trained_small([batch for epoch in range(40) for batch in data.train.epoch(epoch)])


@pytest.fixture(scope="module")
def net(model: Small, data: Data) -> CompressedModel:
    """The model with all but one unit, at 2 bits in all its layers."""
    prepared = prepare(model, data.example, Decide(method="measured"), Budget(target_bops="50%"))
    net = prepared.attach(model, calibration_batches(data))
    net.freeze(without_a_unit(at_bits(net, 2)))
    round_activation_steps(net)
    return net


def solved(net: CompressedModel, model: Small, data: Data, bops: str, pins: str = "") -> Moves:
    targets = parse_targets({"bops": bops}, net.exact_usage())
    config = replace(settings(), decide=Decide(method="measured", bits=pins))
    found = solve_bits_again(net, job_of(model, data, targets, config))
    assert all_met(targets, net.exact_usage(found.plan))
    return found


def with_norms_anew(net: CompressedModel, data: Data) -> CompressedModel:
    anew = copy.deepcopy(net)
    reestimate_batchnorm(anew, islice(data.train.epoch(NORM_EPOCH), NORM_BATCHES))
    return anew


def test_bits_rise_by_single_steps_where_there_is_room_and_are_taken_where_the_loss_falls(
    net: CompressedModel, model: Small, data: Data
) -> None:
    before = copy.deepcopy(net.state_dict())
    found = solved(net, model, data, "50%", pins="b=2/2")
    now, then = plan_widths(net, net.plan()), plan_widths(net, found.plan)
    assert {then[key] - bits for key, bits in now.items()} == {0, 1}
    assert (then["b", "w"], then["b", "a"]) == (2, 2)
    assert found.plan.kept == net.plan().kept
    assert {(name, side): (a, b) for name, side, a, b in found.moved} == {
        key: (bits, then[key]) for key, bits in now.items() if then[key] != bits
    }
    assert found.divergence[1] < found.divergence[0]
    assert found.held_out_loss[1] < found.held_out_loss[0]
    assert found.taken
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_tight_budget_leaves_bits_as_they_are(net: CompressedModel, model: Small, data: Data) -> None:
    uses = net.exact_usage()
    found = solved(net, model, data, str(int(sum(u.macs * u.inputs * u.outputs * u.w_bits * u.a_bits for u in uses))))
    assert not found.moved
    assert not found.taken


def test_held_out_samples_refuse_what_is_nearer_to_the_float_model_and_worse_for_them(
    net: CompressedModel, model: Small, data: Data
) -> None:
    anew = with_norms_anew(net, data)
    inputs = torch.cat([x for x, _ in data.held_out])
    own = anew(inputs).argmax(1)  # what the network says at 2 bits; at more it says something else
    found = solved(net, model, replace(data, held_out=Batches(inputs, own, batch_size=24)), "50%")
    assert found.moved
    assert found.divergence[1] < found.divergence[0]
    assert found.held_out_loss[1] > found.held_out_loss[0]
    assert not found.taken


def test_the_loss_before_is_that_of_norms_measured_anew_on_training_batches(
    net: CompressedModel, model: Small, data: Data
) -> None:
    found = solved(net, model, data, "50%")
    losses = sample_losses(with_norms_anew(net, data), data.held_out, data.task)
    assert found.held_out_loss[0] == pytest.approx(losses.mean(), rel=1e-6)


def test_the_divergence_is_from_the_float_model_whatever_the_weights_have_become(
    net: CompressedModel, model: Small, data: Data
) -> None:
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.layer("head").bias[0] += 1000.0  # every other class costs 1000 nats for the share that the model gives it
    assert solved(other, model, data, "50%").divergence[0] > 100


def test_ranges_are_fitted_anew_where_a_width_changes_and_only_there(
    net: CompressedModel, model: Small, data: Data
) -> None:
    changed, plan = copy.deepcopy(net), net.plan()
    layers = {
        **plan.layers,
        "a": replace(plan.layers["a"], w_bits=6),
        "head": replace(plan.layers["head"], a_bits=6),
    }
    samples = {name: 4 * values for name, values in net.calibration_samples.items()}
    change_bits(changed, replace(plan, layers=layers), samples)
    assert changed.plan().layers == layers
    ranges = {
        (name, side): (old.log_threshold, new.log_threshold)
        for name in layers
        for side, old, new in zip("wa", net.quantizers(name), changed.quantizers(name), strict=True)
    }
    assert {key for key, (old, new) in ranges.items() if not torch.equal(old, new)} == {("a", "w"), ("head", "a")}
    largest = samples["head"].abs().max()
    assert 0.5 * largest < ranges["head", "a"][1].exp() <= 2.0 * largest  # to a power of two
