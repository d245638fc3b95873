"""Any gate on any structure with any width, in one loss: the grid comes from the tables.

A legal cell runs on the digits to its budget through the same pieces as everything else, a few optimiser steps long;
an illegal one is refused with the reason. All cells run in the slow suite; the fast one has each gate on channels and
on something else, each gate and each structure with bits fixed, learned and learned in steps, where it can, and each
width.
"""

from __future__ import annotations

import math
import random
import re
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from small_net import trained_small
from torch import Tensor, nn

import jpq
from jpq import config, session
from jpq.allocation import prepare
from jpq.export.verify import EXACT, difference
from jpq.methods import compatibility
from jpq.methods.gates import GATES
from jpq.methods.quantizers import WIDTHS, Fixed
from jpq.methods.structures import STRUCTURES
from jpq.methods.table import METHODS
from jpq.tasks.data import load
from jpq.tracing.trace import trace

STEPS, TUNE = 4, 1
DENSITY = 0.4
PLACES = [config.CHANNELS, *(named.example for named in STRUCTURES.values()), config.RULES]


class Cell(NamedTuple):
    gate: str
    structure: str
    width: str

    @property
    def method(self) -> str:
        return next(name for name, m in METHODS.items() if m.gate is GATES[self.gate])

    @property
    def target(self) -> str:
        """One that no bits meet without pruning, and no pruning without fewer bits where those are not fixed."""
        if self.width == "fixed":
            return "2.5%"
        return "1%" if GATES[self.gate].fixed_count else "0.4%"

    @property
    def refusal(self) -> str | None:
        return compatibility.incompatibility(GATES[self.gate], self.structure, WIDTHS[self.width])


CELLS = [Cell(*names) for names in product(GATES, PLACES, WIDTHS)]
LEGAL = [cell for cell in CELLS if not cell.refusal]


def traits(cell: Cell) -> set[tuple[str, str | bool]]:
    """What some fast cell must have."""
    channels, bits = cell.structure == config.CHANNELS, cell.width if cell.width in ("fixed", "learned") else "steps"
    return {(cell.gate, channels), (cell.gate, bits), (cell.structure, bits), ("width", cell.width)}


def cover(cells: list[Cell], seed: int = 0) -> list[Cell]:
    """Few cells that hold every trait that occurs in any: greedily, ties in a drawn order."""
    left, chosen = set().union(*map(traits, cells)), []
    order = random.Random(seed).sample(cells, len(cells))
    while left:
        best = max(order, key=lambda cell: len(traits(cell) & left))
        chosen.append(best)
        left -= traits(best)
    return sorted(chosen)


FAST = cover(LEGAL)
CASES = [pytest.param(cell, id="-".join(cell), marks=() if cell in FAST else pytest.mark.slow) for cell in LEGAL]


class Task(NamedTuple):
    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def task() -> Task:
    """A residual net of four layers, trained on some digits."""
    batches = list(load("digits", batch_size=32).train.epoch(0))
    return Task(trained_small(batches), batches)


@pytest.fixture(autouse=True, scope="module")
def traced_once(task: Task):
    """Every cell compresses the same model: it is traced once, which takes as long as a cell."""
    network = trace(task.model, (task.batches[0][0],))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "trace", lambda *_, **__: network)
        yield


def fit(net: session.CompressionSession, batches: list[tuple[Tensor, Tensor]], steps: int) -> list[float]:
    """The losses of some steps of training."""
    net.train()
    optimizer, losses = torch.optim.Adam(net.groups()), []
    for x, y in batches[:steps]:
        loss = F.cross_entropy(net(x), y) + net.pressure()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.step()
    return losses


def density(net: jpq.CompressedModel, plan: jpq.Plan) -> float:
    """The share that stays of the weights that gates decide about."""
    kept = every = 0.0
    for site in net.sites:
        shapes = [torch.Size(net.network.layer(tap.layer).weight_shape) for tap in site.taps]
        sizes = sum(tap.structure.sizes(shape) for tap, shape in zip(site.taps, shapes, strict=True))
        units = plan.masks[site.name].units() if site.is_mask else torch.tensor([plan.kept[site.name]])
        kept += float((sizes * units).sum())
        every += shapes[0].numel() if site.is_mask else float(sizes.sum())
    return kept / every


@pytest.mark.parametrize("cell", CASES)
def test_every_legal_cell_runs_to_its_budget(cell: Cell, task: Task) -> None:
    torch.manual_seed(0)
    x = task.batches[0][0]
    net = jpq.compress(
        task.model,
        x,
        cell.method,
        bops=cell.target,
        steps=STEPS,
        structure=cell.structure,
        width=cell.width,
        density=DENSITY,
    )
    limit = net.controller.targets[0].limit
    made = [w for w in net.net.widths() if not isinstance(w, Fixed)]
    assert all(type(w) is WIDTHS[cell.width] for w in made)
    assert bool(made) == (cell.width != "fixed")
    assert all(type(gate) is GATES[cell.gate] for gate in net.net.gates)
    assert all(map(math.isfinite, fit(net, task.batches, STEPS)))
    plan = net.discretize()
    assert all(map(math.isfinite, fit(net, task.batches, TUNE)))
    small = net.finalize()
    counted = jpq.measure(small, x)
    assert counted["bops"] <= limit
    assert counted["bops"] == jpq.costs.bops(net.net.exact_usage(plan))
    assert difference(net.net, small, x) < EXACT
    whole = all(all(units) for units in plan.kept.values()) and all(bool(m.units().all()) for m in plan.masks.values())
    assert not whole, "nothing was pruned"
    if GATES[cell.gate].fixed_count:
        asked = {"2:4": 1 / 2, "pattern": 4 / 9}.get(cell.structure, DENSITY)
        assert density(net.net, plan) == pytest.approx(asked, abs=0.1), "as much as was asked for"
    if cell.width == "fixed":
        assert {b for layer in plan.layers.values() for b in (layer.w_bits, layer.a_bits)} == {8}


def advised(cell: Cell, said: str) -> list[Cell]:
    """The cells that a refusal says to choose instead."""
    first, also, rest = said.partition("Choose ")[2].partition(" with ")
    base = cell._replace(width="learned") if first == "--width learned" else cell
    rows = {name: g for name, m in METHODS.items() for g, gate in GATES.items() if gate is m.gate}
    found = []
    for part in re.split(r", or (?=--)", rest if also else first):
        flag, _, names = part.partition(" ")
        for name in filter(None, (n.strip(".") for n in re.split(r", | or ", names))):
            found.append(base._replace(gate=rows[name]) if flag == "--method" else base._replace(**{flag[2:]: name}))
    return found


@pytest.mark.parametrize("gate", GATES)
def test_illegal_cells_are_refused_with_the_reason_and_a_way_out(gate: str, task: Task) -> None:
    for cell in CELLS:
        if cell.gate != gate or not cell.refusal:
            continue
        with pytest.raises(jpq.JpqError) as caught:
            jpq.compress(
                task.model, task.batches[0][0], cell.method, bops="1%", structure=cell.structure, width=cell.width
            )
        said = caught.value.command_line
        asked = f"--method {cell.method}, --structure {cell.structure}, --width {cell.width}: "
        assert said.removeprefix(asked) == cell.refusal
        assert len(said) < 400
        assert "\n" not in said
        instead = advised(cell, said)
        assert instead
        assert not any(other.refusal for other in instead)


def test_every_gate_is_within_reach_of_the_command_line() -> None:
    assert {m.gate for m in METHODS.values()} >= set(GATES.values())
    assert {len(set(at)) for at in zip(*FAST, strict=True)} == {len(GATES), len(PLACES), len(WIDTHS)}


@pytest.mark.parametrize("name", METHODS)
def test_named_methods_are_legal(name: str) -> None:
    assert compatibility.compose_method(name) == METHODS[name]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("djpq", "", "learnt"), "Unknown width 'learnt'. Did you mean learned"),
        (("djpq", "elementwize", ""), "Unknown structure 'elementwize'. Did you mean elementwise"),
        (("djqp", "", ""), "Unknown method 'djqp'. Did you mean djpq"),
        (("uniform", "2:4", ""), "method uniform prunes nothing. Choose method djpq"),
        (("uniform", "", "learned"), "method uniform does not search, so its bits are fixed. Choose method djpq"),
        (("upscale", "", "gated"), "method upscale does not search"),
        (("upscale", "elementwise", ""), "decides about whole channels"),
        (("djpq", "2:4", ""), "exactly 2 of each row must stay.* Choose method dpp, pdp, smart, dpf, admm, spp or"),
        (("dpf", "", "fixed"), "both given.*width learned"),
        (("codeq", "", "gated"), "grid of their own.*width fixed, learned, power-of-two or squashed"),
        (("codeq", "channels", ""), "single weights.*structure elementwise or per-output"),
        (("spp", "pattern", ""), "overlap.*method dpp, smart, dpf or admm"),
        (("dsp", "2:4", "fixed"), "Choose width learned with method dpp"),
    ],
)
def test_what_does_not_go_together(asked: tuple[str, str, str], says: str) -> None:
    with pytest.raises(jpq.JpqError, match=says):
        compatibility.compose_method(*asked)
