"""Sensitivity tables from part of the network, from one backward pass, and from an interrupted measurement."""

import pytest
import torch
from convnet import EXAMPLE, ranked
from torch import nn

import jpq
from jpq.allocation.measured.calibration import calibration_samples, mix_pairs
from jpq.allocation.measured.coarse import LEAST, coarse_changes, coarse_table, interpolate, measured_widths
from jpq.allocation.measured.estimate import LONGEST, LONGEST_COARSE, CostEstimate, estimate_cost, pick_estimator
from jpq.allocation.measured.fisher import class_noise, fisher_table, noise_of, squared_noise
from jpq.allocation.measured.measure import changes_of, measure_table
from jpq.allocation.measured.prefix_cache import answering, find_cuts, output_at
from jpq.allocation.measured.probe import Probe
from jpq.allocation.prepare import prepare
from jpq.config import Budget, Decide
from jpq.results.sensitivity import measure, probe_model
from jpq.tasks import CLASSIFICATION, TASKS
from jpq.types import JpqError


class Branches(nn.Module):
    """A chain, then a branch that reads what was computed before it."""

    def __init__(self):
        super().__init__()
        self.first, self.inside, self.after = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.first(x).relu()
        x = x + self.after(self.inside(x))
        return self.head(x.mean((2, 3)))


def orders(net):
    pairs = zip(net.sites, net.gates, strict=True)
    return {site.name: gate.margin()[0].argsort(descending=True).tolist() for site, gate in pairs}


def make_probe():
    net = ranked()
    mixed, plain = calibration_samples([EXAMPLE])
    return Probe(net, mixed, plain, CLASSIFICATION.divergence, orders(net))


def test_a_pass_begins_only_where_nothing_before_is_read_again():
    torch.manual_seed(0)
    model, x = Branches().eval(), torch.randn(2, 3, 6, 6)
    cuts, _ = find_cuts(model, [], x)
    names = [cut.name for cut in cuts]
    assert names[0] == "first"
    assert not {"inside", "after"} & set(names)  # the sum reads what was before them
    with torch.no_grad():
        expected, known = model(x), output_at(model, cuts[-1], x)
        with answering(model, cuts[-1]) as feed:
            feed(known)
            assert torch.equal(model(torch.full_like(x, torch.nan)), expected)
        assert torch.equal(model(x), expected)  # the modules are as they were


class Grouped(nn.Module):
    """Every kind of layer that keeps its weight, and code that relies on the usual order of tensors in memory."""

    def __init__(self, view):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect")
        self.across = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.line, self.head = nn.Conv1d(8, 6, 3), nn.Linear(6, 5)
        self.view = view

    def forward(self, x):
        x = self.across(self.depthwise(self.norm(self.first(x)).relu())).relu()
        x = x.view(len(x), -1).view(len(x), 8, -1) if self.view else x.flatten(2)
        return self.head(self.line(x).relu().mean(2))


@pytest.mark.parametrize("view", [False, True])
def test_layers_that_keep_their_weights_give_the_table_of_the_plain_ones(view):
    torch.manual_seed(0)
    model, x = Grouped(view).eval(), torch.randn(20, 3, 6, 6)
    batches = list(x.split(10))
    kept, plain = (probe_model(model, batches, CLASSIFICATION.divergence, 20, (2, 3), (2, 3)) for _ in range(2))
    assert len(kept.probe.direct.layers) == 4  # all but the transposed convolution
    assert kept.probe.direct.channels_last != view
    plain.probe.direct.restore()
    with torch.no_grad():
        plain.probe.references = [plain.probe.net.model(batch) for batch in plain.probe.batches]
    found, expected = (measure(probed, "single") for probed in (kept, plain))
    assert found.orders == expected.orders
    assert found.units
    for rows, others in ((found.bits, expected.bits), (found.units, expected.units)):
        for key, row in rows.items():
            assert row == pytest.approx(others[key], rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("kept", [None, 2])
def test_the_table_is_to_the_bit_that_of_whole_passes(kept):
    probe, whole = make_probe(), make_probe()
    assert probe._cuts[0]
    whole.__dict__["_cuts"] = ([], whole._cuts[1])
    around = dict.fromkeys(probe.keys, 4) if kept else None
    counts = {name: len(order) // kept for name, order in probe.orders.items()} if kept else None
    tables = [measure_table(p, (3, 5), (3, 5), "-", around, counts, step=1) for p in (probe, whole)]
    assert tables[0] == tables[1]


def test_an_interrupted_measurement_gives_the_same_table():
    found = {}

    def stop_after_nine(change, divergence):
        found[change] = divergence
        if len(found) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_table(make_probe(), (2, 3), (2, 3), "-", record=stop_after_nine)
    again = []
    table = measure_table(make_probe(), (2, 3), (2, 3), "-", known=found, record=lambda change, _: again.append(change))
    assert table == measure_table(make_probe(), (2, 3), (2, 3), "-")
    assert not set(again) & set(found)


class Residual(nn.Module):
    """A layer that is called twice, each time beside its own input: little of the output comes through it."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.head = (nn.Linear(8, n) for n in (8, 8, 4))
        self.twice.weight.data *= 0.1

    def forward(self, x):
        x = self.first(x).relu()
        for _ in range(2):
            x = x + self.twice(x).relu()
        return self.head(x)


def test_fisher_counts_the_uses_of_a_tensor_that_are_rounded_alone():
    torch.manual_seed(0)
    model, x = Residual().eval(), 2 * torch.randn(256, 8)
    net = prepare(model, x, Decide(method="measured"), Budget(target_bops="50%")).attach(model, [x])
    probe = Probe(net, [x], [x], CLASSIFICATION.divergence, orders(net))
    measured, fisher = (make(probe, (5, 6), (5, 6), "-") for make in (measure_table, fisher_table))
    for width in (5, 6):
        assert fisher.bits["twice", "a"][width] == pytest.approx(measured.bits["twice", "a"][width], rel=0.6)

    with torch.no_grad():
        error = probe.rounded(("twice", "w"), 6, model.twice.weight) - model.twice.weight
    expected = 0.0  # over classes that are drawn: squared gradients by the weight, of both calls together
    for row in x[:64].split(1):
        scores = model(row)[0]
        rows = torch.stack([torch.autograd.grad(s, model.twice.weight, retain_graph=True)[0] for s in scores])
        p = scores.softmax(0).detach()[:, None, None]
        expected += float((p * ((rows - (p * rows).sum(0)) * error).square()).sum()) / 128
    assert fisher.bits["twice", "w"][6] == pytest.approx(expected, rel=0.3)


def test_fisher_is_the_second_order_of_small_changes():
    torch.manual_seed(0)
    net = ranked()
    x = torch.randn(64, *EXAMPLE.shape[1:])
    probe = Probe(net, list(x.split(16)), [x], CLASSIFICATION.divergence, orders(net))
    measured, fisher = (make(probe, (6, 8), (5, 8), "-") for make in (measure_table, fisher_table))
    for key, row in fisher.bits.items():
        assert all(value >= 0 for value in row.values())
        if key[1] == "a":  # errors of many independent activations add up as squares
            assert row[6] == pytest.approx(measured.bits[key][6], rel=0.6)
    assert fisher.estimator == "fisher"
    assert {name: set(row) for name, row in fisher.units.items()} == {n: set(r) for n, r in measured.units.items()}
    assert fisher == fisher_table(probe, (6, 8), (5, 8), "-")
    assert all(row[len(probe.orders[name])] == 0 for name, row in fisher.units.items())
    assert probe.measure() == 0  # the probe is as it was


@pytest.mark.parametrize(
    ("noise", "divergence"),
    [(class_noise, CLASSIFICATION.divergence), (squared_noise, TASKS["regression"].divergence)],
)
def test_noise_has_the_covariance_of_the_divergence(noise, divergence):
    output = torch.tensor([[0.3, -1.0, 0.8]])
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([noise(output, generator) for _ in range(6000)])
    hessian = torch.autograd.functional.hessian(lambda out: divergence(out, output), output)[0, :, 0]
    torch.testing.assert_close(draws.T @ draws / len(draws), hessian, atol=0.06, rtol=0.06)


def test_a_divergence_of_another_form_is_refused():
    output = torch.randn(4, 5)
    assert noise_of(CLASSIFICATION.divergence, output) is class_noise
    with pytest.raises(JpqError, match="estimator single"):
        noise_of(lambda out, reference: (out - reference).abs().mean(), output)


def test_auto_measures_where_there_is_time():
    cost = CostEstimate(100, 1.0, {"single": LONGEST - 1, "coarse": 80.0, "fisher": 4.0}, 0)
    assert pick_estimator("auto", cost)[0] == "single"
    slow = CostEstimate(100, 60.0, {"single": LONGEST + 1, "coarse": LONGEST_COARSE, "fisher": 240.0}, 0)
    name, why = pick_estimator("auto", slow)
    assert (name, "10 minutes" in why, "30.0" in why) == ("coarse", True, True)
    slowest = CostEstimate(100, 60.0, {"single": 30_000.0, "coarse": LONGEST_COARSE + 60, "fisher": 240.0}, 0)
    name, why = pick_estimator("auto", slowest)
    assert (name, "500 minutes" in why, "31 (" in why) == ("fisher", True, True)
    assert pick_estimator("single", slow)[0] == "single"
    with pytest.raises(JpqError, match="hessian"):
        pick_estimator("hessian", cost)


def test_cost_is_known_before():
    probe = make_probe()
    cost = estimate_cost(probe, (2, 4), (2, 4))
    assert cost.changes == len(changes_of(probe, (2, 4), (2, 4)))
    assert 0 < cost.seconds["single"] <= 3 * cost.pass_seconds * cost.changes
    assert 0 < cost.seconds["coarse"] < cost.seconds["single"]
    assert estimate_cost(probe, (2, 4), (2, 4), known=cost.changes).seconds["single"] == 0
    assert cost.memory > sum(x.numel() * 4 for x in probe.batches)


def test_a_coarse_table_has_the_measured_entries_and_those_between_them():
    bounds = (2, 8), (2, 8)
    probe = make_probe()
    told: list[tuple[int, int]] = []
    coarse = coarse_table(probe, *bounds, "-", progress=lambda *place: told.append(place))
    whole = measure_table(make_probe(), *bounds, "-")
    assert coarse.estimator == "coarse"
    assert told[-1] == (len(coarse_changes(probe, *bounds)),) * 2
    assert len(coarse_changes(probe, *bounds)) < 0.65 * len(changes_of(probe, *bounds))
    for key, row in whole.bits.items():
        assert set(coarse.bits[key]) == set(row)
        for width in (2, 3, 4, 6):
            assert coarse.bits[key][width] == row[width]
        low, high = sorted(max(row[width], LEAST) for width in (4, 6))  # rounding gives a divergence of 0 a sign
        assert low * (1 - 1e-6) <= coarse.bits[key][5] <= high * (1 + 1e-6)
    for site, row in whole.units.items():
        assert set(coarse.units[site]) < set(row)
        assert max(coarse.units[site]) == max(row)
        assert all(coarse.units[site][count] == row[count] for count in coarse.units[site])


@pytest.mark.parametrize(
    ("row", "bounds", "expected"),
    [
        ({2: 1.0, 4: 0.01}, (2, 4), {3: 0.1}),
        ({2: 1.0, 5: 1e-3}, (2, 5), {3: 0.1, 4: 0.01}),
        ({2: 8.0, 3: 4.0, 4: 2.0}, (2, 6), {5: 1.0, 6: 0.5}),  # on at its slope
        ({2: 100.0, 3: 1.0}, (2, 4), {4: 0.25}),  # by four at most
        ({4: 4.0, 6: 1.0}, (4, 8), {5: 2.0, 7: 0.5, 8: 0.25}),  # by what one bit of the last two gave
        ({2: 1.0, 3: 2.0}, (2, 4), {4: 2.0}),  # and never up
        ({3: 0.5}, (3, 5), {4: 0.5, 5: 0.5}),
        ({2: -0.1, 4: 0.0}, (2, 4), {3: 1e-12}),
    ],
)
def test_other_widths_follow_the_measured_ones(row, bounds, expected):
    found = interpolate(row, bounds)
    assert {b: found[b] for b in row} == row
    assert {b: found[b] for b in found if b not in row} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("bounds", "widths"),
    [((2, 8), [2, 3, 4, 6]), ((4, 8), [4, 5, 6]), ((5, 8), [5, 6]), ((7, 8), [7, 8]), ((2, 2), [2]), ((8, 8), [8])],
)
def test_every_range_of_widths_has_measured_ones(bounds, widths):
    assert measured_widths(bounds) == widths


class Named(nn.Module):
    """A model of one input behind keywords, whose output is one of several in a dict."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image, scale):
        output = self.model(image)
        return {"logits": output * scale, "other": output.mean()}


def test_a_model_of_several_inputs_has_the_table_of_its_part():
    torch.manual_seed(0)
    plain, x = Branches().eval(), torch.randn(24, 3, 6, 6)
    one = jpq.sensitivity(plain, x, w_bits=(2, 3), a_bits=(2, 3))
    scale = torch.ones(24, 1)
    inputs = [{"image": x, "scale": scale}]
    several = jpq.sensitivity(Named(plain).eval(), inputs, w_bits=(2, 3), a_bits=(2, 3))
    assert several.divergence.tolist() == pytest.approx(one.divergence.tolist(), rel=1e-5, abs=1e-8)
    assert several.name.str.removeprefix("model.").tolist() == one.name.tolist()
    fisher = jpq.sensitivity(Named(plain).eval(), inputs, w_bits=(2, 3), a_bits=(2, 3), estimator="fisher")
    assert (fisher.divergence > 0).any()


def test_only_samples_of_real_numbers_are_mixed():
    ids, mask, x = torch.arange(6).view(3, 2), torch.ones(3, 2), torch.randn(3, 4)
    tokens = mix_pairs((ids, mask))
    assert tokens[0] is ids
    assert tokens[1] is mask
    mixed = mix_pairs({"a": x, "b": mask, "weight": torch.ones(5)})
    assert torch.equal(mixed["a"], mix_pairs(x))
    assert not torch.equal(mixed["a"], x)
    assert torch.equal(mixed["weight"], torch.ones(5))


def test_a_model_without_a_main_output_is_refused():
    class Pair(Named):
        def forward(self, image):
            return self.model(image), image

    with pytest.raises(JpqError, match="main output is one tensor"):
        jpq.sensitivity(Pair(Branches()).eval(), torch.randn(8, 3, 6, 6), w_bits=(2, 2), a_bits=(2, 2))
