"""Decisions by measurement: what they compare, what they keep, devices' constraints, and the contest of plans."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from convnet import ranked
from torch import nn

import jpq
from jpq.allocation.measured import decide as deciding
from jpq.allocation.measured.calibration import Measurement
from jpq.allocation.measured.candidates import (
    MEASURED,
    TWO_STAGE,
    UNIFORM,
    AllowedWidths,
    comparison_plans,
    image_layers,
)
from jpq.allocation.measured.decide import decide_by_measurement
from jpq.allocation.measured.table import model_checksum, read_table, write_table
from jpq.allocation.prepare import prepare
from jpq.allocation.procedures import Measured, allowed_widths
from jpq.allocation.ranking.rank import rank_units
from jpq.allocation.two_stage import decide_two_stage
from jpq.allocation.uniform_bits import widest_uniform_plans
from jpq.compression.feasibility import cheapest_plan
from jpq.config import Budget, Decide
from jpq.costs.target import all_met, parse_targets
from jpq.methods.scores import SCORES
from jpq.plan import Plan
from jpq.tasks import CLASSIFICATION
from jpq.training.contest import Entry, Outcome, pick_entry, survivors
from jpq.training.measured_decision import plan_costs
from jpq.types import JpqError


class Small(nn.Module):
    """Two convolutions and a classifier on images of 8 x 8."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.b(self.a(x).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 1, 8, 8, generator=generator) for _ in range(2)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Small()


def decision_of(model, batches, bops="1%", table=None, **settings):
    """(network, targets, decision) of the measured method on a model."""
    settings = {"w_bits": (2, 5), "a_bits": (2, 5), **settings}
    decide = Decide(method="measured", **settings)
    prepared = prepare(model, batches[0], decide, Budget(target_bops=bops))
    net = prepared.attach(model, batches)
    rank_units(net, SCORES["l1"])
    measurement = Measurement(
        lambda: batches, CLASSIFICATION.divergence, model_checksum(model), table=table, source="a table"
    )
    widths = allowed_widths(net, decide)
    return net, prepared.targets, decide_by_measurement(net, prepared.targets, widths, decide.density, measurement)


@pytest.fixture(scope="module")
def decided(model, batches):
    return decision_of(model, batches)


def test_every_compared_plan_meets_the_target_and_the_least_divergence_comes_first(decided):
    net, targets, decision = decided
    names = [candidate.name for candidate in decision.candidates]
    assert {MEASURED, UNIFORM, TWO_STAGE} <= set(names)
    assert all(all_met(targets, net.exact_usage(c.plan)) for c in decision.candidates)
    divergences = [c.divergence for c in decision.candidates]
    assert divergences == sorted(divergences)
    assert decision.best.plan == decision.candidates[0].plan


def test_mean_widths_of_plans_count_layers_in_floating_point(model, batches):
    net, _, decision = decision_of(model, batches, bops="50%", keep_float=("fc",))
    found, uses = plan_costs(net, decision.best.plan), net.exact_usage(decision.best.plan)
    widths = [use.w_bits for use in uses if use.part == "layer"]
    assert 32 in widths
    assert found["w_bits"] == pytest.approx(sum(widths) / len(widths))
    every = tuple(layer.name for layer in net.network.layers)
    net, _, decision = decision_of(model, batches, bops="100%", keep_float=every)
    assert plan_costs(net, decision.best.plan)["a_bits"] == 32


def test_of_uniform_widths_those_of_the_least_divergence_are_compared(decided):
    net, targets, decision = decided
    widths = AllowedWidths((2, 3, 4, 5), (2, 3, 4, 5), {})
    uniform = widest_uniform_plans(net, targets, widths.w, widths.a)
    assert len(uniform) == 2  # such as 4 bits for weights and 3 for inputs, and the reverse
    for wanted in uniform:
        found = comparison_plans(net, targets, widths, 0.5, lambda plan, wanted=wanted: float(plan != wanted))
        assert found[UNIFORM] == wanted
    assert comparison_plans(net, targets, widths, 0.5)[UNIFORM] == uniform[0]
    assert next(c.plan for c in decision.candidates if c.name == UNIFORM) in uniform


def test_where_few_widths_are_allowed_two_stages_take_the_widest_that_fit_whatever_the_image_has():
    net = ranked()
    targets = parse_targets({"bops": "1%"}, net.exact_usage())
    plan = comparison_plans(net, targets, AllowedWidths((2, 4, 8), (2, 4, 8), {}), 0.5)[TWO_STAGE]
    free = decide_two_stage(net, targets, (2, 8), (2, 8), 0.5)
    pairs = [{(x.w_bits, x.a_bits) for n, x in p.layers.items() if n not in image_layers(net)} for p in (free, plan)]
    assert pairs == [{(5, 4)}, {(4, 4)}]
    assert {plan.layers[name].a_bits for name in image_layers(net)} == {8}


def test_the_saved_table_gives_the_same_plans(decided, model, batches, tmp_path):
    net, _, decision = decided
    write_table(tmp_path / "s.csv", decision.table, net.network)
    _, _, again = decision_of(model, batches, table=read_table(tmp_path / "s.csv"))
    assert [c.plan for c in again.candidates] == [c.plan for c in decision.candidates]
    assert again.passes < decision.passes


def test_a_network_too_large_for_a_whole_table_gets_a_coarse_one_on_fewer_samples(model, batches, monkeypatch):
    monkeypatch.setattr(deciding, "MOST_MACS", 0)
    monkeypatch.setattr(deciding, "COARSE_SAMPLES", 16)
    net, targets, decision = decision_of(model, batches, w_bits=(2, 8), a_bits=(2, 8))
    assert (decision.table.estimator, decision.table.samples, decision.samples) == ("coarse", 16, 64)
    assert all(set(row) == set(range(2, 9)) for row in decision.table.bits.values())
    whole = decision_of(model, batches, w_bits=(2, 8), a_bits=(2, 8), table=decision.table)[2]
    assert [c.plan for c in whole.candidates] == [c.plan for c in decision.candidates]
    assert [c.divergence for c in whole.candidates] == [c.divergence for c in decision.candidates]
    assert all_met(targets, net.exact_usage(decision.best.plan))


def test_a_larger_budget_never_predicts_a_larger_divergence(decided, model, batches):
    found = []
    for bops in ("0.6%", "0.8%", "1%", "1.5%"):
        prepared = prepare(model, batches[0], Decide(method="measured"), Budget(target_bops=bops))
        net = prepared.attach(model, batches)
        found.append(deciding.Solver(net, decided[2].table, prepared.targets).solve().divergence)
    assert found == sorted(found, reverse=True)


def test_dead_channels_go_before_any_bit(batches):
    torch.manual_seed(0)
    model = Small()
    dead = [0, 3, 5, 6]
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight[dead] = 0
            layer.bias[dead] = 0
        model.b.weight[:, dead] = 0
        model.fc.weight[:, dead] = 0
    bits_at_five = Decide(method="measured", w_bits=(2, 5), a_bits=(2, 5))
    prepared = prepare(model, batches[0], bits_at_five, Budget(target_bops="99%"))
    net = prepared.attach(model, batches)
    kept = {site.name: tuple(i not in dead for i in range(site.n)) for site in net.sites}
    widest = {n: replace(x, w_bits=5, a_bits=5 if n != "a" else x.a_bits) for n, x in net.plan().layers.items()}
    needed = int(jpq.costs.bops(net.exact_usage(replace(net.plan(), kept=kept, layers=widest))))
    plan = decision_of(model, batches, bops=str(needed))[2].candidates
    best = next(c.plan for c in plan if c.name == MEASURED)
    assert best.kept == kept
    assert {n: x.w_bits for n, x in best.layers.items()} == dict.fromkeys(best.layers, 5)


def test_a_layer_that_needs_its_bits_keeps_them(batches):
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():  # large weights of a channel that is always 0 stretch the grid of all others
        model.b.weight[0], model.b.bias[0], model.fc.weight[:, 0] = 0.0, 0.0, 8.0
    _, _, decision = decision_of(model, batches, bops="1.2%", w_bits=(2, 8), a_bits=(2, 8), skip=("b",))
    bits = decision.table.bits
    assert bits["fc", "w"][5] > 10 * bits["fc", "w"][8]
    for candidate in decision.candidates:
        if candidate.name.startswith(MEASURED):
            assert candidate.plan.layers["fc"].w_bits >= 7
            assert candidate.plan.layers["b"].w_bits < 7


def test_pins_and_powers_of_two_hold_in_every_plan(model, batches):
    _, _, decision = decision_of(
        model, batches, bops="2%", w_bits=(2, 8), a_bits=(2, 8), bits="b=4/8", width="power-of-two"
    )
    for candidate in decision.candidates:
        layers = candidate.plan.layers
        assert (layers["b"].w_bits, layers["b"].a_bits) == (4, 8)
        assert {x.w_bits for x in layers.values()} <= {2, 4, 8}


def test_layers_kept_in_float_have_no_quantizer_and_count_in_full(model, batches):
    x = batches[0]
    for settings in ({"keep_float": ("fc",)}, {"bits": "fc=32/32"}):
        decide = Decide(method="measured", **settings)
        net = prepare(model, x, decide, Budget(target_bops="10%")).attach(model, batches)
        assert "fc" not in net.plan().layers
        use = next(u for u in net.exact_usage() if u.name == "fc")
        assert (use.w_bits, use.a_bits) == (32, 32)
    session = jpq.compress(model, x, "measured", bops="10%", decide=Decide(keep_float=("fc",)))
    small = session.finalize()
    assert type(small.fc) is nn.Linear
    assert jpq.measure(small, x)["bops"] <= 0.1 * jpq.costs.baseline(session.net.exact_usage())["bops"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keep_float": ("fcc",)}, "Unknown layer in --keep-float 'fcc'. Did you mean fc"),
        ({"bits": "4/4,b=8/8"}, "name the layers whose bits are given"),
        ({"bits": "b=9/9"}, "each from 2 to 8"),
        ({"width": "learned"}, "chooses whole bits before it trains. Choose --width fixed or power-of-two"),
    ],
)
def test_constraints_that_cannot_be_read(settings, says, model, batches):
    with pytest.raises(JpqError) as caught:
        decision_of(model, batches, **settings)
    assert says in caught.value.command_line


def test_a_table_of_other_weights_is_refused(decided, batches):
    torch.manual_seed(5)
    with pytest.raises(JpqError, match="measured with other weights"):
        decision_of(Small(), batches, table=decided[2].table)


def test_a_table_of_other_grids_of_the_weights_is_refused(model, decided, batches):
    with pytest.raises(JpqError, match="was measured with"):
        decision_of(model, batches, table=decided[2].table, weight_levels="narrow")


def test_a_budget_below_everything_names_the_smallest(model, batches):
    decide = Decide(method="measured", bits="b=8/8")
    prepared = prepare(model, batches[0], decide, Budget(target_bops="0.05%"))
    net = prepared.attach(model, batches)
    with pytest.raises(JpqError, match="smallest possible is"):
        Measured().check_feasible(net, prepared.targets, decide)
    assert all_met(prepared.targets, net.exact_usage(cheapest_plan(net)))  # without the pin there is a plan


def outcome(losses, metric=0.5):
    return Outcome(np.array(losses, float), metric, 1.0)


def contest_entry(name, keep=(True, True), divergence=1.0):
    return Entry(name, Plan("measured", {}, {"site": tuple(keep)}), divergence)


@pytest.fixture(scope="module")
def judged():
    """(better, not told from it, worse): outcomes of 400 samples."""
    rng = np.random.default_rng(0)
    noise, difference = rng.normal(1.0, 0.3, 400), rng.normal(0, 0.3, 400)
    return outcome(noise), outcome(noise + difference - difference.mean() + 0.005), outcome(noise + 0.1)


def test_the_contest_says_what_the_samples_do_not_tell_apart_and_keeps_the_least_loss_beyond_that(judged):
    better, same, worse = judged
    alike = [contest_entry(name) for name in "abc"]
    assert pick_entry(alike, [better, same, worse]) == (0, (0, 1))
    assert pick_entry(alike, [worse, same, better]) == (1, (1, 2))
    assert pick_entry(alike, [worse, worse, better]) == (2, (2,))
    assert pick_entry(alike, [better, same, worse], last=[1, 2]) == (1, (1,))


def test_two_standard_errors_of_the_paired_difference_are_the_limit():
    entries = [contest_entry(name) for name in "ab"]
    for losses, tied in (([0.2, 1.0], (0, 1)), ([0.4, 1.0], (0,))):  # 1.5 and 2.3 standard errors above
        assert pick_entry(entries, [outcome([0.0, 0.0]), outcome(losses)])[1] == tied


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        ({"keep": (True, False)}, {}, 1),  # of tied plans one that keeps every unit
        ({"keep": (True, False), "divergence": 0.1}, {"divergence": 2.0}, 1),
        ({"divergence": 2.0}, {"divergence": 0.1}, 1),  # then the one of smaller divergence
        ({"divergence": float("nan")}, {"divergence": 9.0}, 1),
        ({"divergence": 0.1}, {"keep": (True, False), "divergence": 0.01}, 0),
    ],
)
def test_of_tied_plans_the_one_nearer_to_the_float_model_is_kept(first, second, kept, judged):
    better, same, worse = judged
    entries = [contest_entry("first", **first), contest_entry("second", **second), contest_entry("worse", divergence=0)]
    place, tied = pick_entry(entries, [better, same, worse])
    assert (place, tied) == (kept, (0, 1))


def test_the_better_half_goes_on_and_the_best_of_the_kind_that_it_lacks():
    pruned = {"keep": (True, False)}
    entries = [contest_entry("a"), contest_entry("b", **pruned), contest_entry("c"), contest_entry("d", **pruned)]
    losses = [outcome([loss] * 3) for loss in (0.1, 0.4, 0.2, 0.3)]
    assert survivors(entries, losses) == [0, 2, 3]
    assert survivors(entries[:1], losses[:1]) == [0]
    assert survivors([contest_entry(name) for name in "abcde"], [*losses, outcome([0.25])]) == [0, 2, 4]
    diverged = [losses[0], outcome([np.inf]), losses[2], outcome([np.inf])]
    assert survivors(entries, diverged) == [0, 2]


def test_a_plan_whose_training_diverges_is_never_kept():
    good, bad = outcome([1.0, 1.2, 0.9]), outcome([np.inf] * 3)
    entries = [contest_entry("a"), contest_entry("b", keep=(True, False), divergence=9.0)]
    assert pick_entry(entries, [bad, good])[0] == 1
    with pytest.raises(JpqError, match="Lower lr"):
        pick_entry(entries, [bad, bad])


def test_a_session_is_decided_by_measurement(model, batches):
    pairs = [(x, None) for x in batches]
    session = jpq.compress(model, batches[0], "measured", bops="1%", evidence=pairs)
    plan = session.discretize()
    assert session.share() <= 0.01
    assert {x.w_bits for x in plan.layers.values()} != {8}
    out = session(next(islice(batches, 1)))
    assert out.shape == (32, 10)
