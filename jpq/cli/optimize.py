"""`jpq optimize`: run the recipe with live progress, then show the result; one table for several budgets."""

from __future__ import annotations

import os
import shlex

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.text import Text

from jpq.cli.flags import parse_optimize_flags, wants_all_layers
from jpq.cli.output import Column, print_line, table, text_column
from jpq.results.formatting import format_duration, format_metric, format_number, format_percent
from jpq.results.record import Result

STRICT_EXIT = 1  # exit code of --strict where a file differs from its model


def optimize_command(args: list[str], console: Console) -> None:
    """Run `jpq optimize`."""
    config = parse_optimize_flags(args).check()
    if config.budget.has_accuracy_target:
        from jpq.cli.accuracy_target import accuracy_target_command

        accuracy_target_command(config, console, wants_all_layers(args))
        return
    from jpq.cli.progress import ProgressDisplay
    from jpq.methods.compatibility import compose_method
    from jpq.recipe import optimize
    from jpq.results.run_folder import read_finished
    from jpq.results.run_status import FINISHED, TRIAL, check_rerun
    from jpq.training import distributed
    from jpq.training.epochs import all_phases

    distributed.begin(config.run.device)
    console.quiet = not distributed.is_first()
    status = distributed.run_on_first(lambda: check_rerun(config))
    if config.run.resume and status.state in (FINISHED, TRIAL):
        distributed.end()
        print_line(console, f"{escape(os.path.relpath(status.folder))} is finished; its result is shown again.")
        print_result(read_finished(config), console, wants_all_layers(args))
        return
    d = config.decide
    planned = {
        phase.title: phase.epochs for phase in all_phases(config, compose_method(d.method, d.structure, d.width))
    }
    with ProgressDisplay(console, planned) as observer:
        result = optimize(config, observer, shlex.join(["jpq", "optimize", *args]), True, observer)
    distributed.end()
    print_result(result, console, wants_all_layers(args))
    if config.run.strict and _file_warnings(result):
        raise SystemExit(STRICT_EXIT)


def print_result(result: Result, console: Console, all_rows: bool = False) -> None:
    """Print a run's layers (the dearest, or all) and summary, or the table of its budgets where it has several."""
    from jpq.cli.contest import contest_table
    from jpq.cli.summary import layer_table, summary

    for warning in _file_warnings(result):
        print_line(console, f"[bold yellow]warning[/] {escape(warning)}")
    if result.front:
        console.print(front_table(result))
        return
    console.print(layer_table(result, all_rows))
    if result.contest:
        console.print(contest_table(result))
    console.print(summary(result))


def _file_warnings(result: Result) -> list[str]:
    """Warnings on exported files of a run, of all budgets where it has several."""
    if not result.front:
        return list(result.file_warnings)
    from jpq.results.run_folder import read_run

    folders = [result.folder.parent / record.folder for record in result.front]
    return [f"{folder.name}: {text}" for folder in folders for text in read_run(folder).file_warnings]


def front_table(result: Result) -> RenderableType:
    """A row per budget: metrics and costs of its model, seconds until it was finished, and its folder."""
    metric = result.task.metric_name
    columns = (
        "target",
        metric,
        Column("held-out", optional=2),
        Column("BOPs", optional=3),
        "of fp32",
        Column("MACs", optional=4),
        "size",
        Column("after", optional=1),
        text_column("folder"),
    )
    rows = [
        (
            escape(record.budget),
            f"[bold]{format_metric(result.task, record.accuracy)}[/]",
            format_metric(result.task, record.held_out),
            format_number(record.bops),
            format_percent(record.bops_share),
            format_number(record.macs),
            format_number(record.size_bytes, "B"),
            format_duration(record.seconds),
            escape(record.folder),
        )
        for record in result.front
    ]
    top = os.path.relpath(result.folder.parent)
    lines = [
        f"The float model has {format_metric(result.task, result.float.accuracy)}. "
        "Each model met its targets and was checked as always.",
        f"{top}: front.csv, front.png, history.csv and the folders above, each a run like any other (jpq evaluate).",
        *(f"note  {note}" for note in result.notes),
    ]
    return Group(table(columns, rows), *(Text(line) for line in lines))
