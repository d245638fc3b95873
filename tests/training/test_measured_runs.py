"""Runs that measure: the contest of plans on held-out samples, searches that start from a table, and resuming."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import kills
from support.kills import resumed

import jpq
from jpq import recipe
from jpq.allocation.decision_data import calibration_batches, calibration_inputs
from jpq.allocation.measured.calibration import calibration_samples
from jpq.allocation.measured.table import SensitivityTable, model_checksum, read_table, tensors_checksum, write_table
from jpq.allocation.prepare import Prepared, prepare
from jpq.config import Config
from jpq.costs.target import all_met
from jpq.files.tensors import save_tensors
from jpq.tasks.load import load_dense_model, read_data
from jpq.training import contest, resolve_bits
from jpq.training.contest import Entry, hold_contest
from jpq.training.history import EpochRecord, NullObserver
from jpq.training.job import Job
from jpq.types import JpqError

STEPS = 4  # of each plan of a contest


class Killed(BaseException):
    """Nothing in the library may catch it."""


class Watch(NullObserver):
    """Counts the steps of each phase, and raises after so many of one."""

    def __init__(self, phase: str = "", stop: int = 0) -> None:
        self.at, self.name = (phase, stop), ""
        self.planned: dict[str, int] = {}
        self.steps: dict[str, int] = {}

    def phase(self, name: str, epochs: int, steps: int) -> None:
        self.name, self.planned[name] = name, max(epochs, 1) * steps

    def step(self, loss: float, bops_share: float, limit_share: float) -> None:
        self.steps[self.name] = self.steps.get(self.name, 0) + 1
        if (self.name, self.steps[self.name]) == self.at:
            raise Killed

    def epoch(self, row: EpochRecord) -> None:
        pass


def asked(out: Path, bops: str = "0.8%", **decide: object) -> Config:
    tiny = kills.tiny_config(out)
    settings = {"w_bits": (2, 4), "a_bits": (2, 4), **decide}
    return replace(tiny, decide=replace(tiny.decide, **settings), budget=replace(tiny.budget, target_bops=bops))


@pytest.fixture(autouse=True)
def short_contests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "FEWEST_STEPS", STEPS)


def test_a_contest_trains_every_plan_from_the_same_weights_and_the_better_half_goes_on(tmp_path: Path) -> None:
    config = asked(tmp_path, method="measured")
    data = read_data(config, torch.device("cpu"))
    torch.manual_seed(0)
    model = load_dense_model(config, data, torch.device("cpu"), [])
    prepared = prepare(model, data.example, config.decide, config.budget)
    net = prepared.attach(model, calibration_batches(data))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    wide = net.plan()
    narrow = replace(wide, layers={n: replace(x, w_bits=2, a_bits=2) for n, x in wide.layers.items()})
    entries = [Entry("narrow", narrow, 1.0), Entry("wide", wide, 0.5), Entry("again", narrow, 1.0)]
    verdict = hold_contest(net, entries, model, data, config)
    steps = [outcome.steps for outcome in verdict.outcomes]
    assert sorted(steps) == [STEPS, 3 * STEPS, 3 * STEPS]
    assert steps[verdict.kept] == 3 * STEPS
    assert verdict.kept in verdict.tied
    first, others = verdict.outcomes[0].losses.tolist(), [o.losses.tolist() for o in verdict.outcomes[1:]]
    assert others[0] != first
    assert (others[1] == first) == (steps[2] == steps[0])  # the same plan, weights and batches
    assert all(len(o.losses) == data.held_out.size and math.isfinite(o.loss) for o in verdict.outcomes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    net.freeze(entries[verdict.kept].plan)
    net.load_state_dict(verdict.state)
    again = contest.sample_losses(net, data.held_out.first(contest.JUDGED), data.task)
    assert again.tolist() == verdict.outcomes[verdict.kept].losses.tolist()  # the weights of the judged network


@pytest.mark.parametrize(
    "decide",
    [{"method": "djpq", "search_contest": True}, pytest.param({"method": "measured"}, marks=pytest.mark.slow)],
)
def test_what_a_run_keeps_is_among_the_best_of_what_it_compared(decide: dict[str, object], tmp_path: Path) -> None:
    result = jpq.optimize(asked(tmp_path, **decide), final=False)
    rows = [row for row in result.contest["candidates"] if "held_out_loss" in row]
    kept = [row for row in rows if row["kept"]]
    assert {"uniform", "two-stage"} <= {row["name"] for row in rows}
    assert len(kept) == 1
    assert kept[0]["tied"]
    last = [row for row in rows if row["steps"] == 3 * STEPS]
    best = min(last, key=lambda row: row["held_out_loss"])
    assert best["tied"]
    assert kept[0] in last
    assert all(row["units"] < 1 for row in last if row["tied"]) or kept[0]["units"] == 1
    assert result.contest["steps"] == STEPS
    assert result.contest["all_steps"] == sum(row["steps"] for row in rows)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[dict[tuple[str, str], float]]:
    """The initial widths of every search that starts from a table."""
    found: list[dict[tuple[str, str], float]] = []
    begin = recipe.with_measured_start

    def noted(*args: Any) -> Prepared:
        prepared = begin(*args)
        found.append(dict(prepared.starts or {}))
        return prepared

    monkeypatch.setattr(recipe, "with_measured_start", noted)
    return found


def test_a_search_starts_from_the_table_and_resumes_to_the_same_bits(
    tmp_path: Path, starts: list[dict[tuple[str, str], float]]
) -> None:
    whole, stopped = asked(tmp_path / "whole", start="measured"), asked(tmp_path / "stopped", start="measured")
    watch = Watch()
    first = jpq.optimize(whole, watch, final=False)
    table = read_table(first.folder / "sensitivity.csv")
    assert set(starts[0]) == set(table.bits)
    assert len(set(starts[0].values())) > 1
    assert watch.steps["measure"] > 0
    with pytest.raises(Killed):
        jpq.optimize(stopped, Watch("fine-tune", 3), final=False)
    second = jpq.optimize(resumed(stopped), again := Watch(), final=False)
    assert "measure" not in again.steps  # the table was kept
    assert (second.folder / "plan.json").read_bytes() == (first.folder / "plan.json").read_bytes()
    assert starts[0] == starts[1] == starts[2]


def test_a_table_from_a_file_gives_the_same_start(tmp_path: Path, starts: list[dict[tuple[str, str], float]]) -> None:
    first = jpq.optimize(asked(tmp_path / "a", start="measured"), final=False)
    given = asked(tmp_path / "b", start="measured", sensitivity=first.folder / "sensitivity.csv")
    given = replace(given, task=replace(given.task, weights=first.folder / "float.safetensors"))
    jpq.optimize(given, watch := Watch(), final=False)
    assert "measure" not in watch.steps
    assert starts[0] == starts[1]
    other = replace(given, run=replace(given.run, seed=1, out=tmp_path / "c"))
    with pytest.raises(JpqError, match="measured on other samples"):
        jpq.optimize(other, final=False)


@pytest.mark.parametrize("decide", [{"method": "measured"}, {"start": "measured"}])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"calibration": "0" * 16}, "measured on other samples"),
        ({"model": "0" * 16}, "with other weights"),
        ({"task": "regression"}, "measured for the task 'regression'"),
        ({"base": {"weight_levels": "narrow"}}, "measured with weight_levels narrow"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_before_a_folder_is_made(
    decide: dict[str, object], changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    config = asked(tmp_path / "runs", sensitivity=tmp_path / "table.csv", **decide)
    torch.manual_seed(0)
    data = read_data(config, torch.device("cpu"))
    model = load_dense_model(config, data, torch.device("cpu"), [])
    save_tensors(model, tmp_path / "float.safetensors")
    mixed, _ = calibration_samples(calibration_inputs(data), 16)
    fitting = SensitivityTable({}, {}, {}, "single", model_checksum(model), tensors_checksum(mixed), 16)
    network = prepare(model, data.example, config.decide, config.budget).network
    write_table(tmp_path / "table.csv", replace(fitting, **changes), network)
    config = replace(config, task=replace(config.task, weights=tmp_path / "float.safetensors"))
    with pytest.raises(JpqError, match=says):
        jpq.optimize(config, final=False)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_measuring_goes_on_with_the_entries_that_it_had_found(tmp_path: Path) -> None:
    whole, stopped = asked(tmp_path / "whole", method="measured"), asked(tmp_path / "stopped", method="measured")
    first = jpq.optimize(whole, watch := Watch(), final=False)
    assert watch.steps["measure"] == watch.planned["measure"]
    with pytest.raises(Killed):
        jpq.optimize(stopped, Watch("measure", 5), final=False)
    notes = tmp_path / "stopped" / stopped.hash() / "sensitivity.csv.part"
    assert len(notes.read_text().splitlines()) == 1 + 5
    second = jpq.optimize(resumed(stopped), final=False)
    assert not notes.exists()
    for name in ("plan.json", "sensitivity.csv"):
        assert (second.folder / name).read_bytes() == (first.folder / name).read_bytes()
    assert second.contest["passes"] < first.contest["passes"]


@pytest.mark.parametrize(
    ("decide", "says"),
    [
        ({"start": "measurd"}, "Did you mean measured"),
        ({"start": "measured", "method": "uniform"}, "does not search for bits"),
        ({"start": "measured", "method": "measured"}, "does not search for bits"),
        ({"sensitivity": Path("table.csv")}, "a search with --start measured"),
        ({"start": "measured", "sensitivity": Path("nowhere.csv")}, "nowhere.csv"),
    ],
)
def test_starts_that_cannot_be(decide: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(JpqError) as caught:
        jpq.optimize(asked(tmp_path, **decide), final=False)
    assert says in caught.value.command_line


@pytest.mark.parametrize("decide", [{"method": "measured"}, {"start": "measured"}])
def test_a_file_that_is_no_table_is_refused_before_anything_is_trained(
    decide: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(JpqError, match="is no sensitivity table"):
        jpq.optimize(asked(tmp_path / "out", sensitivity=tmp_path / "other.csv", **decide), final=False)
    assert not list(tmp_path.glob("out/*"))


def again(out: Path, **decide: object) -> Config:
    """A run whose bits are solved for again after two of four epochs."""
    return asked(out, method="measured", contest=False, resolve_at=0.5, **decide)


def test_bits_are_solved_again_during_training_and_resumed_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    divergences = cycle([2.0, 1.0])  # before and after the moves: they are surely taken
    monkeypatch.setattr(resolve_bits, "joint_divergence", lambda probe, plan: next(divergences))
    monkeypatch.setattr(resolve_bits, "TIED", 1e9)
    first = jpq.optimize(whole := again(tmp_path / "whole"), final=False)
    notes = [note for note in first.notes if note.startswith("Bits were solved again after epoch 2 of 4")]
    assert len(notes) == 1
    assert " moved (" in notes[0]
    plain = jpq.optimize(replace(whole, decide=replace(whole.decide, resolve_at=0.0)), final=False)
    plans = [json.loads((result.folder / "plan.json").read_text())["layers"] for result in (plain, first)]
    assert plans[0] != plans[1]
    assert first.compressed.bops <= first.targets["bops"]["limit"]
    losses = [[row.loss for row in result.history] for result in (plain, first)]
    assert losses[0][:-2] == losses[1][:-2]  # nothing changes before
    assert losses[0][-2:] != losses[1][-2:]
    stopped = again(tmp_path / "stopped")
    for stop in (19, 10):  # fine-tune steps of nine an epoch: just after the moves, and in the last epoch
        with pytest.raises(Killed):
            jpq.optimize(stopped, Watch("fine-tune", stop), final=False)
        stopped = resumed(stopped)
    second = jpq.optimize(stopped, final=False)
    for name in ("plan.json", "model.safetensors"):
        assert (second.folder / name).read_bytes() == (first.folder / name).read_bytes()
    assert notes[0] in second.notes
    assert second.contest["candidates"] == first.contest["candidates"] != []


def test_moves_that_held_out_samples_refuse_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    divergences = cycle([2.0, 1.0])
    monkeypatch.setattr(resolve_bits, "joint_divergence", lambda probe, plan: next(divergences))
    monkeypatch.setattr(resolve_bits, "is_no_worse", lambda differences: False)
    first = jpq.optimize(refused := again(tmp_path / "a"), final=False)
    assert sum("Bits were solved again" in note and ", and stay." in note for note in first.notes) == 1
    plain = jpq.optimize(replace(refused, decide=replace(refused.decide, resolve_at=0.0)), final=False)
    for name in ("plan.json", "model.safetensors"):
        assert (plain.folder / name).read_bytes() == (first.folder / name).read_bytes()


@pytest.mark.parametrize(
    ("decide", "says"),
    [
        ({"resolve_at": 1.0}, "--resolve-at 1.0 must lie from 0 to below 1"),
        ({"resolve_at": -0.1}, "--resolve-at -0.1"),
        ({"resolve_at": 0.3, "method": "uniform"}, "--method uniform does not choose bits one by one"),
        ({"resolve_at": 0.3, "open_norms": True}, "--open-norms"),
    ],
)
def test_bits_that_cannot_be_solved_again(decide: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(JpqError) as caught:
        jpq.optimize(asked(tmp_path, **decide), final=False)
    assert says in caught.value.command_line


@pytest.mark.parametrize(
    ("differences", "no_worse"),
    [
        *(([0.0, 0.0], True), ([1.0, 1.0, 1.0], False), ([1.0, -1.0, 0.5], True), ([math.inf, 0.0], False)),
        *(([-1.0], True), ([0.2, 1.0], True), ([0.4, 1.0], False)),  # one sample; 1.5 and 2.3 standard errors
    ],
)
def test_a_loss_is_no_worse_within_its_noise(differences: list[float], no_worse: bool) -> None:
    assert resolve_bits.is_no_worse(np.array(differences)) == no_worse


@pytest.mark.parametrize(
    ("share", "epochs", "expected"),
    [(0.5, 4, [2]), (0.9, 4, [3]), (0.99, 2, [1]), (0.01, 40, [1]), (0.3, 10, [3]), (0.5, 1, [])],
)
def test_bits_are_solved_again_with_training_before_and_after(
    share: float, epochs: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Solved(Exception):
        pass

    def solve(*_: object) -> None:
        raise Solved

    monkeypatch.setattr(resolve_bits, "solve_bits_again", solve)
    config = Config(decide=replace(Config().decide, resolve_at=share))
    run: Any = SimpleNamespace(is_past=lambda phase: False, saved=None, notes=[], timed=lambda name, work: work())
    nothing: Any = None
    resolver = resolve_bits.BitsResolver(nothing, nothing, Job(nothing, nothing, (), config, run), epochs)
    found = []
    for epoch in range(epochs):
        try:
            resolver(epoch)
        except Solved:
            found.append(epoch)
    assert found == expected
    assert ["needs two epochs" in note for note in run.notes] == [True] * (not expected)


class Small(torch.nn.Module):
    """Two convolutions and a classifier on images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1)
        self.fc = torch.nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.b(self.a(x).relu()).relu().mean((2, 3)))
        return out


def starting_widths(session: jpq.CompressionSession) -> dict[tuple[str, str], float]:
    """The real-valued width of every tensor."""
    pairs = {layer.name: session.net.quantizers(layer.name) for layer in session.net.network.layers}
    return {
        (name, side): q.width.soft() for name, pair in pairs.items() if pair for side, q in zip("wa", pair, strict=True)
    }


def test_a_session_starts_from_a_table_and_is_discretized_by_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Small(), torch.randn(64, 1, 8, 8)
    settings: dict[str, Any] = {"bops": "1.5%", "steps": 2, "w_bits": (2, 5), "a_bits": (2, 5)}
    evidence = [(x[:32], None), (x[32:], None)]
    uniform = jpq.compress(model, x, "djpq", evidence=evidence, **settings)
    session = jpq.compress(model, x, "djpq", start="measured", evidence=evidence, **settings)
    widths = starting_widths(session)
    assert len(set(starting_widths(uniform).values())) < len(set(widths.values()))
    assert session.sensitivities is not None
    assert uniform.sensitivities is None
    kept = tmp_path / "table.csv"
    write_table(kept, session.sensitivities, session.net.network)
    given = jpq.compress(model, x, "djpq", start="measured", sensitivity=kept, evidence=evidence, **settings)
    assert starting_widths(given) == widths
    torch.nn.functional.cross_entropy(session.train()(x), torch.arange(64) % 10).backward()
    session.pressure().backward()
    plan = session.discretize()
    assert all_met(session.targets, session.net.exact_usage(plan))
    with pytest.raises(JpqError, match="does not search for bits"):
        jpq.compress(model, x, "uniform", start="measured", **settings)
