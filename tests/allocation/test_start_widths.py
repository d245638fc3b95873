"""The widths that a search starts from, of a table that is made up: what they cost, and what they may be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_net import Small

from jpq import costs
from jpq.allocation.measured.candidates import AllowedWidths
from jpq.allocation.measured.start import start_widths
from jpq.allocation.measured.table import Key, SensitivityTable
from jpq.allocation.prepare import prepare
from jpq.allocation.uniform_bits import HEADROOM
from jpq.compression.model import CompressedModel
from jpq.config import Budget, Decide
from jpq.costs.target import Target
from jpq.plan import Plan

BITS = tuple(range(2, 9))
ANY = AllowedWidths(BITS, BITS, {})


@pytest.fixture(scope="module")
def net() -> CompressedModel:
    torch.manual_seed(0)
    model, x = Small().eval(), torch.randn(8, 1, 8, 8)
    return prepare(model, x, Decide(method="measured"), Budget(target_bops="50%")).attach(model, [x])


@pytest.fixture(scope="module")
def table(net: CompressedModel) -> SensitivityTable:
    """Each tensor loses a quarter as much with every bit, and units are worth nothing."""
    image = {layer.name for layer in net.network.layers if layer.reads_input}
    keys: list[Key] = [(name, "w") for name in net.plan().layers]
    keys += [(name, "a") for name in net.plan().layers if name not in image]
    bits = {key: {b: (1 + i) * 4.0**-b for b in BITS} for i, key in enumerate(keys)}
    units = {site.name: {1: 0.0, site.n: 0.0} for site in net.sites}
    return SensitivityTable(bits, units, {s.name: tuple(range(s.n)) for s in net.sites}, "single", "", "", 8)


def at_widths(net: CompressedModel, widths: dict[Key, int]) -> Plan:
    layers = {
        name: replace(x, w_bits=widths[name, "w"], a_bits=widths.get((name, "a"), x.a_bits))
        for name, x in net.plan().layers.items()
    }
    return replace(net.plan(), layers=layers)


def cost_of(net: CompressedModel, widths: dict[Key, int], cost: str = "bops") -> float:
    return float(costs.COSTS[cost](net.exact_usage(at_widths(net, widths))))


def bops_at(net: CompressedModel, bits: float) -> Target:
    """A budget of the bit-operations between those of two uniform widths."""
    low, high = (cost_of(net, dict.fromkeys(_tensors(net), int(bits) + step)) for step in (0, 1))
    return Target("bops", "", round(low + (bits - int(bits)) * (high - low)))


def _tensors(net: CompressedModel) -> list[Key]:
    return [(name, side) for name in net.plan().layers for side in ("w", "a")]  # type: ignore[misc]


@pytest.mark.parametrize("headroom", [1.0, HEADROOM, 2.0])
def test_widths_spend_the_headroom_times_the_target_to_the_last_bit(
    headroom: float, net: CompressedModel, table: SensitivityTable
) -> None:
    target = bops_at(net, 4.0)
    limit = math.ceil(headroom * target.limit)
    found = start_widths(net, table, (target,), ANY, {}, headroom)
    assert cost_of(net, found) <= limit
    wider = [{**found, key: bits + 1} for key, bits in found.items() if bits < BITS[-1]]
    assert wider
    assert all(cost_of(net, widths) > limit for widths in wider)  # each bit more would lower the divergence


def test_widths_begin_above_the_target_so_that_the_search_has_something_to_give_up(
    net: CompressedModel, table: SensitivityTable
) -> None:
    target = bops_at(net, 3.5)
    assert target.limit < cost_of(net, start_widths(net, table, (target,), ANY, {}))


def test_what_a_mask_of_fixed_density_takes_away_is_left_for_bits(
    net: CompressedModel, table: SensitivityTable
) -> None:
    target, twice = (Target("bops", "", factor * bops_at(net, 3.0).limit) for factor in (1, 2))
    half = start_widths(net, table, (target,), ANY, {"bops": 0.5})
    assert half == start_widths(net, table, (twice,), ANY, {})
    assert half != start_widths(net, table, (target,), ANY, {"size": 0.5})


def test_costs_that_bits_do_not_change_ask_for_nothing(net: CompressedModel, table: SensitivityTable) -> None:
    bops = bops_at(net, 4.0)
    few = Target("macs", "", 1)  # units alone can meet it, and all of them are open at the start
    assert start_widths(net, table, (few, bops), ANY, {}) == start_widths(net, table, (bops,), ANY, {}) != {}
    for cost in ("macs", "latency"):
        assert start_widths(net, table, (Target(cost, "", 1),), ANY, {}) == {}


def test_no_bits_are_named_where_none_meet_the_target_with_all_units(
    net: CompressedModel, table: SensitivityTable
) -> None:
    least = Target("bops", "", round(cost_of(net, dict.fromkeys(_tensors(net), 2)) / 2))
    assert start_widths(net, table, (least,), ANY, {}) == {}


def test_widths_are_allowed_ones_and_pins_hold(net: CompressedModel, table: SensitivityTable) -> None:
    few = AllowedWidths((2, 4, 8), (4, 8), {("a", "w"): 8, ("b", "a"): 2})
    found = start_widths(net, table, (bops_at(net, 5.0),), few, {})
    assert set(found) == set(table.bits)
    assert all(bits in few.of(key) for key, bits in found.items())
