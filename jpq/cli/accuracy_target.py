"""`jpq optimize --max-drop` and `--min-accuracy`: the runs of the ladder as they end, then the chosen model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jpq.cli.output import Column, print_line, table, text_column
from jpq.cli.progress import ProgressDisplay
from jpq.cli.summary import layer_table, summary
from jpq.config import Config
from jpq.results.formatting import format_duration, format_metric, format_number, format_percent

if TYPE_CHECKING:  # --help shows without torch
    from jpq.results.accuracy_limit import AccuracyLimit
    from jpq.trials.accuracy_target import AccuracyResult, Attempt

INTERVAL = 6  # place of the column of intervals

COSTS = {"bops": "BOPs", "size": "bytes", "latency": "predicted latency", "macs": "MACs"}


def accuracy_target_command(config: Config, console: Console, all_layers: bool = False) -> None:
    """Find the cheapest model within the accuracy, then print what was tried and the chosen model.

    Args:
        config: with `Budget.max_drop` or `Budget.min_metric`.
        console: to print on.
        all_layers: show every layer of the chosen model.
    """
    from jpq.methods.compatibility import compose_method
    from jpq.training import distributed
    from jpq.training.epochs import all_phases
    from jpq.trials.accuracy_target import find_cheapest

    distributed.begin(config.run.device)
    d, b = config.decide, config.budget
    method = compose_method(d.method, d.structure, d.width)
    planned = {phase.title: phase.epochs for phase in all_phases(config, method) if phase.name != "float"}
    limit = f"within --max-drop {b.max_drop}" if b.max_drop else f"with a held-out metric of {b.min_metric} or better"
    print_line(
        console,
        f"The model of the least {COSTS[b.minimize]} {escape(limit)}: up to {b.most_runs} runs, each judged on "
        "held-out data.",
    )
    screen = LadderScreen(console, planned)
    with screen:
        result = find_cheapest(config, screen)
    distributed.end()
    print_accuracy_result(result, console, all_layers)


class LadderScreen(ProgressDisplay):
    """Observer that shows the progress of each run, and a line on what it came to."""

    def __init__(self, console: Console, planned: Mapping[str, int]) -> None:
        super().__init__(console, planned)
        self.runs = 0

    def begin_run(self, number: int, budget: str, folder: Path) -> None:
        """Print the budget of the run."""
        self._close_phase()
        print_line(self.console, f"[bold]run {number}[/]  budget {budget.replace('%', ' %')} of the fp32 model")

    def end_run(self, attempt: Attempt, limit: AccuracyLimit) -> None:
        """Print what the run came to."""
        self._close_phase()
        verdict = "[green]within[/]" if attempt.within else f"[yellow]too far {_side(attempt, limit)}[/]"
        metric = format_metric(limit.task, attempt.held_out)
        print_line(
            self.console,
            f"[bold]run {attempt.run}[/]  held-out {limit.task.metric_name} {metric}, {_drop_words(attempt, limit)}: "
            f"{verdict}",
        )


def _drop_words(attempt: Attempt, limit: AccuracyLimit) -> str:
    """The drop with its interval: "0.52 points below the float model (0.1 to 0.9)"."""
    from jpq.trials.accuracy_target import format_drop

    words = f"{format_drop(limit.task, abs(attempt.drop))} {_side(attempt, limit)} the float model"
    if math.isnan(attempt.drop_low):
        return words
    return f"{words} (95 % interval of the drop: {_interval_words(attempt, limit)})"


def _side(attempt: Attempt, limit: AccuracyLimit) -> str:
    """Where the metric lies, seen from the float model's; a worse one lies above it where a lower one is better."""
    return "below" if (attempt.drop >= 0) == limit.task.higher_is_better else "above"


def _interval_words(attempt: Attempt, limit: AccuracyLimit) -> str:
    from jpq.trials.accuracy_target import format_drop

    low, high = (format_drop(limit.task, end).removesuffix(" points") for end in (attempt.drop_low, attempt.drop_high))
    return f"{low} to {high}"


def print_accuracy_result(result: AccuracyResult, console: Console, all_layers: bool = False) -> None:
    """Print the table of the runs, and layers and summary of the chosen model."""
    console.print(attempts_table(result))
    task, chosen = result.limit.task, result.attempt
    rule = f"{escape(result.limit.flag)} asks for a held-out {task.metric_name} of {format_metric(task, result.least)}"
    print_line(
        console,
        f"{rule} or better; the float model has {format_metric(task, result.float_score)}. Chosen: run {chosen.run}, "
        f"of the least {COSTS[result.cost]} that keeps it. Its test split was read once, after the choice.",
    )
    for note in result.notes:
        print_line(console, f"[yellow]note[/]  {escape(note)}")
    for warning in result.chosen.file_warnings:
        print_line(console, f"[bold yellow]warning[/] {escape(warning)}")
    console.print(layer_table(result.chosen, all_layers))
    console.print(summary(result.chosen))
    print_line(
        console,
        f"[dim]files[/] {escape(os.path.relpath(result.folder))}: ladder.csv, front.csv, pareto.csv, pareto.png, and a "
        "folder per run",
    )


def attempts_table(result: AccuracyResult) -> Table:
    """A row per run, the dearest first."""
    task = result.limit.task
    unit = {"size": "B", "latency": "ns"}.get(result.cost, "")
    columns: list[str | Column] = [
        "run",
        "budget",
        Column(COSTS[result.cost], optional=3),
        "of fp32",
        f"held-out {task.metric_name}",
        "drop",
        Column("95 %", optional=2),
        Column("within", align="left"),
        Column("time", optional=1),
        text_column("folder", optional=4),
    ]
    rows: list[tuple[str, ...]] = []
    for a in sorted(result.attempts, key=lambda attempt: -attempt.share):
        mark = " ★ chosen" if a is result.attempt else ""
        rows.append(
            (
                str(a.run),
                a.budget.replace("%", " %"),
                format_number(a.cost, unit),
                format_percent(a.share),
                format_metric(task, a.held_out),
                _plain_drop(a, result.limit),
                "" if math.isnan(a.drop_low) else _interval_words(a, result.limit),
                ("yes" if a.within else "no") + mark,
                format_duration(a.seconds),
                escape(a.folder),
            )
        )
    if all(math.isnan(a.drop_low) for a in result.attempts):  # the metric has no interval
        rows = [row[:INTERVAL] + row[INTERVAL + 1 :] for row in rows]
        del columns[INTERVAL]
    return table(columns, rows)


def _plain_drop(attempt: Attempt, limit: AccuracyLimit) -> str:
    from jpq.trials.accuracy_target import format_drop

    return format_drop(limit.task, attempt.drop)
