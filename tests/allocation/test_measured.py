"""The sensitivity table against runs with exactly one change, its file, and the solver against brute force."""

import copy
import json
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from convnet import EXAMPLE, convnet, ranked

from jpq.allocation.measured import measure
from jpq.allocation.measured.calibration import mix_pairs
from jpq.allocation.measured.measure import measure_table
from jpq.allocation.measured.probe import Probe
from jpq.allocation.measured.solve import Solver, predicted_divergence
from jpq.allocation.measured.table import SensitivityTable, check_table, model_checksum, read_table, write_table
from jpq.compression.calibration import reestimate_batchnorm
from jpq.costs import bops
from jpq.costs.target import Target, all_met, parse_targets
from jpq.methods.quantizers import fit_threshold
from jpq.methods.quantizers.uniform_integer import quantize_tensor
from jpq.tasks import CLASSIFICATION
from jpq.types import JpqError


def orders(net):
    """site -> units by their ranking, the best first."""
    pairs = zip(net.sites, net.gates, strict=True)
    return {site.name: gate.margin()[0].argsort(descending=True).tolist() for site, gate in pairs}


@pytest.fixture(scope="module")
def probe():
    net = ranked()
    return Probe(net, [mix_pairs(EXAMPLE)], [EXAMPLE], CLASSIFICATION.divergence, orders(net))


@pytest.fixture(scope="module")
def table(probe):
    return measure_table(probe, (2, 4), (2, 4), model_checksum(convnet().model))


def test_nothing_changed_diverges_by_nothing(probe):
    assert probe.measure() == 0
    with probe.changed({key: 16 for key in probe.keys}):
        fine = abs(probe.measure())
    with probe.changed({key: 2 for key in probe.keys}):
        assert probe.measure() > 100 * fine


def test_an_entry_is_what_one_change_gives(table):
    x, layer = mix_pairs(EXAMPLE), convnet().network.layers[1]
    model = copy.deepcopy(convnet().model).eval()
    with torch.no_grad():
        reference = model(x)
        weight = model.get_submodule(layer.name).weight
        weight.copy_(quantize_tensor(weight, fit_threshold(weight, 2, True, True), 2, True))
        expected = float(CLASSIFICATION.divergence(model(x), reference))
    assert table.bits[layer.name, "w"][2] == pytest.approx(expected, rel=1e-4)


def test_a_count_of_units_is_what_dropping_the_others_gives(probe, table):
    x, net = mix_pairs(EXAMPLE), ranked()
    site = net.sites[1]
    order, count = probe.orders[site.name], measure.unit_counts(site.n)[0]
    dense, small = (copy.deepcopy(convnet().model).eval() for _ in range(2))
    keep = torch.zeros(1, site.n)
    keep[0, order[:count]] = 1
    with torch.no_grad():
        for tap in site.taps:
            weight = small.get_submodule(tap.layer).weight
            weight.mul_(tap.structure.expand(keep, weight.shape))
        for model in (dense, small):
            reestimate_batchnorm(model, [(EXAMPLE, EXAMPLE)])
        expected = CLASSIFICATION.divergence(small(x), dense(x))
    assert table.units[site.name][count] == pytest.approx(float(expected), rel=1e-3)
    assert table.units[site.name][site.n] == 0
    assert sorted(table.units[site.name]) == [*measure.unit_counts(site.n), site.n]


def test_dead_units_cost_nothing():
    net = ranked()
    site = net.sites[0]
    dead = torch.zeros(site.n, dtype=torch.bool)
    dead[: site.n // 2] = True
    with torch.no_grad():
        for tap in site.taps:  # what reads them has zero weights
            weight = net.model.get_submodule(tap.layer).parametrizations.weight.original
            weight.mul_(tap.structure.expand((~dead).float()[None], weight.shape))
    best_first = [*range(site.n // 2, site.n), *range(site.n // 2)]
    found = Probe(net, [EXAMPLE], [EXAMPLE], CLASSIFICATION.divergence, orders(net) | {site.name: best_first})
    row = measure_table(found, (8, 8), (8, 8), "-").units[site.name]
    assert row[site.n // 2] == pytest.approx(0, abs=1e-9)
    assert row[measure.unit_counts(site.n)[0]] > 1e-6


def test_units_have_no_negative_price_where_the_models_own_statistics_are_off():
    net = ranked()
    for module in net.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.mul_(3)
            module.running_mean.add_(0.5)
    found = Probe(net, [EXAMPLE], [EXAMPLE], CLASSIFICATION.divergence, orders(net))
    before = [reference.clone() for reference in found.references]
    units = measure_table(found, (8, 8), (8, 8), "-").units
    assert min(value for row in units.values() for value in row.values()) >= -1e-9
    assert max(value for row in units.values() for value in row.values()) > 1e-3
    assert all(map(torch.equal, found.references, before))  # the probe is as it was
    assert found.measure() == 0


def test_around_a_plan_one_step_at_a_time(probe):
    around = dict.fromkeys(probe.keys, 3)
    table = measure_table(probe, (2, 8), (2, 8), "-", around=around, step=1)
    assert all(sorted(row) == [2, 3, 4] for row in table.bits.values())
    assert all(abs(row[3]) < 1e-9 for row in table.bits.values())  # the plan itself
    with probe.changed(around):
        assert table.base["divergence"] == pytest.approx(probe.measure())
    assert table.estimator == "around"
    assert probe.measure() == 0  # the probe is as it was


def test_mixed_pairs_are_averages_and_numbers_of_tokens_stay():
    x = torch.randn(5, 2)
    torch.testing.assert_close(mix_pairs(x)[1], (x[0] + x[1]) / 2)
    tokens = torch.arange(4)[:, None]
    assert mix_pairs(tokens) is tokens


def synthetic(net, seed):
    """A random table of the convnet with falling divergences."""
    rng = np.random.default_rng(seed)
    image = {layer.name for layer in net.network.layers if layer.reads_input}
    bits = {}
    for name in net.plan().layers:
        for side in "wa":
            if side == "w" or name not in image:
                scale, base = 10 ** rng.uniform(-3, 0), rng.uniform(2, 5)
                bits[name, side] = {b: float(scale * base ** (2 - b)) for b in range(2, 7)}
    units = {}
    for site in net.sites:
        counts = [*measure.unit_counts(site.n), site.n]
        scale = 10 ** rng.uniform(-3, 0)
        units[site.name] = {k: float(scale * (1 - k / site.n) ** 2) for k in counts}
    best = {site.name: tuple(rng.permutation(site.n).tolist()) for site in net.sites}
    return SensitivityTable(bits, units, best, "single", "-", "-", 4)


def targets(net, **texts):
    named = {"bops": None, "macs": None, "size": None} | texts
    return parse_targets(named, net.exact_usage())


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
@pytest.mark.parametrize("share", ["0.6%", "1.2%"])
def test_bits_and_units_are_the_best_of_all(seed, share):
    net = ranked()
    table = synthetic(net, seed)
    solver = Solver(net, table, targets(net, bops=share))
    found = solver.solve()
    assert all_met(solver.targets, net.exact_usage(found.plan))
    assert found.divergence == pytest.approx(predicted_divergence(table, found.plan))
    names = list(solver.grids)
    best = min(
        value[0]
        for counts in product(*(solver.grids[name] for name in names))
        if (value := solver._solve_bits(dict(zip(names, counts, strict=True)), math.inf)) is not None
    )
    assert found.divergence == pytest.approx(best, rel=1e-9)


def test_only_numbers_of_units_that_may_stay_are_taken():
    net = ranked()
    table = synthetic(net, 0)
    net.multiple = 8
    grids = Solver(net, table, targets(net, bops="1%")).grids
    for site in net.sites:
        assert any(k % 8 for k in table.units[site.name])
        assert set(grids[site.name]) <= set(net.counts(site))


def test_room_is_filled_with_units_that_gain_and_no_others():
    """Half of the first site is dead; the other sites open as far as the target allows."""
    net = ranked()
    table = synthetic(net, 3)
    site, n = net.sites[0].name, net.sites[0].n
    dead = {k: (0.0 if k >= n // 2 else 1.0 - k / n) for k in table.units[site]}
    table = replace(table, units=table.units | {site: dead})
    solver = Solver(net, table, targets(net, bops="3%"))
    few = {s.name: tuple(u in table.orders[s.name][: s.n // 4] for u in range(s.n)) for s in net.sites}
    start = replace(
        net.plan(), kept=few, layers={k: replace(x, w_bits=4, a_bits=4) for k, x in net.plan().layers.items()}
    )
    plan = solver.fill(start)
    assert all_met(solver.targets, net.exact_usage(plan))
    assert sum(plan.kept[site]) <= n // 2
    for s in net.sites:
        count = sum(plan.kept[s.name])
        assert count > s.n // 4
        assert plan.kept[s.name] == tuple(u in table.orders[s.name][:count] for u in range(s.n))
        if count < s.n:
            more = tuple(u in table.orders[s.name][: count + 1] for u in range(s.n))
            wider = replace(plan, kept={**plan.kept, s.name: more})
            gain = predicted_divergence(table, plan) - predicted_divergence(table, wider)
            assert gain <= 1e-4 or not all_met(solver.targets, net.exact_usage(wider))


def test_room_goes_to_the_unit_of_largest_gain_for_its_cost():
    net = ranked()
    table = synthetic(net, 5)
    half = {s.name: tuple(u in table.orders[s.name][: s.n // 2] for u in range(s.n)) for s in net.sites}
    start = replace(net.plan(), kept=half)
    steps = []
    for s in net.sites:
        more = tuple(u in table.orders[s.name][: s.n // 2 + 1] for u in range(s.n))
        wider = replace(start, kept={**half, s.name: more})
        gain = predicted_divergence(table, start) - predicted_divergence(table, wider)
        cost = float(bops(net.exact_usage(wider)) - bops(net.exact_usage(start)))
        steps.append((gain / cost, wider))
    best = max(steps, key=lambda step: step[0])[1]
    limit = Target("bops", "", int(bops(net.exact_usage(best))))  # room for this step and none after it
    assert Solver(net, table, (limit,)).fill(start).kept == best.kept


def test_bounds_lie_below_the_best_of_all_bits_and_near_it():
    net = ranked()
    solver = Solver(net, synthetic(net, 4), targets(net, bops="1%"))
    rng = np.random.default_rng(0)
    several = [{name: int(rng.choice(grid)) for name, grid in solver.grids.items()} for _ in range(30)]
    near = 0
    for base in [counts for counts in several if solver._solve_bits(counts, math.inf) is not None][:3]:
        bounds = solver._by_bound([base, *several], solver._prices(base))
        assert [bound for bound, _ in bounds] == sorted(bound for bound, _ in bounds)
        for bound, counts in bounds:
            found = solver._solve_bits(counts, math.inf)
            assert found is None or bound <= found[0] * (1 + 1e-9)
            near += counts == base and found is not None and bound > 0.5 * found[0]
    assert near >= 3


def test_several_targets_at_once_and_pinned_widths():
    net = ranked()
    table = synthetic(net, 1)
    limits = targets(net, bops="1.5%", size="9%", macs="60%")
    layer = net.network.layers[1].name
    found = Solver(net, table, limits, pinned={(layer, "w"): 6}).solve()
    assert all_met(limits, net.exact_usage(found.plan))
    assert found.plan.layers[layer].w_bits == 6
    free = Solver(net, table, limits).solve()
    assert free.divergence <= found.divergence + 1e-12


def test_bits_alone_are_monotone_in_the_budget_and_never_better_than_with_units():
    net = ranked()
    table = synthetic(net, 2)
    alone = [
        Solver(net, table, targets(net, bops=s), free_units=False).solve().divergence for s in ("0.7%", "1%", "2%")
    ]
    both = [Solver(net, table, targets(net, bops=s)).solve().divergence for s in ("0.7%", "1%", "2%")]
    assert alone == sorted(alone, reverse=True)
    assert all(b <= a + 1e-12 for a, b in zip(alone, both, strict=True))


def test_dead_units_go_before_any_bit():
    net = ranked()
    table = synthetic(net, 3)
    site = net.sites[0].name
    n = len(table.orders[site])
    dead = {k: (0.0 if k >= n // 2 else 10.0) for k in table.units[site]}
    units = {name: {k: (0.0 if k == max(row) else 10.0) for k in row} for name, row in table.units.items()}
    found = Solver(net, replace(table, units=units | {site: dead}), targets(net, bops="2%")).solve()
    assert found.counts[site] == n // 2
    assert all(count == len(table.orders[name]) for name, count in found.counts.items() if name != site)


def test_targets_that_nothing_meets_are_refused():
    net = ranked()
    with pytest.raises(JpqError, match="cannot be met"):
        Solver(net, synthetic(net, 0), targets(net, bops="0.001%")).solve()


def test_the_file_gives_the_same_table_and_plan(table, tmp_path):
    net = ranked()
    path = tmp_path / "table.csv"
    write_table(path, table, net.network)
    again = read_table(str(path))
    assert again == table
    limits = targets(net, bops="1%")
    assert Solver(net, again, limits).solve() == Solver(net, table, limits).solve()
    check_table(again, net.network, model_checksum(convnet().model), path)
    with pytest.raises(JpqError, match="other weights"):
        check_table(again, net.network, "0" * 16, path)
    with pytest.raises(JpqError, match="another model"):
        check_table(replace(again, bits=dict(again.bits) | {("none", "w"): {2: 0.0}}), net.network, again.model, path)


def test_a_table_of_another_task_is_refused_and_one_that_names_none_is_not(table, tmp_path):
    network, path = ranked().network, tmp_path / "table.csv"
    write_table(path, replace(table, task="regression"), network)
    named = read_table(path)
    check_table(named, network, table.model, path, task="regression")
    check_table(named, network, table.model, path)
    with pytest.raises(JpqError, match="for the task 'regression', and this is 'classification'"):
        check_table(named, network, table.model, path, task="classification")
    path.write_text(path.read_text().replace('"task": "regression", ', ""))  # as files of before
    check_table(read_table(path), network, table.model, path, task="classification")


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.97])
def test_a_file_cut_short_is_refused(cut, table, tmp_path):
    path = tmp_path / "table.csv"
    write_table(path, table, ranked().network)
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: int(cut * len(text))], encoding="utf-8")
    with pytest.raises(JpqError, match=r"cut short|no sensitivity table"):
        read_table(path)


def test_a_file_of_another_version_and_one_of_another_kind_are_refused(table, tmp_path):
    path = tmp_path / "table.csv"
    write_table(path, table, ranked().network)
    first, _, rest = path.read_text(encoding="utf-8").partition("\n")
    head = json.loads(first.removeprefix("# jpq sensitivity ")) | {"format": 99}
    path.write_text(f"# jpq sensitivity {json.dumps(head)}\n{rest}", encoding="utf-8")
    with pytest.raises(JpqError, match="format 99"):
        read_table(path)
    path.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(JpqError, match="no sensitivity table"):
        read_table(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergences_that_are_no_numbers_are_told_with_the_change(value):
    net = ranked()
    layer, site = net.network.layers[1].name, net.sites[0].name
    probe = Probe(net, [mix_pairs(EXAMPLE)], [EXAMPLE], lambda output, reference: torch.tensor(value), orders(net))
    for change, text in (
        (measure.Change("weight", layer, 2), f"^With the weight of layer '{layer}' at 2 bits .* is {value}, no number"),
        (measure.Change("units", site, 1), f"^With 1 of the units of '{site}' the network's divergence"),
    ):
        with pytest.raises(JpqError, match=text):
            measure_table(probe, (2, 4), (2, 4), "", wanted=[change])
    with pytest.raises(JpqError, match="With the plan that the table is around"):
        measure_table(probe, (2, 4), (2, 4), "", around=dict.fromkeys(probe.keys, 3))


def test_a_float_model_that_gives_nan_has_no_sensitivities():
    net = ranked()
    with torch.no_grad():
        for parameter in net.model.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(JpqError, match="The float model gives NaN for samples of the calibration"):
        Probe(net, [mix_pairs(EXAMPLE)], [EXAMPLE], CLASSIFICATION.divergence, orders(net))
