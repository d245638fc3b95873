"""Latency from a table of measured layers: exact at what was measured, monotone, with true gradients, and a target."""

from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import product
from math import prod

import numpy as np
import pytest
import torch
from convnet import convnet
from gated import check_no_step_fits
from hypothesis import given, settings
from hypothesis import strategies as st

from jpq.compression import discretize, feasibility
from jpq.compression.attach import attach
from jpq.costs import LayerUse, baseline, latency_ns, layer_latency
from jpq.costs.latency import NS, interpolate, isotonic
from jpq.costs.latency_table import MODELLED, MOST_ROWS, Entry, LatencyTable, Shape, format_table, parse_table
from jpq.costs.target import FULL_USE, Controller, parse_targets, used_share
from jpq.methods.gates import VIB, Frozen
from jpq.methods.quantizers import Fixed, Learned
from jpq.session import compress
from jpq.tracing.network import equivalent_calls, latency_shape, with_layer_times
from jpq.tracing.sites import channels, masks
from jpq.types import JpqError

CONV = Shape("conv", 1, (3, 3), (1, 1), (8, 8))
HEADER = "kind,kernel,stride,size,inputs,outputs,bits,ms"


def made(network, bits=(8, 32), seed=0, noise=0.0):
    """A table of every layer: a fixed part, and a part that grows with the work; `noise` is relative."""
    rng = np.random.default_rng(seed)
    entries = []
    for layer in network.layers:
        key, sides = (
            latency_shape(layer),
            [sorted({1, n // 4 or 1, n // 2 or 1, n}) for n in (len(layer.inputs), len(layer.outputs))],
        )
        for i, o, b in product(*sides, bits):
            work = prod(key.size) * prod(key.kernel) * i * o
            ms = (0.002 + work * 1e-7 * b / 32) * (1 + noise * rng.uniform(-1, 1))
            entries.append(Entry(key, i, o, b, round(ms, 6)))
    return LatencyTable("made", tuple(entries))


@cache
def measured():
    """A table of every layer of the convnet."""
    return made(convnet().network)


@cache
def timed():
    """The convnet's network with the times of that table."""
    return with_layer_times(convnet().network, measured())


def net(network=None, high=8):
    widths = lambda layer: (Learned(high, 2, high), Fixed(8) if layer.reads_input else Learned(high, 2, high))  # noqa: E731
    network = network or timed()
    return attach(convnet().model, network, channels(network), VIB, widths, [convnet().example], "djpq")


@cache
def shared_net():
    """The convnet with gates and learned widths; tests set its decisions."""
    return net()


def of(entries, inputs=16, outputs=32):
    return interpolate(LatencyTable("t", tuple(entries)), CONV, "float>float", inputs, outputs, Fraction(1))


def grid(seen, bits=8, ins=(1, 8, 16), outs=(4, 32)):
    return [Entry(CONV, i, o, bits, ms) for (i, o), ms in zip(product(ins, outs), seen, strict=True)]


RISING = grid([0.1, 0.4, 0.2, 1.0, 0.5, 2.5])


def test_whole_model_is_the_sum_of_its_lines():
    dense = {(e.shape, e.inputs, e.outputs, e.bits): e.ms for e in measured().entries}
    for bits in (8, 32):
        want = sum(
            round(dense[latency_shape(x), len(x.inputs), len(x.outputs), bits] * NS) * equivalent_calls(x)
            for x in convnet().network.layers
        )
        uses = [replace(u, w_bits=bits, a_bits=bits) for u in shared_net().exact_usage()]
        assert latency_ns(uses) == want
    assert baseline(shared_net().exact_usage())["latency"] == want


def test_halved_widths_that_were_measured_cost_their_lines():
    plan = shared_net().plan()
    half = {s: tuple(i < len(units) // 2 for i in range(len(units))) for s, units in plan.kept.items()}
    uses = shared_net().exact_usage(replace(plan, kept=half))
    lines = {(e.shape, e.inputs, e.outputs, e.bits): e.ms for e in measured().entries}
    total = 0
    for layer, use in zip(convnet().network.layers, uses, strict=True):
        i, o = use.inputs * len(layer.inputs), use.outputs * len(layer.outputs)
        total += round(lines[latency_shape(layer), i, o, 8] * NS)
    assert latency_ns(uses) == total


def test_every_node_of_a_table_in_order_keeps_its_time():
    own = of(RISING)
    for e in RISING:
        assert own(Fraction(e.inputs, 16), Fraction(e.outputs, 32), 1, 8, 8) == round(e.ms * NS)


@pytest.mark.parametrize(
    ("inputs", "outputs", "want"),
    [(12, 32, 1.75), (8, 18, 0.6), (12, 18, 1.05), (1, 1, 0.1), (16, 2, 0.5), (32, 32, 5.0), (16, 64, 5.0)],
)
def test_between_and_beyond_the_nodes_by_hand(inputs, outputs, want):
    """Bilinear between, constant below the smallest, in proportion above the largest."""
    assert float(of(RISING)(Fraction(inputs, 16), Fraction(outputs, 32), 1, 8, 8)) == pytest.approx(want * NS)


@given(
    seen=st.lists(st.floats(0.001, 10), min_size=18, max_size=18),
    ends=st.lists(st.integers(1, 64), min_size=4, max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_never_falls_with_channels_or_bits_however_noisy_the_table(seen, ends):
    entries = [e for k, b in enumerate((2, 4, 8)) for e in grid(seen[6 * k : 6 * k + 6], b)]
    own = of(entries)
    (i, j), (m, n) = sorted(ends[:2]), sorted(ends[2:])
    at = lambda x, y, bits: own(Fraction(x, 16), Fraction(y, 32), 1, bits, 2)  # noqa: E731
    assert at(i, m, 4) <= at(j, n, 4)
    assert at(i, m, 2) <= at(i, m, 3) == at(i, m, 4) <= at(i, m, 5) == at(i, m, 8)


@given(seen=st.lists(st.integers(1, 1000), min_size=12, max_size=12), lost=st.sets(st.integers(0, 11), max_size=8))
@settings(max_examples=100, deadline=None)
def test_the_fit_is_as_near_as_any_monotone_array(seen, lost):
    """No monotone array deviates less than half of the largest inversion: the bound for the best, met here."""
    array = np.array([-1 if k in lost else v for k, v in enumerate(seen)]).reshape(2, 2, 3)
    fit = isotonic(array)
    assert all((np.diff(fit, axis=a) >= 0).all() for a in range(3))
    known = [(np.array(at), v) for at, v in np.ndenumerate(array) if v > 0]
    worst = max((v - w for a, v in known for b, w in known if (a <= b).all()), default=0)
    deviation = max(abs(int(fit[tuple(a)]) - v) for a, v in known)
    assert deviation <= worst / 2 + 1


@pytest.mark.parametrize("place", [(5.3, 20.0), (9.0, 7.5), (15.5, 31.0), (20.0, 40.0)])
def test_gradients_are_those_of_finite_differences(place):
    own = of(RISING)
    share = [
        torch.tensor(n / whole, dtype=torch.float64, requires_grad=True)
        for n, whole in zip(place, (16, 32), strict=True)
    ]
    assert torch.autograd.gradcheck(lambda a, b: own(a, b, 1, 8, 8), share, eps=1e-5, atol=1e-3)


def test_at_a_node_the_gradient_is_that_of_the_piece_below_so_a_full_layer_is_pushed():
    share = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    own = of(RISING)
    (slope,) = torch.autograd.grad(own(share, 1, 1, 8, 8), share)
    assert float(slope) == pytest.approx((2.5 - 1.0) / 8 * 16 * NS)


def test_bits_cost_steps_and_their_gradient_spreads_a_step():
    own = of([*grid([0.1] * 6, 4), *grid([0.3] * 6, 8), *grid([0.2] * 6, 32)])
    at = lambda bits: own(1, 1, 1, bits, 2)  # noqa: E731
    assert [float(at(b)) / NS for b in (2, 4, 5, 8, 9, 32)] == [0.1, 0.1, 0.3, 0.3, 0.2, 0.2]
    bits = torch.tensor(6.0, requires_grad=True)
    cost = at(bits)
    assert float(cost.detach()) == pytest.approx(0.3 * NS)
    cost.backward()
    assert float(bits.grad) == pytest.approx(0.2 * NS / 4)


def test_masks_cost_what_their_scheme_was_measured_at_and_the_dense_time_where_it_was_not():
    blocks = [Entry(CONV, 16, 32, 8, ms, "block:8x4", d) for d, ms in ((0.25, 1.0), (0.5, 1.5))]
    own = of([*RISING, *blocks])
    assert own(1, 1, Fraction(1, 4), 8, 8, "block:8x4") == NS
    assert own(1, 1, Fraction(3, 8), 8, 8, "block:8x4") == Fraction(5, 4) * NS
    assert own(1, 1, Fraction(1, 8), 8, 8, "block:8x4") == NS
    assert own(1, 1, Fraction(3, 4), 8, 8, "block:8x4") == 2 * NS
    assert own(1, 1, Fraction(1, 4), 8, 8, "elementwise") == own(1, 1, 1, 8, 8)
    assert (own.measured("block:8x4"), own.measured("2:4"), own.measured("dense")) == (True, False, True)
    density = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: own(1, 1, d, 8, 8, "block:8x4"), density, eps=1e-5, atol=1e-3)


BLOCK = "block:8x4"


def full(own, density=1, bits=8, scheme=BLOCK):
    """Milliseconds of the whole layer of 16 and 32 channels under a mask."""
    return float(own(1, 1, density, bits, bits, scheme)) / NS


def test_a_mask_runs_at_the_share_of_the_next_wider_width_that_was_measured_and_else_of_the_nearest():
    dense = [e for bits, ms in ((2, 1.0), (4, 2.0), (8, 4.0)) for e in grid([ms] * 6, bits)]
    shares = {2: 0.9, 8: 0.25}
    own = of([*dense, *(Entry(CONV, 16, 32, b, shares[b] * {2: 1.0, 8: 4.0}[b], BLOCK, 0.5) for b in shares)])
    half = Fraction(1, 2)
    assert [full(own, half, bits) for bits in (2, 3, 4, 8)] == [0.9, 0.5, 0.5, 1.0]  # 0.9 of 1, 0.25 of 2, 0.25 of 4
    narrow = of([*dense, Entry(CONV, 16, 32, 2, 0.9, BLOCK, 0.5), Entry(CONV, 16, 32, 4, 0.8, BLOCK, 0.5)])
    assert full(narrow, half, 8) == 1.6  # 0.4 of 4: of 2 and 4 bits, 4 are nearer


def test_a_masks_times_are_those_beside_the_dense_layer_of_the_same_channels():
    lines = [Entry(CONV, 16, 32, 8, 1.0, BLOCK, 0.5), Entry(CONV, 8, 32, 8, 0.9, BLOCK, 0.5)]
    assert full(of([*RISING, *lines]), Fraction(1, 2)) == 1.0  # 1 of 2.5 ms; what 8 channels in took does not count
    assert full(of([*RISING, *lines[::-1]]), Fraction(1, 2)) == 1.0
    narrow = [Entry(CONV, 8, 32, 8, 0.25, BLOCK, 0.5), Entry(CONV, 16, 4, 8, 0.4, BLOCK, 0.5)]
    assert full(of([*RISING, *narrow]), Fraction(1, 2)) == 2.5 * 0.25  # 8 and 32 channels: a quarter of the 1.0 ms
    assert full(of([*RISING, *narrow], 16, 4), Fraction(1, 2)) == 0.5 * 0.8  # 16 and 4: four fifths of 0.5 ms


def test_noisy_masks_never_run_faster_at_a_larger_density_and_repeats_count_by_their_median():
    noisy = [Entry(CONV, 16, 32, 8, ms, BLOCK, d) for d, ms in ((0.25, 1.5), (0.5, 1.0), (0.75, 2.0))]
    own = of([*RISING, *noisy])
    assert [full(own, Fraction(d, 4)) for d in (1, 2, 3, 4)] == [1.25, 1.25, 2.0, 2.5]
    again = of([*RISING, *(Entry(CONV, 16, 32, 8, ms, BLOCK, 0.5) for ms in (9.0, 0.5, 1.0))])
    assert full(again, Fraction(1, 2)) == 1.0


def test_a_line_that_was_measured_several_times_counts_by_its_median():
    assert full(of([e for ms in (0.7, 0.1, 0.2) for e in grid([ms] * 6)]), scheme="dense") == 0.2


def test_times_that_were_modelled_count_and_are_not_called_measured():
    own = of([*RISING, Entry(CONV, 16, 32, 8, 1.0, BLOCK, 0.5, notes={"source": MODELLED})])
    assert full(own, Fraction(1, 2)) == 1.0
    assert not own.measured(BLOCK)


def test_dense_lines_of_any_form_serve_beside_masks_of_the_layers_own():
    own = of([*RISING, Entry(CONV, 16, 32, 8, 1.0, BLOCK, 0.5, form="float>float")])
    assert full(own, Fraction(1, 2)) == 1.0
    assert full(own, scheme="dense") == 2.5


def test_the_wider_of_weight_and_input_says_the_time_and_gets_the_gradient():
    own = of([*grid([0.1] * 6, 4), *grid([0.3] * 6, 8)])
    for w, a in ((2, 8), (8, 2)):
        assert float(own(1, 1, 1, w, a)) == 0.3 * NS
        both = [torch.tensor(float(n), requires_grad=True) for n in (w, a)]
        cost = own(1, 1, 1, *both)
        cost.backward()
        assert float(cost.detach()) == pytest.approx(0.3 * NS)
        assert [float(n.grad) for n in both] == [pytest.approx(0.2 * NS / 4) if n == 8 else 0.0 for n in (w, a)]
        assert float(own(1, 1, 1, both[0].detach(), a)) == pytest.approx(0.3 * NS)


def test_widths_that_rounding_lifted_run_as_what_they_are_and_floats_have_no_slope():
    own = of([*grid([0.1] * 6, 4), *grid([0.3] * 6, 8), *grid([0.2] * 6, 32)])
    assert float(own(1, 1, 1, torch.tensor(4.0000005), 2)) == pytest.approx(0.1 * NS)
    bits = torch.tensor(20.0, requires_grad=True)
    own(1, 1, 1, bits, 2).backward()
    assert float(bits.grad) == 0


def test_a_depthwise_layers_time_depends_on_its_outputs_alone():
    shape = replace(CONV, kind="depthwise")
    lines = [Entry(shape, n, n, 8, ms) for n, ms in ((4, 0.2), (16, 0.8))]
    own = interpolate(LatencyTable("t", tuple(lines)), shape, "float>float", 16, 16, Fraction(1))
    assert [float(own(Fraction(i, 16), Fraction(10, 16), 1, 8, 8)) / NS for i in (1, 10, 16)] == [0.5] * 3


def test_calls_of_a_layer_add_up_and_what_is_no_layer_takes_no_time():
    table = LatencyTable("t", tuple(RISING))
    twice = interpolate(table, CONV, "float>float", 16, 32, Fraction(2))
    assert float(twice(1, 1, 1, 8, 8)) == 5.0 * NS
    layer = LayerUse("a", 100, 100, 32, 1, 1, 1, 8, 8, clock=twice)
    others = [LayerUse("b", 100, 0, 0, 1, 1, 1, 32, 32, part=part) for part in ("product", "table")]
    assert latency_ns([layer, *others]) == 5.0 * NS


def test_a_time_below_a_nanosecond_counts_as_one():
    own = of([*grid([1e-8] * 6), Entry(CONV, 16, 32, 8, 1e-8, BLOCK, 0.5)])
    assert own(1, 1, 1, 8, 8) == 1


def test_groups_are_part_of_a_shape_where_they_change_the_work():
    text = "kind,groups,kernel,stride,size,inputs,outputs,bits,ms\n"
    rows = ("conv,4,3x3,1x1,8x8,8,8,8,1", "depthwise,8,3x3,1x1,8x8,8,8,8,1", "linear,2,,,,8,8,8,1")
    entries = parse_table(text + "\n".join(rows), "t").entries
    assert [e.shape.groups for e in entries] == [4, 1, 1]


def test_a_masked_network_is_charged_by_its_scheme():
    blocks = [replace(e, scheme="block:8x4", density=0.5, ms=e.ms / 2) for e in measured().entries]
    network = with_layer_times(convnet().network, LatencyTable("t", (*measured().entries, *blocks)))
    sites = [s for s in masks(network, "block:8x4") if s.taps[0].layer == convnet().network.layers[1].name]
    masked = attach(
        convnet().model, network, sites, Frozen.all, lambda _: (Fixed(8), Fixed(8)), [convnet().example], "djpq"
    )
    plan = masked.plan()
    name = convnet().network.layers[1].name
    units = plan.masks[name].units().clone()
    units.view(-1)[::2] = False
    uses = masked.exact_usage(replace(plan, masks={name: type(plan.masks[name]).of(units)}))
    use = next(u for u in uses if u.name == name)
    assert use.density == Fraction(1, 2)
    assert 2 * layer_latency(use) == pytest.approx(float(layer_latency(replace(use, density=1))), abs=2)


def test_a_layer_takes_the_lines_of_its_own_form():
    forms = [replace(e, form="float>int8", ms=e.ms / 2) for e in RISING]
    other = [replace(e, form="int8>float", ms=e.ms * 2) for e in RISING]
    key = (CONV, "float>int8", 16, 32, Fraction(1))
    full = lambda entries: float(interpolate(LatencyTable("t", tuple(entries)), *key)(1, 1, 1, 8, 8)) / NS  # noqa: E731
    assert full([*RISING, *forms, *other]) == 1.25  # its own
    assert full([*RISING, *other]) == 2.5  # those that hold for any
    assert full(other) == 5.0  # whatever there is
    assert [x.form for x in convnet().network.layers] == ["float>int8", "int8>int8", "int8>float", "float>float"]


def test_what_the_loss_sees_is_what_the_report_says():
    for seed in range(5):
        torch.manual_seed(seed)
        for p in shared_net().gates.parameters():
            p.data.normal_(0, 3)
        seen = latency_ns(shared_net().soft_usage())
        assert float(seen.detach()) == pytest.approx(float(latency_ns(shared_net().exact_usage())), rel=1e-5)
        grads = torch.autograd.grad(seen, list(shared_net().gates.parameters()), allow_unused=True)
        assert any(g is not None and bool((g.abs() > 0).any()) for g in grads)


@given(seed=st.integers(0, 10**6), share=st.floats(0.12, 0.24), noise=st.sampled_from([0.0, 0.2]))
@settings(max_examples=25, deadline=None)
def test_lands_under_the_target_and_uses_it(seed, share, noise):
    network = net(with_layer_times(convnet().network, made(convnet().network, noise=noise)))
    torch.manual_seed(seed)
    for p in network.gates.parameters():
        p.data.normal_(0, 3)
    targets = parse_targets({"latency": f"{100 * share:.4f}%"}, network.exact_usage())
    plan = discretize.discretize(network, targets)
    assert used_share(targets[0], network.exact_usage(plan)) <= 1
    check_no_step_fits(network, targets, plan)
    assert {x.w_bits for x in plan.layers.values()} == {8}  # nothing below 8 bits was measured: fewer gain nothing


@pytest.mark.parametrize("seed", range(5))
def test_uses_97_percent_of_a_latency(seed):
    torch.manual_seed(seed)
    for p in shared_net().gates.parameters():
        p.data.normal_(0, 3)
    for text in ("24%", "18%", "12%"):
        targets = parse_targets({"latency": text}, shared_net().exact_usage())
        plan = discretize.discretize(shared_net(), targets)
        assert FULL_USE <= used_share(targets[0], shared_net().exact_usage(plan)) <= 1
        assert feasibility.underuse_note(targets, shared_net(), plan) is None


def test_lands_on_latency_and_bops_together():
    targets = parse_targets({"latency": "20%", "bops": "0.5%"}, shared_net().exact_usage())
    uses = shared_net().exact_usage(discretize.discretize(shared_net(), targets))
    assert all(used_share(g, uses) <= 1 for g in targets)
    assert max(used_share(g, uses) for g in targets) >= FULL_USE


def test_the_controller_pushes_channels_but_not_bits():
    network = net()
    targets = parse_targets({"latency": "20%"}, network.exact_usage())
    controller = Controller(targets)
    controller.begin(network.exact_usage())
    loss = controller.loss(network.soft_usage(), 1.0)
    gates = torch.autograd.grad(loss, list(network.gates.parameters()), allow_unused=True, retain_graph=True)
    assert any(g is not None and bool((g != 0).any()) for g in gates)
    bits = torch.autograd.grad(loss, [p for w in network.widths() for p in w.parameters()], allow_unused=True)
    assert all(g is None or bool((g == 0).all()) for g in bits)


def test_a_cost_that_nothing_can_move_still_counts():
    still = attach(
        convnet().model, timed(), (), Frozen.all, lambda _: (Fixed(8), Fixed(8)), [convnet().example], "uniform"
    )
    targets = parse_targets({"latency": "20%"}, still.exact_usage())
    controller = Controller(targets)
    controller.begin(still.exact_usage())
    assert float(controller.loss(still.exact_usage(), 1.0)) > 0


@pytest.mark.parametrize(
    ("text", "ns"), [("0.02ms", 20_000), ("20us", 20_000), ("20000 ns", 20_000), ("2e-5s", 20_000), ("50%", None)]
)
def test_targets_of_time(text, ns):
    full = baseline(shared_net().exact_usage())["latency"]
    assert parse_targets({"latency": text}, shared_net().exact_usage())[0].limit == (ns or int(full / 2))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("3", "not an amount"),
        ("3MB", "not an amount"),
        ("0ms", "allows nothing"),
        ("9s", "more than"),
        ("-1ms", "not an"),
    ],
)
def test_bad_targets_of_time(text, why):
    with pytest.raises(JpqError, match=why):
        parse_targets({"latency": text}, shared_net().exact_usage())


def test_quantized_layers_may_be_slower_than_float_and_still_be_a_target():
    slow = tuple(replace(e, ms=3 * e.ms) if e.bits == 8 else e for e in made(convnet().network, (8, 32)).entries)
    uses = net(
        with_layer_times(
            convnet().network, LatencyTable("slow", tuple(replace(e, ms=9 * e.ms) if e.bits == 8 else e for e in slow))
        )
    ).exact_usage()
    assert parse_targets({"latency": "150%"}, uses)[0].limit > baseline(uses)["latency"]


def test_an_impossible_target_names_the_smallest_possible_in_milliseconds():
    least = float(latency_ns(shared_net().exact_usage(feasibility.cheapest_plan(shared_net())))) / NS
    with pytest.raises(JpqError, match=rf"smallest possible is {least:.3f}\d* ms"):
        feasibility.check_reachable(shared_net(), parse_targets({"latency": "1us"}, shared_net().exact_usage()))


def test_without_a_table_one_sentence_says_what_to_run():
    with pytest.raises(JpqError, match="`jpq bench`"):
        compress(convnet().model, convnet().example, latency="50%")
    with pytest.raises(JpqError, match="`jpq bench`"):
        latency_ns(net(convnet().network).exact_usage())


def test_a_layer_that_nobody_measured_is_refused_by_name():
    lost = convnet().network.layers[2]
    kept = tuple(e for e in measured().entries if e.shape != latency_shape(lost))
    with pytest.raises(JpqError, match=rf"no line for 1 of 4 layers, such as '{lost.name}'"):
        with_layer_times(convnet().network, LatencyTable("mine.csv", kept))
    with pytest.raises(JpqError, match="scheme 'blok:8x4' is no structure"):
        with_layer_times(
            convnet().network,
            LatencyTable(
                "mine.csv", (*measured().entries, replace(measured().entries[0], scheme="blok:8x4", density=0.5))
            ),
        )


def test_a_table_survives_its_file():
    noted = replace(measured().entries[0], notes={"hardware": "x, y", "n": "3"}, form="float>int8")
    entries = (noted, *measured().entries[1:])
    again = parse_table(format_table(entries), "again.csv")
    assert again.entries == entries
    assert again.note("hardware") == "x, y"


@pytest.mark.parametrize("ms", [5e-324, 1.2345e-7, 4.9e-7, 0.1 + 0.2, 1 / 3, 1e7])
def test_a_table_keeps_every_time_and_density_that_it_may_hold(ms):
    entry = replace(measured().entries[0], ms=ms, scheme="block:8x4", density=1 / 3)
    again = parse_table(format_table([entry]), "again.csv").entries[0]
    assert (again.ms, again.density) == (ms, 1 / 3)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "columns kind, kernel, stride, size, inputs, outputs, bits, ms missing"),
        ("kind,ms\nconv,1\n", "kernel, stride, size, inputs, outputs, bits missing"),
        (f"{HEADER}\n", "no measurements"),
        (f"{HEADER}\nconv,3x3,1x1,8x8,1,1,8,nan\n", "line 2: ms is 'nan'"),
        (f"{HEADER}\nconv,3x3,1x1,8x8,1,1,8,inf\n", "line 2: ms is 'inf'"),
        (f"{HEADER}\nconv,3x3,1x1,8x8,1,1,8,-0.1\n", "line 2: ms is -0.1"),
        (f"{HEADER}\nconv,3x3,1x1,8x8,1,1,8,1e9\n", "line 2: ms is 1e9"),
        (f"{HEADER}\nconv,3x3,1x1,8x8,1,1,8,0\n", "line 2: ms is 0"),
        (f"{HEADER}\nconv,3x3,1x1,8x8,1,1,65,1\n", "line 2: bits is '65'"),
        (f"{HEADER}\nconv,3x3,1x1,8x8,1,1,8,\n", "line 2: ms is ''"),
        (f"{HEADER}\nconv,3x3,1x1,8x8,0,1,8,1\n", "line 2: inputs is '0'"),
        (f"{HEADER}\nconv,3x3,1x1,8x8,1,{10**30},8,1\n", "line 2: outputs is"),
        (f"{HEADER}\nconv,3x3,1x1,8x8,1,1,8.5,1\n", "line 2: bits is '8.5'"),
        (f"{HEADER}\ncnv,3x3,1x1,8x8,1,1,8,1\n", "Unknown kind 'cnv'. Did you mean conv"),
        (f"{HEADER}\nconv,3x3,1,8x8,1,1,8,1\n", "kernel, stride and size of as many sides"),
        (f"{HEADER}\nconv,3xq,1x1,8x8,1,1,8,1\n", "kernel is 'q'"),
        (f"{HEADER}\nlinear,3x3,1x1,,1,1,8,1\n", "a linear layer has no kernel"),
        (f"{HEADER},density\nlinear,,,,1,1,8,1,0.5\n", "needs a scheme"),
        (f"{HEADER},scheme,density\nlinear,,,,1,1,8,1,2:4,1.5\n", "density is 1.5"),
        (f"{HEADER},form\nlinear,,,,1,1,8,1,int8\n", "Unknown form 'int8'"),
        (f"{HEADER}\nlinear,,,,1,1,8\n", "line 2: ms is ''"),
        ("\x00\x01binary", "missing"),
    ],
)
def test_bad_tables_name_the_line_and_the_cell(text, why):
    with pytest.raises(JpqError) as error:
        parse_table(text, "bad.csv")
    assert why in str(error.value)
    assert "bad.csv" in str(error.value)


def test_a_table_without_end_is_refused():
    with pytest.raises(JpqError, match="more than 100,000 lines"):
        parse_table(f"{HEADER}\n" + "linear,,,,1,1,8,1\n" * (MOST_ROWS + 1), "huge.csv")
