"""The contest of plans on eight-by-eight images: a contestant alone, who takes part, and what a run goes on with."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from places import at_bits, job_of, places, settings, without_a_unit
from small_net import Small, trained_small
from torch import Tensor, nn

from jpq import costs
from jpq.allocation.decision_data import calibration_batches
from jpq.allocation.measured.candidates import BITS_ONLY, MEASURED, UNIFORM, Candidate
from jpq.allocation.measured.decide import Decision
from jpq.allocation.measured.table import SensitivityTable
from jpq.allocation.prepare import prepare
from jpq.compression.calibration import reestimate_batchnorm
from jpq.compression.model import CompressedModel
from jpq.config import RECONSTRUCTION, Budget, Decide
from jpq.costs.target import all_met, parse_targets
from jpq.tasks import CLASSIFICATION
from jpq.tasks.data import Batches, Data
from jpq.training import contest, measured_decision, search_contest
from jpq.training.contest import Contestant, Entry, Outcome, Verdict, contest_steps, hold_contest, sample_losses
from jpq.training.epochs import WARM_UP
from jpq.training.loop import MAX_GRADIENT_NORM
from jpq.types import JpqError

STEPS = 6  # of a rung here: more than the four batches of an epoch


@pytest.fixture(scope="module")
def data() -> Data:
    return places()


@pytest.fixture(scope="module")
def model(data: Data) -> Small:
    return trained_small([batch for epoch in range(12) for batch in data.train.epoch(epoch)])


@pytest.fixture(scope="module")
def net(model: Small, data: Data) -> CompressedModel:
    """The model under `--method measured`, nothing decided yet."""
    prepared = prepare(model, data.example, Decide(method="measured"), Budget(target_bops="50%"))
    return prepared.attach(model, calibration_batches(data))


def entrant(net: CompressedModel, model: nn.Module, data: Data, bits: int = 4, **more: Any) -> Contestant:
    config = more.pop("config", settings())
    return Contestant(net, Entry("a plan", at_bits(net, bits), math.nan), model, data, config, **more)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_two_rungs_together_take_the_contest_s_share_of_all_steps_for_each_plan(data: Data) -> None:
    long = replace(data, train=Batches(torch.zeros(8000, 1), torch.zeros(8000), batch_size=8))
    config = replace(settings(epochs=40), decide=Decide(method="measured", contest_share=0.1))
    first, plans = contest_steps(config, long), 6
    both_rungs = plans * first + plans // 2 * contest.SECOND_RUNG * first
    assert both_rungs == round(plans * 0.1 * 40 * 1000)
    assert contest_steps(config, data) == contest.FEWEST_STEPS  # where the share is too short to tell plans apart


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """(learning rate, norm of the gradient) of the decayed weights, at every step of the contestants."""
    found: list[tuple[float, float]] = []
    build = contest.build_optimizer

    def noted(*args: Any) -> torch.optim.Optimizer:
        optim = build(*args)

        def note(*_: object) -> None:
            group = optim.param_groups[0]
            grads = [p.grad.norm() for p in group["params"] if p.grad is not None]
            found.append((group["lr"], float(torch.stack(grads).norm())))

        optim.register_step_pre_hook(note)
        return optim

    monkeypatch.setattr(contest, "build_optimizer", noted)
    return found


def test_the_rate_of_every_rung_warms_up_and_falls_to_zero_and_gradients_are_clipped(
    net: CompressedModel, model: Small, data: Data, steps_taken: list[tuple[float, float]]
) -> None:
    one = entrant(net, model, data, scale=1e4)
    for steps in (20, 40):
        steps_taken.clear()
        one.train(steps)
        rates = [rate / 1e-2 for rate, _ in steps_taken]
        top = math.ceil(WARM_UP * steps)
        assert len(rates) == steps
        assert 0.95 < max(rates) <= 1
        assert rates[top:] == sorted(rates[top:], reverse=True)
        assert rates[steps // 2] == pytest.approx(0.5, abs=0.01)
        assert rates[-1] < 0.01
        assert max(norm for _, norm in steps_taken) <= MAX_GRADIENT_NORM * 1.001


class Dropping(Small):
    """A Small that drops features in training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.3, self.training))


def test_contestants_of_one_plan_end_alike_whatever_was_drawn_before(model: Small, data: Data) -> None:
    dropping = Dropping()
    dropping.load_state_dict(model.state_dict())
    prepared = prepare(dropping, data.example, Decide(method="measured"), Budget(target_bops="50%"))
    net = prepared.attach(dropping, calibration_batches(data))
    one, two = (entrant(net, dropping, data) for _ in range(2))
    for seed, contestant in enumerate((one, two)):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        contestant.train(STEPS)
        contestant.judge()
        assert torch.equal(torch.get_rng_state(), before)
    assert same_state(one.net, two.net)
    config = settings()
    other = entrant(net, dropping, data, config=replace(config, run=replace(config.run, seed=1)))
    other.train(STEPS)
    other.judge()
    assert not same_state(one.net, other.net)


def test_every_rung_has_batches_of_its_own_that_all_contestants_share(
    net: CompressedModel, model: Small, data: Data
) -> None:
    epochs = []
    for contestant in (entrant(net, model, data, bits) for bits in (3, 5)):
        for _ in range(2):
            data.train.epochs = []
            contestant.train(STEPS)
            epochs.append(data.train.epochs)
    first, second = epochs[:2]
    assert epochs[2:] == [first, second]
    assert len(set(first + second)) == len(first + second) == 4  # each rung ends in its second epoch
    assert min(first + second) > 10**6  # none of those that training and scores read


def test_a_plan_is_judged_with_norms_that_are_measured_on_training_batches(
    net: CompressedModel, model: Small, data: Data
) -> None:
    one = entrant(net, model, data)
    one.train(STEPS)
    expected = copy.deepcopy(one.net)
    found = one.judge()
    batches = data.train.epoch(contest.CONTEST_EPOCH)
    reestimate_batchnorm(expected, islice(batches, contest.NORM_BATCHES))
    assert same_state(one.net, expected)
    assert found.losses.tolist() == sample_losses(expected, data.held_out, data.task).tolist()
    assert found.metric == data.task.evaluate(expected, data.held_out)


def test_the_loss_of_each_sample_is_that_of_evaluation_and_infinite_where_it_is_no_number(data: Data) -> None:
    torch.manual_seed(0)
    net, (x, y) = Dropping().train(), next(iter(data.held_out))
    x[3], x[5] = math.nan, math.inf
    losses = sample_losses(net, [(x, y)], CLASSIFICATION)
    assert net.training
    expected = F.cross_entropy(net.eval()(x), y, reduction="none").detach().double()
    expected[[3, 5]] = math.inf
    assert torch.allclose(torch.from_numpy(losses), expected, rtol=1e-5)


def test_training_that_diverges_is_given_up_and_never_goes_on(net: CompressedModel, model: Small, data: Data) -> None:
    one = entrant(net, model, data, config=settings(lr=1e30))
    one.train(STEPS)
    stopped = copy.deepcopy(one.net.state_dict())
    one.train(STEPS)
    assert all(torch.equal(x.nan_to_num(), stopped[name].nan_to_num()) for name, x in one.net.state_dict().items())
    found = one.judge()
    assert found.losses.tolist() == [math.inf] * data.held_out.size
    assert found.steps == 2 * STEPS
    entries = [Entry(str(bits), at_bits(net, bits), math.nan) for bits in (3, 4)]
    with pytest.raises(JpqError, match="No plan of the contest could be trained"):
        hold_contest(net, entries, model, data, settings(lr=1e30))


def test_weights_learn_from_labels_by_their_scale_and_from_the_float_model(
    net: CompressedModel, model: Small, data: Data
) -> None:
    moved = {}
    for scale, distill in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        one = entrant(net, model, data, config=settings(distill=distill, weight_decay=0.0), scale=scale)
        weights = [p for group in one.net.weights().values() for p in group]
        before = [p.detach().clone() for p in weights]
        one.train(STEPS)
        moved[scale, distill] = any(not torch.equal(p, q) for p, q in zip(weights, before, strict=True))
    assert moved == {(0.0, 0.0): False, (1.0, 0.0): True, (0.0, 1.0): True}


def test_ranges_are_fitted_anew_only_where_that_is_asked_for(net: CompressedModel, model: Small, data: Data) -> None:
    searched = copy.deepcopy(net)
    with torch.no_grad():
        for p in (searched.layer("stem").weight, searched.layer("a").weight):
            p.mul_(4.0)  # as a search may change what the layers behind them read
    as_before, anew = (entrant(searched, model, data, refit=refit) for refit in (False, True))
    for name in ("b", "head"):
        old, new = (float(each.net.quantizers(name)[1].log_threshold) for each in (as_before, anew))
        assert old == float(entrant(net, model, data).net.quantizers(name)[1].log_threshold)
        assert new > old


def test_inputs_have_steps_of_powers_of_two_as_in_the_fine_tuning_that_follows(
    net: CompressedModel, model: Small, data: Data
) -> None:
    one = entrant(net, model, data)
    for _ in range(2):
        for layer in one.net.network.layers:
            exponent = float(one.net.quantizers(layer.name)[1].scale().double().log2())
            assert exponent == pytest.approx(round(exponent), abs=1e-5)
        one.train(STEPS)


@pytest.mark.parametrize("kept", [0, 1])
def test_the_weights_that_a_contest_gives_back_are_those_of_the_plan_that_it_keeps(
    kept: int, net: CompressedModel, model: Small, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest, "FEWEST_STEPS", STEPS)
    monkeypatch.setattr(contest, "pick_entry", lambda *_: (kept, (kept,)))
    entries = [Entry("pruned", without_a_unit(at_bits(net, 8)), 0.1), Entry("all units", at_bits(net, 2), 9.0)]
    before = copy.deepcopy(net.state_dict())
    verdict = hold_contest(net, entries, model, data, settings())
    assert verdict.kept == kept
    trained = copy.deepcopy(net)
    trained.freeze(entries[kept].plan)
    trained.load_state_dict(verdict.state)
    assert sample_losses(trained, data.held_out, data.task).tolist() == verdict.outcomes[kept].losses.tolist()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def decision_of(*candidates: Candidate) -> Decision:
    return Decision(candidates, SensitivityTable({}, {}, {}, "single", "", "", 8), 1, 8, 0.0)


def test_of_the_solver_s_plans_the_best_takes_part_and_the_next_best_of_the_other_kind(net: CompressedModel) -> None:
    whole, pruned = at_bits(net, 3), without_a_unit(at_bits(net, 4))
    first, second, third = (Candidate(f"{MEASURED} {i}", pruned, 0.1 * i) for i in (1, 2, 3))
    bits_only, uniform = Candidate(BITS_ONLY, whole, 0.25), Candidate(UNIFORM, whole, 0.05)
    for candidates, names in (
        ((first, second, bits_only, third), [first.name, BITS_ONLY]),
        ((bits_only, first, second), [BITS_ONLY, first.name]),
        ((first, second, third), [first.name, second.name]),
        ((uniform, first, bits_only), [first.name, BITS_ONLY, UNIFORM]),
    ):
        entries = measured_decision.contest_entries(decision_of(*candidates))
        assert [entry.name for entry in entries] == names
        divergences = {c.name: (c.plan, c.divergence) for c in candidates}
        assert all((entry.plan, entry.divergence) == divergences[entry.name] for entry in entries)


class Held:
    """A contest that notes what it is asked and keeps the plan at one place."""

    def __init__(self, kept: int) -> None:
        self.kept, self.entries, self.asked = kept, [], []

    def __call__(
        self, net: Any, entries: Any, model: Any, data: Any, config: Any, refit: bool = False, scale: float = 1.0
    ) -> Verdict:
        self.entries, self.asked = list(entries), [refit, scale]
        outcomes = tuple(Outcome(np.array([float(i)] * 3), 0.5, 1.0, 6) for i in range(len(entries)))
        return Verdict(self.kept, (self.kept,), outcomes, {"kept": torch.tensor(self.kept)})


def test_the_plan_that_the_contest_keeps_is_taken_or_without_one_that_of_least_divergence(
    net: CompressedModel, model: Small, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Candidate(MEASURED, without_a_unit(at_bits(net, 4)), 0.1), Candidate(UNIFORM, at_bits(net, 3), 0.2)
    decision = decision_of(*pair)
    monkeypatch.setattr(measured_decision, "hold_contest", held := Held(1))
    job = job_of(model, data)
    job.run.contest = measured_decision.decision_record(net, decision)
    assert [row["kept"] for row in job.run.contest["candidates"]] == [True, False]
    assert measured_decision.confirmed_plan(net, decision, job) == pair[1].plan
    assert held.asked == [False, job.run.loss_scale]
    rows = job.run.contest["candidates"]
    assert [row["kept"] for row in rows] == [row["tied"] for row in rows] == [False, True]
    assert job.run.contest["held_out_samples"] == 3
    assert job.run.trained == {"kept": torch.tensor(1)}
    without = replace(settings(), decide=Decide(method="measured", contest=False))
    monkeypatch.setattr(measured_decision, "hold_contest", held := Held(1))
    assert measured_decision.confirmed_plan(net, decision, job_of(model, data, config=without)) == pair[0].plan
    assert measured_decision.confirmed_plan(net, decision_of(pair[1]), job_of(model, data)) == pair[1].plan
    assert not held.asked  # one plan alone has nothing to be compared with


@pytest.mark.parametrize("kept", [0, 2])
def test_a_search_s_contest_has_the_learned_plan_beside_others_that_meet_the_target(
    kept: int, net: CompressedModel, model: Small, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = parse_targets({"bops": "1%"}, net.exact_usage())
    learned = without_a_unit(at_bits(net, 2))
    monkeypatch.setattr(search_contest, "hold_contest", held := Held(kept))
    job = job_of(model, data, targets)
    assert search_contest.contest_of_search(net, learned, job) == held.entries[kept].plan
    assert held.entries[0].plan == learned
    assert {"uniform", "two-stage"} < {entry.name for entry in held.entries}
    assert all(all_met(targets, net.exact_usage(entry.plan)) for entry in held.entries)
    assert held.asked == [True, job.run.loss_scale]
    two_stage = next(entry.plan for entry in held.entries if entry.name == "two-stage")
    share = float(costs.macs(net.exact_usage(two_stage))) / costs.baseline(net.exact_usage())["macs"]
    assert share == pytest.approx(job.config.decide.density, abs=0.1)
    read = model.a.weight.abs().sum((0, 2, 3)) + model.head.weight.abs().sum(0)  # the stem's units, by their readers
    stays = torch.tensor(two_stage.kept["stem"])
    assert read[stays].min() > read[~stays].max()
    row = job.run.contest["candidates"][kept]
    assert row["kept"]
    assert row["bops"] == int(costs.bops(net.exact_usage(held.entries[kept].plan)))


@pytest.mark.parametrize(
    ("warm_start", "opened", "goes_on"), [("", False, True), (RECONSTRUCTION, False, False), ("", True, False)]
)
def test_fine_tuning_goes_on_from_the_contest_s_weights_unless_they_are_rounded_or_rebuilt_first(
    warm_start: str, opened: bool, goes_on: bool, model: Small, data: Data
) -> None:
    job = job_of(model, data, config=settings(warm_start=warm_start))
    net: Any = nn.Linear(2, 1)
    net.opened = opened
    before = copy.deepcopy(net.state_dict())
    job.run.trained = {name: tensor + 1 for name, tensor in before.items()}
    measured_decision.take_contest_weights(net, job)
    assert torch.equal(net.weight, before["weight"] + goes_on)
    measured_decision.take_contest_weights(net, job)  # a later budget trains on from its own
    assert torch.equal(net.weight, before["weight"] + goes_on)


def test_mean_widths_of_inputs_are_not_those_of_weights(net: CompressedModel) -> None:
    plan = at_bits(net, 8)
    narrow = replace(plan, layers={name: replace(layer, w_bits=2) for name, layer in plan.layers.items()})
    found = measured_decision.plan_costs(net, narrow)
    assert (found["w_bits"], found["a_bits"], found["units"]) == (2, 8, 1)
