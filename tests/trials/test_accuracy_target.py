"""The ladder of an accuracy target: which budgets it tries, what it keeps, and its bad input."""

import csv
import io
import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from small_net import Small

import jpq
from jpq import costs
from jpq.allocation.measured.table import SensitivityTable, write_table
from jpq.allocation.prepare import prepare
from jpq.cli.accuracy_target import LadderScreen, attempts_table
from jpq.cli.main import main
from jpq.config import Budget, Config, Decide, Run, Task, Train
from jpq.costs.latency_table import Entry, LatencyTable
from jpq.costs.target import Target
from jpq.files.tensors import save_tensors
from jpq.results import run_folder
from jpq.results.accuracy_limit import AccuracyLimit, drop_interval, read_limit
from jpq.tasks import CLASSIFICATION
from jpq.tasks.load import load_dense_model, read_data
from jpq.tasks.regression import Regression
from jpq.tasks.restoration import Restoration
from jpq.tasks.segmentation import Segmentation
from jpq.tracing.network import latency_shape
from jpq.tracing.trace import trace
from jpq.trials.accuracy_target import (
    CLOSE,
    AccuracyResult,
    Attempt,
    NullAccuracyTargetObserver,
    _Ladder,
    begin_folder,
    budget_range,
    next_share,
)


def attempt(share, within):
    return Attempt(1, f"{100 * share:.4g}%", share, 1.0, 0.9, 0.0, math.nan, math.nan, within, 1.0, "a")


def climb(threshold, low, high, runs):
    """The attempts of a ladder where every budget from a threshold on keeps the accuracy."""
    attempts = []
    while len(attempts) < runs:
        share = next_share(attempts, low, high, runs - len(attempts), first=4)
        if share is None:
            break
        attempts.append(attempt(share, share >= threshold))
    return attempts


@settings(max_examples=200, deadline=None)
@given(st.floats(0.003, 0.0625), st.floats(0.0001, 0.003), st.integers(4, 12))
def test_a_ladder_finds_the_threshold_and_never_leaves_its_range(threshold, low, runs):
    attempts = climb(threshold, low, 0.0625, runs)
    kept, missed = ([a.share for a in attempts if a.within is side] for side in (True, False))
    assert min(a.share for a in attempts) >= low * 0.999
    assert max(a.share for a in attempts) <= 0.0625 * 1.0001
    assert kept, "the largest budget keeps it"
    assert len({a.budget for a in attempts}) == len(attempts)
    if runs >= 12:
        assert min(kept) <= CLOSE * max([*missed, low]) * 1.001
    elif missed:
        assert min(kept) <= 4.001 * max(missed)


@pytest.mark.parametrize(
    ("tried", "left", "share"),
    [
        ([], 8, 0.015),  # the largest over `first`
        ([(0.015, True)], 7, 0.0075),  # half of the last
        ([(0.015, True), (0.0075, True)], 6, 0.00375),
        ([(0.015, True), (0.0075, False)], 6, math.sqrt(0.015 * 0.0075)),  # the geometric mean
        ([(0.015, False), (0.03, True), (0.021, False)], 5, math.sqrt(0.021 * 0.03)),  # of the two that are nearest
        ([(0.015, True), (0.0075, False), (0.03, False)], 5, math.sqrt(0.015 * 0.0075)),  # one missed by chance above
        ([(0.015, False)], 7, math.sqrt(0.015 * 0.06)),
        ([(0.015, False)], 1, 0.06),  # the last run is of the largest
        ([(0.015, False), (0.03, False)], 6, 0.06),
        ([(0.015, False), (0.03, False), (0.06, False)], 5, None),
        ([(0.0015, True)], 7, 0.001),  # never below the least
        ([(0.00104, True)], 7, None),
        ([(0.015, True), (0.0144, False)], 6, None),  # close enough
    ],
)
def test_the_next_budget_is_as_the_ladder_says(tried, left, share):
    found = next_share([attempt(*run) for run in tried], 0.001, 0.06, left, first=4)
    assert found == (None if share is None else pytest.approx(share, rel=1e-3))


def test_a_ladder_ends_where_the_largest_budget_misses():
    attempts = climb(1.0, 0.001, 0.0625, 8)
    assert [a.within for a in attempts] == [False] * len(attempts)
    assert attempts[-1].share == pytest.approx(0.0625)
    assert len(attempts) == 3


def test_overwriting_a_ladder_spares_the_files_that_it_reads(tmp_path):
    config = Config(
        budget=Budget(max_drop="1%", latency_table=tmp_path / "a" / "latency.csv"),
        decide=Decide(method="measured", sensitivity=tmp_path / "a" / "sensitivity.csv"),
        run=Run(out=tmp_path, name="a", overwrite=True),
    )
    config.folder().mkdir()
    for name in ("config.toml", "sensitivity.csv", "latency.csv", "ladder.csv", "pareto.png"):
        (config.folder() / name).write_text("x", encoding="utf-8")
    begin_folder(config)
    assert {p.name for p in config.folder().iterdir()} == {"config.toml", "sensitivity.csv", "latency.csv"}


def test_a_ladder_ends_at_the_least_budget_where_all_keep():
    attempts = climb(0.0, 0.01, 0.0625, 20)
    assert all(a.within for a in attempts)
    assert attempts[-1].share == pytest.approx(0.01, rel=CLOSE - 1)


def test_limits_are_in_the_unit_of_the_metric():
    assert read_limit(Budget(max_drop="1%"), CLASSIFICATION).least(0.95) == pytest.approx(0.94)
    assert read_limit(Budget(min_metric="91%"), CLASSIFICATION).least(0.95) == pytest.approx(0.91)
    decibels = Restoration()
    assert decibels.metric_unit == "dB"
    assert read_limit(Budget(max_drop="0.2"), decibels).least(30.0) == pytest.approx(29.8)
    assert read_limit(Budget(max_drop="1%"), decibels).least(30.0) == pytest.approx(29.7)
    assert read_limit(Budget(min_metric="29"), decibels).least(30.0) == pytest.approx(29.0)


def test_a_drop_to_what_guessing_reaches_is_refused():
    limit = read_limit(Budget(max_drop="85%"), CLASSIFICATION)
    assert limit.least(0.96, chance=0.1) == pytest.approx(0.11)
    with pytest.raises(jpq.JpqError, match=r"allows a model that knows nothing: .* of 95.00 %, guessing has 10.00 %"):
        limit.least(0.95, chance=0.1)


class Degrees(Restoration):
    """A metric in K that is better where it is lower."""

    metric_name, metric_unit, higher_is_better = "MAE", "K", False


@pytest.mark.parametrize(
    ("drop", "task", "full", "least"),
    [
        ("0.2dB", Restoration(), 30.0, 29.8),
        ("0.2 dB", Restoration(), 30.0, 29.8),
        ("0.1K", Degrees(), -0.5, -0.6),
        ("10%", Degrees(), -0.5, -0.55),
        ("150%", Degrees(), -0.5, -1.25),
        ("0.05", Regression(), 0.9, 0.85),
    ],
)
def test_a_drop_may_have_its_unit_and_an_error_may_more_than_double(drop, task, full, least):
    assert read_limit(Budget(max_drop=drop), task).least(full) == pytest.approx(least)


@pytest.mark.parametrize(
    ("drop", "task", "example"),
    [
        ("0.2K", Restoration(), "PSNR. Write it like 0.2dB, or 1% of the float model's."),
        ("much", Regression(), "R². Write it like 0.2, or 1% of the float model's."),
        ("0.01", Segmentation(), "mIoU. Write it like 1%, one point of mIoU."),
    ],
)
def test_a_drop_of_another_form_is_refused_with_one_in_the_unit(drop, task, example):
    with pytest.raises(jpq.JpqError) as error:
        read_limit(Budget(max_drop=drop), task)
    assert str(error.value).endswith(f" is not a drop of {example}")


def test_a_limit_that_the_float_model_misses_says_in_which_direction_to_mend_it():
    for task, text, word in ((Restoration(), "31", "lower"), (Degrees(), "0.1", "higher")):
        with pytest.raises(jpq.JpqError, match=f"Ask for a {word} one, or train it longer"):
            read_limit(Budget(min_metric=text), task).least(task.score(30.0))


@pytest.mark.parametrize(
    ("task", "line"),
    [
        (Degrees(), "run 1 held-out MAE 0.6 K, 0.1 K above the float model: too far above"),
        (Restoration(), "run 1 held-out PSNR -0.6 dB, 0.1 dB below the float model: too far below"),
    ],
)
def test_a_worse_metric_lies_above_the_float_model_s_where_lower_is_better(task, line):
    text = io.StringIO()
    limit = AccuracyLimit("--max-drop 0.05", task, 0.05, is_drop=True)
    missed = Attempt(1, "1%", 0.01, 1.0, -0.6, 0.1, math.nan, math.nan, False, 1.0, "a")
    console = Console(file=text, width=120)
    LadderScreen(console, {}).end_run(missed, limit)
    assert " ".join(text.getvalue().split()) == line


def test_the_table_of_runs_has_a_column_of_intervals_only_where_there_are_some():
    for task, low, high in ((Restoration(), math.nan, math.nan), (CLASSIFICATION, 0.01, 0.03)):
        limit = AccuracyLimit("--max-drop 5%", task, 0.05, is_drop=True)
        run = Attempt(1, "1%", 0.01, 1e6, 0.9, 0.02, low, high, True, 1.0, "bops-1pct")
        result = AccuracyResult(None, run, (run,), limit, 0.85, 0.92, 100, "bops", Path(), 0.01)
        console = Console(file=io.StringIO(), width=200, record=True)
        console.print(attempts_table(result))
        lines = console.export_text().splitlines()
        assert any("95 %" in line for line in lines) is math.isfinite(low)
        assert lines[-2].split()[-1] == "bops-1pct"


@pytest.mark.parametrize(
    ("least", "within", "told"), [(0.001, True, True), (0.00499, True, False), (0.001, False, False)]
)
def test_a_search_whose_runs_all_kept_the_limit_says_that_less_may_do(least, within, told):
    limit = AccuracyLimit("--max-drop 5%", CLASSIFICATION, 0.05, is_drop=True)
    runs = [
        Attempt(number, budget, share, 1e6, 0.9, 0.02, 0.01, 0.03, kept, 1.0, budget)
        for number, (budget, share, kept) in enumerate([("1%", 0.0099, True), ("0.5%", 0.0049, within)], 1)
    ]
    chosen = runs[1] if within else runs[0]
    result = AccuracyResult(None, chosen, tuple(runs), limit, 0.85, 0.92, 100, "bops", Path(), least)
    note = "All runs kept the limit, and below 0.49 % nothing was tried: a larger --most-runs looks there."
    assert (note in result.notes) is told


@pytest.mark.parametrize("drop", ["0%", "-1%", "100%", "250%", "1", "much", "nan%", "inf%", ""])
def test_drops_that_make_no_sense(drop):
    if not drop:
        with pytest.raises(jpq.JpqError, match="needs a limit"):
            jpq.find_cheapest(Config(budget=Budget(target_bops="1%", max_drop=drop)))
        return
    with pytest.raises(jpq.JpqError):
        read_limit(Budget(max_drop=drop), CLASSIFICATION)


def test_the_interval_of_a_drop_holds_it():
    low, high = drop_interval(CLASSIFICATION, 0.95, 0.93, 500)
    assert low < 0.02 < high
    assert drop_interval(Restoration(), 30.0, 29.0, 500) is None


@pytest.mark.parametrize("command", ["optimize", "study --name s"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--max-drop 0K", "--max-drop 0K allows no difference at all"),
        (
            "--max-drop some",
            "--max-drop some is no drop: it does not begin with a number. Write it like 1%, or 0.2dB in",
        ),
        ("--min-metric good", "--min-metric good is no metric: it does not begin with a number. Write it like 91%, or"),
        ("--max-drop 1K --task restoration", "--max-drop 1K is not a drop of PSNR. Write it like 0.2dB"),
        ("--min-metric 29dB --task regression", "'29dB' is not a number of R². Write it like 0.5"),
    ],
)
def test_limits_that_flags_alone_show_to_be_wrong_are_refused_before_data_are_read(
    flags, words, command, tmp_path, capsys
):
    assert main([*command.split(), "--out", str(tmp_path), "--data", "folder:gone", *flags.split()]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_files_of_an_accuracy_target_are_read_before_the_data(tmp_path, capsys):
    flags = ["--max-drop", "1%", "--data", "folder:gone", "--out", str(tmp_path)]
    assert main(["optimize", *flags, "--latency-table", "no.csv"]) == 2
    assert "no.csv" in capsys.readouterr().err
    assert main(["optimize", *flags, "--allocator", "greedi"]) == 2
    assert "Did you mean greedy" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--max-drop 0%", "--max-drop 0% allows no difference"),
        ("--max-drop 100%", "knows nothing"),
        ("--max-drop 1% --min-accuracy 91%", "both say"),
        ("--max-drop 0.2dB --min-metric 29dB", "--max-drop 0.2dB and --min-metric 29dB both say how good"),
        ("--max-drop 1% --target-bops 1%", "Leave one of them out"),
        ("--max-drop 1% --bits 4/4", "leave out --bits"),
        ("--min-accuracy 91% --minimize latency", "jpq bench --table"),
        ("--min-accuracy 91% --minimize energy", "cost to --minimize"),
        ("--max-drop 1% --most-runs 1", "at least 2"),
        ("--min-metric 291%", "Write it like 91%"),
    ],
)
def test_bad_flags_end_in_one_sentence(flags, words, tmp_path, capsys):
    assert main(["optimize", "--out", str(tmp_path), *flags.split()]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("error: ")
    assert words in error
    assert list(tmp_path.iterdir()) == []


def test_a_single_run_does_not_take_an_accuracy_target(tmp_path):
    with pytest.raises(jpq.JpqError, match="find_cheapest"):
        jpq.optimize(Config(budget=Budget(max_drop="1%"), run=Run(out=tmp_path)))


def target(tmp_path, **budget):
    return Config(
        task=Task(limit=400),
        budget=Budget(most_runs=3, **budget),
        decide=Decide(method="uniform"),
        train=Train(effort="minutes", float_epochs=5, reconstruction_steps=10, reconstruction_samples=64),
        run=Run(out=tmp_path, name="a"),
    )


@pytest.mark.parametrize("refused", ["table", "metric", "method"])
def test_what_is_known_without_training_is_refused_before_a_folder_is_made(refused, tmp_path):
    config = target(tmp_path / "runs", **({"min_metric": "99.9%"} if refused == "metric" else {"max_drop": "5%"}))
    data = read_data(config, torch.device("cpu"))
    torch.manual_seed(0)
    model = load_dense_model(config, data, torch.device("cpu"))
    save_tensors(model, tmp_path / "float.safetensors")
    decide, says = config.decide, "the float model itself has a held-out accuracy"
    if refused == "method":
        decide, says = replace(decide, keep_float=("nowhere",)), "Unknown layer in --keep-float"
    if refused == "table":
        table = SensitivityTable({}, {}, {}, "single", "0" * 16, "0" * 16, 16)
        write_table(tmp_path / "table.csv", table, trace(model, data.example))
        decide, says = replace(decide, method="measured", sensitivity=tmp_path / "table.csv"), "with other weights"
    task = replace(config.task, weights=tmp_path / "float.safetensors")
    with pytest.raises(jpq.JpqError) as caught:
        jpq.find_cheapest(replace(config, task=task, decide=decide))
    assert says in caught.value.command_line
    assert not (tmp_path / "runs").exists()


class StoppedInSearch(NullAccuracyTargetObserver):
    """Ctrl-C after the first epoch of the search."""

    def epoch(self, row):
        if row.phase == "search":
            raise KeyboardInterrupt


@pytest.mark.parametrize("moved", [False, True])
def test_an_interrupted_ladder_goes_on_from_another_working_folder_and_where_it_was_moved_to(
    moved, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = Config(
        task=Task(limit=300),
        budget=Budget(max_drop="60%", most_runs=2),
        train=Train(epochs=4, float_epochs=20),
        run=Run(out=Path("runs"), name="a"),
    )
    with pytest.raises(KeyboardInterrupt):
        jpq.find_cheapest(config, StoppedInSearch())
    assert list(tmp_path.glob("runs/a/*/checkpoint.pt"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = tmp_path / "runs"
    if moved:
        out = out.rename(tmp_path / "moved")
    result = jpq.find_cheapest(replace(config, run=replace(config.run, out=out, resume=True)))
    assert (len(result.attempts), result.folder) == (2, out / "a")
    searched = [row for row in result.chosen.history if row.phase == "search"]
    assert len(searched) == 2
    for run in result.attempts:
        assert run.drop == result.float_score - run.held_out
        assert run.within == (run.held_out >= result.least)
    data = read_data(config, torch.device("cpu"))
    small, _ = jpq.load(result.chosen.folder)
    assert result.attempt.held_out == pytest.approx(CLASSIFICATION.evaluate(small, data.held_out), abs=0.051)
    with (out / "a" / "front.csv").open() as file:
        rows = {row["folder"]: row["accuracy"] for row in csv.DictReader(file)}
    assert [name for name, accuracy in rows.items() if accuracy] == [result.attempt.folder]


def test_layers_that_are_slower_when_quantized_are_told_before_the_first_run(tmp_path):
    model, example = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), torch.zeros(2, 1, 8, 8)
    shape = latency_shape(trace(model, example).layers[0])
    ms = {8: 0.2, 32: 0.1}
    sizes = itertools.product((1, 64), (1, 10), (8, 32))
    table = LatencyTable("made", tuple(Entry(shape, i, o, bits, ms[bits]) for i, o, bits in sizes))
    decide = Decide(method="uniform")
    prepared = prepare(model, example, decide, Budget(), table=table)
    net = prepared.attach(model, [example])
    with pytest.raises(jpq.JpqError, match=r"minimize latency finds no .* target_latency='100%'"):
        budget_range(prepared, net, "latency")
    full, (low, high) = budget_range(prepared, net, "bops")
    assert (full, high) == (64 * 10 * 32 * 32, 0.0625)
    assert low < high


@pytest.mark.parametrize(("w_bits", "a_bits"), [((2, 8), (2, 8)), ((2, 4), (3, 6))])
def test_the_range_of_budgets_is_that_of_the_widest_bits_and_of_the_least_that_can_be_met(w_bits, a_bits):
    torch.manual_seed(0)
    model, x = Small().eval(), torch.zeros(2, 1, 8, 8)
    decide = Decide(method="uniform", w_bits=w_bits, a_bits=a_bits)
    prepared = prepare(model, x, decide, Budget())
    net = prepared.attach(model, [x])
    full, (low, high) = budget_range(prepared, net, "bops")
    widest = sum(u.macs * w_bits[1] * (8 if u.name == "stem" else a_bits[1]) for u in net.exact_usage())
    assert full == 1024 * sum(u.macs for u in net.exact_usage())
    assert high == pytest.approx(widest / full, abs=1.001e-5)
    assert high * full >= widest

    def can_be_met(share):
        try:
            prepared.procedure.check_feasible(net, (Target("bops", "", math.floor(full * share)),), decide)
        except jpq.JpqError:
            return False
        return True

    assert can_be_met(low)
    assert not can_be_met(low / 1.02)  # which is 1 % above the least


@pytest.mark.parametrize("cost", ["bops", "size"])
def test_the_largest_budget_is_one_that_its_text_says_so_that_the_ladder_ends_with_it(cost):
    torch.manual_seed(0)
    model, x = Small().eval(), torch.zeros(2, 1, 8, 8)
    prepared = prepare(model, x, Decide(method="uniform"), Budget())
    net = prepared.attach(model, [x])
    full, (low, high) = budget_range(prepared, net, cost)
    assert float(f"{100 * high:.4g}") / 100 == high
    assert high * full >= costs.COSTS[cost](net.exact_usage())
    missed = climb(2.0, low, high, 8)
    assert [a.share for a in missed] == sorted({a.share for a in missed})


class Scripted(_Ladder):
    """A ladder whose runs are written down: (budget, cost, held-out score) of each."""

    def __init__(self, folder, least, runs):
        self.folder, self.least, self.script = folder, least, runs
        self.limit = AccuracyLimit("--max-drop 5%", CLASSIFICATION, 0.05, is_drop=True)
        self.config = Config(budget=Budget(max_drop="5%", most_runs=len(runs)))
        self.data, self.observer = read_data(Config(task=Task(limit=40)), torch.device("cpu")), StoppedInSearch()
        self.cost, self.float_score, self.range = "bops", 0.95, (0.001, 0.06)

    def next_share(self, attempts):
        return self.script[len(attempts)][0]

    def run(self, number, share):
        _, cost, score = self.script[number - 1]
        return replace(attempt(cost, score >= self.least), budget=f"{100 * share}%", held_out=score, folder=str(number))

    def write_fronts(self, attempts):
        pass


def test_of_the_runs_that_kept_the_limit_the_cheapest_is_chosen_and_of_none_the_best_is_told(tmp_path, monkeypatch):
    runs = [(0.02, 0.0199, 0.94), (0.01, 0.0099, 0.92), (0.005, 0.0049, 0.8), (0.011, 0.0099, 0.93)]
    monkeypatch.setattr(run_folder, "read_run", lambda folder: SimpleNamespace(final=True, folder=folder))
    result = Scripted(tmp_path, 0.9, runs).climb()
    assert result.attempt.folder == "4"  # of two that cost the same the better one
    assert result.chosen.folder == tmp_path / "4"
    with (tmp_path / "ladder.csv").open() as file:
        assert [float(row["held_out"]) for row in csv.DictReader(file)] == [score for _, _, score in runs]
    with pytest.raises(jpq.JpqError, match=r"The best of 4 has a held-out accuracy of 94\S* % at 1.99 % of the fp32"):
        Scripted(tmp_path, 0.945, runs).climb()


@pytest.mark.slow
def test_the_chosen_model_alone_reads_the_test_split_and_a_ladder_goes_on(tmp_path):
    config = target(tmp_path, max_drop="30%")
    result = jpq.find_cheapest(config)
    assert result.attempt.within
    assert result.attempt.share == min(a.share for a in result.attempts if a.within)
    assert result.chosen.final
    assert result.chosen.folder == tmp_path / "a" / result.attempt.folder
    with (tmp_path / "a" / "front.csv").open() as file:
        rows = {row["folder"]: row for row in csv.DictReader(file)}
    assert [name for name, row in rows.items() if row["accuracy"]] == [result.attempt.folder]
    with (tmp_path / "a" / "ladder.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(result.attempts)
    with pytest.raises(jpq.JpqError, match="resume"):
        jpq.find_cheapest(config)
    last = tmp_path / "a" / result.attempts[-1].folder
    (last / "result.json").unlink()
    (last / "plan.json").unlink()
    again = jpq.find_cheapest(replace(config, run=replace(config.run, resume=True)))
    assert [a.held_out for a in again.attempts] == [a.held_out for a in result.attempts]
    assert again.chosen.compressed.accuracy == result.chosen.compressed.accuracy


@pytest.mark.slow
def test_what_no_budget_keeps_is_said(tmp_path):
    with pytest.raises(jpq.JpqError, match=r"float model itself.*trained is kept, for weights: .*a/float\.safetensors"):
        jpq.find_cheapest(target(tmp_path, min_metric="99.9%"))
