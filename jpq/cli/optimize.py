"""What the screen shows of a run that followed several budgets down."""

from __future__ import annotations

import os
import shlex

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.text import Text

from jpq.cli.flags import parse
from jpq.cli.output import table, text_column
from jpq.results.formatting import format_duration, format_metric, format_number, format_percent
from jpq.results.record import Result


def front_table(result: Result) -> RenderableType:
    """A line for each budget: how good and how dear its model is, when it was there, and where it lies."""
    metric = result.task.metric_name
    columns = ("target", metric, "held-out", "BOPs", "of fp32", "MACs", "size", "after", text_column("folder"))
    rows = [
        (
            escape(p.budget),
            f"[bold]{format_metric(result.task, p.accuracy)}[/]",
            format_metric(result.task, p.held_out),
            format_number(p.bops),
            format_percent(p.bops_share),
            format_number(p.macs),
            format_number(p.size_bytes, "B"),
            format_duration(p.seconds),
            escape(p.folder),
        )
        for p in result.front
    ]
    top = os.path.relpath(result.folder.parent)
    lines = [
        f"The float model has {format_metric(result.task, result.float.accuracy)}. "
        "Each model met its targets and was checked as always.",
        f"{top}: front.csv, front.png, history.csv and the folders above, each a run like any other (jpq evaluate).",
        *(f"note  {note}" for note in result.notes),
    ]
    return Group(table(columns, rows), *(Text(line) for line in lines))


def optimize_command(args: list[str], console: Console) -> None:
    """Run `jpq optimize`."""
    config = parse(args).check()
    from jpq.cli.progress import ProgressDisplay
    from jpq.cli.summary import layer_table, summary
    from jpq.methods.compatibility import compose
    from jpq.recipe import optimize
    from jpq.training import distributed
    from jpq.training.epochs import all_phases

    distributed.begin(config.run.device)
    console.quiet = not distributed.is_first()
    d = config.decide
    planned = {phase.title: phase.epochs for phase in all_phases(config, compose(d.method, d.structure, d.width))}
    with ProgressDisplay(console, planned) as watch:
        result = optimize(config, watch, shlex.join(["jpq", "optimize", *args]))
    distributed.end()
    if result.front:
        console.print(front_table(result))
        return
    console.print(layer_table(result))
    console.print(summary(result))
