"""The cheapest model within an accuracy: several runs of `optimize` on a ladder of budgets (`--max-drop`).

Budgets lie between the least that the method can reach and the whole model at its widest bits. The first is a fraction
of the largest (`FIRST`), as of uniform 4 bits. While runs keep the accuracy, each next budget is half of the last; once
one has missed it, the next is the geometric mean of the largest budget that missed and the smallest that kept. Where
two runs have missed it and none has kept it, the largest budget follows, and where that misses it too, none keeps it.
The search ends after `Budget.most_runs` runs, or once the two budgets are closer than `CLOSE`.

Each run is judged on held-out data by its exported file in onnxruntime. The test split is read once, for the model that
is chosen: of the runs that kept the accuracy the one of the least cost. The float model of all runs is the same, and
with `--method measured` all decide from the table that the first has measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from jpq import costs
from jpq.allocation.decision_data import calibration_batches
from jpq.allocation.prepare import Prepared, check_decide, prepare
from jpq.compression.model import CompressedModel
from jpq.config import MEASURED, Config, write_toml
from jpq.costs.target import Target
from jpq.export import verify
from jpq.export.formats import FORMATS
from jpq.export.onnx.export import export_onnx
from jpq.export.runtimes import Session
from jpq.export.timing import layer_table
from jpq.files.rows import write_rows
from jpq.plan import MaskPlan, Plan
from jpq.recipe import check_sensitivity, check_sensitivity_fits, optimize
from jpq.results import run_folder
from jpq.results.accuracy_limit import AccuracyLimit, check_limit, drop_interval, read_limit
from jpq.results.finalize import finalize
from jpq.results.finish import with_branches
from jpq.results.formatting import format_change, format_metric
from jpq.results.front import front, plots
from jpq.results.front.points import read_points
from jpq.results.record import UNREAD, BudgetRecord, Result
from jpq.results.run_status import (
    BEGUN,
    EMPTY,
    FINISHED,
    LADDER,
    TRIAL,
    UNFINISHED,
    clear_folder,
    input_files,
    read_status,
)
from jpq.tasks.data import Data
from jpq.tasks.load import fit_sizes, load_dense_model, read_data
from jpq.training import distributed
from jpq.training.environment import pick_device
from jpq.training.history import NullObserver, TrainingObserver
from jpq.trials.preview import prepare_float_weights, tidy_refusal
from jpq.types import JpqError

CLOSE = 1.05  # factor between two budgets that are close enough

FIRST = {"bops": 4.0}  # largest over first budget, by cost; 2 for all others

STEPS = 14  # bisections by which the least budget is found


@dataclass(frozen=True)
class Attempt:
    """One run of the ladder, a line of ladder.csv."""

    run: int  # from 1
    budget: str  # of the cost that is minimized, in percent of the fp32 model
    share: float  # what the model costs, as a share of the fp32 model
    cost: float  # the same in bit-operations, bytes, MACs or nanoseconds
    held_out: float  # score of the exported file; larger is better
    drop: float  # from the float model's score
    drop_low: float  # ends of the drop's 95 % interval; nan where the metric has none
    drop_high: float
    within: bool  # whether the score is the least that is asked for, or more
    seconds: float
    folder: str


@dataclass(frozen=True)
class AccuracyResult:
    """The chosen model of an accuracy target, and what was tried for it."""

    chosen: Result  # final: exported, verified, measured on the test split
    attempt: Attempt
    attempts: tuple[Attempt, ...]  # in the order of the runs
    limit: AccuracyLimit
    least: float  # score that was asked for
    float_score: float  # of the float model, held-out
    samples: int  # held-out
    cost: str  # that was minimized
    folder: Path
    least_budget: float  # that the method can reach, as a share of the fp32 model's cost

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what the interval of the drop says, and where the search ended."""
        notes = []
        task, drop = self.limit.task, self.float_score - self.least
        if math.isfinite(self.attempt.drop_high) and self.attempt.drop_high > drop:
            notes.append(
                f"With {self.samples} held-out samples the drop of the chosen model is "
                f"{format_drop(task, self.attempt.drop_low)} to {format_drop(task, self.attempt.drop_high)} (95 % "
                "interval), which reaches beyond the limit: more held-out samples (--held-out) tell more."
            )
        cheaper = [a.share for a in self.attempts if not a.within and a.share < self.attempt.share]
        if cheaper and self.attempt.share > CLOSE * max(cheaper):
            notes.append(
                f"Between {format_share(max(cheaper))} and {format_share(self.attempt.share)} nothing was tried: a "
                "larger --most-runs looks there."
            )
        budget = min(_budget_share(a) for a in self.attempts)
        if all(a.within for a in self.attempts) and budget > CLOSE * self.least_budget:
            notes.append(
                f"All runs kept the limit, and below {format_share(self.attempt.share)} nothing was tried: a larger "
                "--most-runs looks there."
            )
        return tuple(notes)


def format_share(share: float) -> str:
    """A share of the fp32 model as text with three digits: "0.794 %"."""
    return f"{100 * share:.3g} %"


def format_drop(task: Any, drop: float) -> str:
    """A drop as text: "0.52 points"; a model that is better than the float one has a negative drop."""
    return format_change(task, drop * (1 if task.score(1.0) > 0 else -1)).removeprefix("+")


class AccuracyTargetObserver(TrainingObserver, Protocol):
    """Observer of an accuracy target: of its runs, and of the training inside them."""

    def begin_run(self, number: int, budget: str, folder: Path) -> None:
        """Receive the start of a run: its number from 1, its budget and its folder."""

    def end_run(self, attempt: Attempt, limit: AccuracyLimit) -> None:
        """Receive what a run came to; those of an earlier part of the ladder too."""


class NullAccuracyTargetObserver(NullObserver):
    """An `AccuracyTargetObserver` that does nothing."""

    def begin_run(self, number: int, budget: str, folder: Path) -> None:
        """Ignore it."""

    def end_run(self, attempt: Attempt, limit: AccuracyLimit) -> None:
        """Ignore it."""


def find_cheapest(config: Config, observer: AccuracyTargetObserver | None = None) -> AccuracyResult:
    """The cheapest model whose held-out accuracy keeps `Budget.max_drop` or `Budget.min_metric`.

    Args:
        config: with one of the two in its budget; `Run.resume` goes on with an interrupted ladder.
        observer: is told of runs, and of the training inside them.

    Raises JpqError for limits that make no sense for the task, a float model below the limit, and where no budget keeps
    it.
    """
    config, observer = config.check(), observer or NullAccuracyTargetObserver()
    if not config.budget.has_accuracy_target:
        raise JpqError("An accuracy target needs a limit: give --max-drop 1% or --min-metric 91%.")
    if distributed.count() > 1:
        raise JpqError("An accuracy target takes runs one after the other: start it without torchrun.")
    check_limit(config)  # what flags alone show comes before data are read and the float model is trained
    check_decide(config.decide)
    check_sensitivity(config)
    ladder = _Ladder(config, observer)
    return ladder.climb()


class _Ladder:
    """The runs of one accuracy target, in one folder."""

    def __init__(self, config: Config, observer: AccuracyTargetObserver) -> None:
        self.config, self.observer, self.folder = config, observer, config.folder()
        self.cost = config.budget.minimize
        self.device = pick_device(config.run.device)
        path = config.budget.latency_table
        self.table = None if path is None else layer_table.read_table(path)
        check_folder(config)
        self.data = read_data(config, self.device)
        self.limit = read_limit(config.budget, self.data.task)
        model, prepared = self.prepare_model(config)  # what cannot work is refused before a folder is made
        if config.task.weights is not None:
            self.judge_float_model(model, prepared)
        with tidy_refusal(self.folder) as kept:
            begin_folder(config)
            weights, _ = prepare_float_weights(config, kept, observer)
            if config.task.weights is None:
                weights = weights.resolve()  # the ladder may go on from another working folder
            self.started = replace(config, task=replace(config.task, weights=weights))
            if config.task.weights is None:
                self.judge_float_model(*self.prepare_model(self.started))

    def prepare_model(self, config: Config) -> tuple[nn.Module, Prepared]:
        """The float model, with the method set up on it."""
        torch.manual_seed(config.run.seed)
        model, budget = load_dense_model(config, self.data, self.device), config.without_accuracy_target().budget
        prepared = prepare(model, self.data.example, config.decide, budget, table=self.table)
        check_sensitivity_fits(prepared, model, self.data, config)
        return model, prepared

    def judge_float_model(self, model: nn.Module, prepared: Prepared) -> None:
        """Find the least score, and the budgets between which the ladder lies."""
        self.float_score = self.data.task.evaluate(model, self.data.held_out)
        self.least = self.limit.least(self.float_score, self.data.chance_score)
        net = prepared.attach(model, calibration_batches(self.data)[:1])
        self.full, self.range = budget_range(prepared, net, self.cost)

    def climb(self) -> AccuracyResult:
        """Run the ladder, choose, make the chosen run final, and write the tables."""
        attempts: list[Attempt] = []
        while len(attempts) < self.config.budget.most_runs:
            share = self.next_share(attempts)
            if share is None:
                break
            attempts.append(self.run(len(attempts) + 1, share))
            self.observer.end_run(attempts[-1], self.limit)
            write_ladder(attempts, self.folder / LADDER)
        kept = [a for a in attempts if a.within]
        if not kept:
            best = max(attempts, key=lambda a: a.held_out)
            quick = self.config.train.effort == "minutes"
            longer = "leave out --effort minutes" if quick else "train longer (--epochs)"
            easier = "a larger drop" if self.limit.is_drop else f"a worse {self.data.task.metric_name}"
            raise JpqError(
                f"{self.limit.flag}: no run kept it. The best of {len(attempts)} has a held-out "
                f"{self.data.task.metric_name} of {format_metric(self.data.task, best.held_out)} at "
                f"{format_share(best.share)} of the fp32 model, and {format_metric(self.data.task, self.least)} is "
                f"asked for: {longer}, allow more bits or {easier}."
            )
        best = min(kept, key=lambda a: (a.share, -a.held_out))
        self.observer.phase("verify", 0, 0)
        folder = self.folder / best.folder
        done = run_folder.read_run(folder)
        chosen = done if done.final else finalize(folder, run_code=True)
        self.write_fronts(attempts)
        return AccuracyResult(
            chosen,
            best,
            tuple(attempts),
            self.limit,
            self.least,
            self.float_score,
            self.data.held_out.size,
            self.cost,
            self.folder,
            self.range[0],
        )

    def next_share(self, attempts: Sequence[Attempt]) -> float | None:
        """The next budget after these runs."""
        left = self.config.budget.most_runs - len(attempts)
        return next_share(attempts, *self.range, left, FIRST.get(self.cost, 2.0))

    def run(self, number: int, share: float) -> Attempt:
        """One run, or its result where an earlier part of the ladder has finished it."""
        config = self.run_config(share, self.table_of_first_run())
        folder, budget = config.folder(), f"{100 * share:.4g}%"
        self.observer.begin_run(number, budget, folder)
        status = read_status(folder)
        if status.state in (FINISHED, TRIAL):
            result = run_folder.read_run(folder)
        elif status.state in (EMPTY, BEGUN, UNFINISHED):
            anew = status.config is not None and self.differs_by_own_paths(config, status.config)
            started = replace(config.run, resume=status.state == UNFINISHED and not anew, overwrite=anew)
            result = optimize(replace(config, run=started), self.observer, final=False)
        else:
            raise JpqError(f"{folder} holds a run that cannot be read: --overwrite begins anew.")
        score = judge_file(folder, self.data, config)
        cost = run_cost(result, self.cost)
        interval = drop_interval(self.data.task, self.float_score, score, self.data.held_out.size)
        low, high = interval or (math.nan, math.nan)
        drop = self.float_score - score
        within = score >= self.least - 1e-9
        seconds = float(result.seconds["total"])
        return Attempt(number, budget, cost / self.full, cost, score, drop, low, high, within, seconds, folder.name)

    def differs_by_own_paths(self, config: Config, begun: Config) -> bool:
        """Whether settings differ, and only in the paths of files that the ladder wrote: its folder was moved."""

        def without_own_paths(settings: Config) -> Config:
            task, decide = settings.task, settings.decide
            if self.config.task.weights is None:
                task = replace(task, weights=None)
            if self.config.decide.sensitivity is None:
                decide = replace(decide, sensitivity=None)
            return replace(settings, task=task, decide=decide)

        same = without_own_paths(config).hash() == without_own_paths(begun).hash()
        return same and config.hash() != begun.hash()

    def run_config(self, share: float, table: Path | None) -> Config:
        """The settings of the run at this share of the fp32 model's cost."""
        text = f"{100 * share:.4g}%"
        target: dict[str, Any] = {f"target_{self.cost}": text}
        budget = replace(self.config.without_accuracy_target().budget, **target)
        name = f"{self.cost}-{text.replace('%', 'pct')}"
        run = replace(self.config.run, out=self.folder, name=name, resume=False, overwrite=False)
        decide = self.config.decide
        if table is not None and decide.method == MEASURED and decide.sensitivity is None:
            decide = replace(decide, sensitivity=table)
        return replace(self.started, budget=budget, decide=decide, run=run)

    def table_of_first_run(self) -> Path | None:
        """The sensitivity table that the first run has measured; None before it has, and for other methods."""
        first = self.run_config(self.next_share([]) or 1.0, None).folder()
        path = first.resolve() / "sensitivity.csv"
        return path if path.is_file() and (first / "result.json").is_file() else None

    def write_fronts(self, attempts: Sequence[Attempt]) -> None:
        """Write front.csv, as of a run with several budgets, and the pictures of the front."""
        records = [budget_record(attempt, self.folder) for attempt in attempts]
        run_folder.write_front(records, self.folder)
        points = read_points([self.folder]).points
        if points:
            plots.write_front_files(front.build_front(points, [self.cost]), self.folder)


def next_share(attempts: Sequence[Attempt], low: float, high: float, left: int, first: float = 2.0) -> float | None:
    """The next budget, as a share of the fp32 model's cost; None where the search is over.

    Args:
        attempts: runs so far; each is judged by the budget that it was given.
        low, high: the least and the largest budget.
        left: runs that may still follow.
        first: the largest budget over the first that is tried.
    """
    kept = [_budget_share(a) for a in attempts if a.within]
    missed = [_budget_share(a) for a in attempts if not a.within]
    if not attempts:
        return _four_digits(max(low, high / first))
    if not kept and max(missed) >= high * (1 - 1e-6):
        return None
    if not kept:
        return high if len(missed) >= 2 or left == 1 else _four_digits(math.sqrt(max(missed) * high))
    top = min(kept)
    below = [share for share in missed if share < top]
    if top <= CLOSE * max([low, *below]):
        return None
    return _four_digits(math.sqrt(max(below) * top) if below else max(low, top / 2))


def _budget_share(attempt: Attempt) -> float:
    return float(attempt.budget.rstrip("%")) / 100


def _four_digits(share: float) -> float:
    """The share that a budget's text says, the nearest to this one."""
    return float(f"{100 * share:.4g}") / 100


def _four_digits_up(share: float) -> float:
    """The smallest share that a budget's text can say, and that is not below this one."""
    step = 10.0 ** (math.floor(math.log10(share)) - 3)
    return _four_digits(math.ceil(share / step - 1e-9) * step)


def budget_range(prepared: Prepared, net: CompressedModel, cost: str) -> tuple[float, tuple[float, float]]:
    """(cost of the fp32 model, (least, largest) share of it that a budget may have).

    The largest is the cost of the whole model at the widest bits, the least what the method can reach, both rounded to
    budgets of four digits that can be met. Raises JpqError where no decision costs less than the fp32 model, as by a
    table of layers that are slower when they are quantized.
    """
    full = float(costs.baseline(net.exact_usage())[cost])
    widest = float(costs.COSTS[cost](net.exact_usage(widest_plan(net, prepared))))
    high = min(1.0, _four_digits_up(widest / full))
    try:
        target = Target(cost, f"{100 * high:.4g}%", math.floor(full * high))
        prepared.procedure.check_feasible(net, (target,), prepared.decide)
    except JpqError as error:
        reason = error.command_line
        raise JpqError(f"--minimize {cost} finds no model that costs less than the float one: {reason}") from error
    low = high
    inside, outside = math.log(high), math.log(high / 1e4)
    for _ in range(STEPS):
        middle = (inside + outside) / 2
        target = Target(cost, "", math.floor(full * math.exp(middle)))
        try:
            prepared.procedure.check_feasible(net, (target,), prepared.decide)
        except JpqError:
            outside = middle
        else:
            inside, low = middle, math.exp(middle)
    return full, (min(high, 1.01 * low), high)


def widest_plan(net: CompressedModel, prepared: Prepared) -> Plan:
    """Every unit kept, at the largest widths that are allowed; the image keeps its own."""
    plan, d = net.plan(), prepared.decide
    image = {layer.name for layer in net.network.layers if layer.reads_input}
    layers = {
        name: replace(layer, w_bits=d.w_bits[1], a_bits=layer.a_bits if name in image else d.a_bits[1])
        for name, layer in plan.layers.items()
    }
    kept = {name: (True,) * len(units) for name, units in plan.kept.items()}
    masks = {name: MaskPlan.of(torch.ones_like(mask.units())) for name, mask in plan.masks.items()}
    return replace(plan, layers=layers, kept=kept, masks=masks)


def run_cost(result: Result, cost: str) -> float:
    """A finished run's cost: bit-operations as the run counts them, MACs, bytes, or nanoseconds."""
    now = result.compressed
    if cost == "latency":
        return float(now.latency_ms or math.nan) * 1e6
    return float({"bops": now.bops, "macs": now.macs, "size": now.size_bytes}[cost])


def judge_file(folder: Path, data: Data, config: Config) -> float:
    """Held-out score of a run's model as an ONNX file in onnxruntime; the file stays in the run's folder."""
    small, plan = run_folder.load(folder, run_code=True)
    small.to(data.example.device)
    path = folder / FORMATS["onnx"].file_name
    model = with_branches(small, plan, data.example)
    if not export_onnx(model, data.example, path, config.run.onnx_weights, any_size=data.task.any_size):
        fit_sizes(data, Session(path))
    return float(verify.compare_metrics(small, path, data.held_out, data.task)["file"])


def budget_record(attempt: Attempt, folder: Path) -> BudgetRecord:
    """The line of front.csv of one run; its test metric is unread unless it was chosen."""
    result = run_folder.read_run(folder / attempt.folder)
    now = result.compressed
    return BudgetRecord(
        attempt.budget,
        now.accuracy if result.final else UNREAD,
        attempt.held_out,
        now.bops,
        now.bops_share,
        now.macs,
        now.size_bytes,
        attempt.seconds,
        attempt.folder,
    )


def check_folder(config: Config) -> None:
    """Raise JpqError where the folder holds a ladder or another run that was not to be gone on with or overwritten."""
    folder, status = config.folder(), read_status(config.folder())
    if config.run.overwrite or status.state == EMPTY:
        return
    if status.config is not None and status.config.hash() != config.hash():
        raise JpqError(
            f"{folder} holds a run of other settings. Give this one another --name, or --overwrite to remove that one."
        )
    if not config.run.resume:
        raise JpqError(
            f"{folder} holds runs of these settings: --resume goes on with them (and shows a finished result again), "
            "--overwrite removes them and begins anew."
        )


def begin_folder(config: Config) -> None:
    """Make the ladder's folder with its settings. Raises JpqError where it cannot be written."""
    folder = config.folder()
    if config.run.overwrite:
        clear_folder(folder, keep=input_files(config))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_toml(config, folder / "config.toml")
    except OSError as error:
        raise JpqError(f"Cannot write to {folder}: {error.strerror}. Choose another folder with --out.") from error


def write_ladder(attempts: Sequence[Attempt], path: Path) -> None:
    """Write ladder.csv, a line a run."""
    write_rows(path, Attempt, attempts)
