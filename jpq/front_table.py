"""What the screen shows of a run that followed several budgets down."""

from __future__ import annotations

import os

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from jpq.progress import duration
from jpq.result import Result, human, percent


def front_table(result: Result) -> RenderableType:
    """A line for each budget: how good and how dear its model is, when it was there, and where it lies."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("target", "accuracy", "held-out", "BOPs", "of fp32", "MACs", "size", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("folder", overflow="fold")
    for p in result.front:
        table.add_row(
            escape(p.budget), f"[bold]{percent(p.accuracy)}[/]", percent(p.held_out), human(p.bops),
            percent(p.bops_share), human(p.macs), human(p.size_bytes, "B"), duration(p.seconds), escape(p.folder),
        )  # fmt: skip
    top = os.path.relpath(result.folder.parent)
    lines = [
        f"The float model has {percent(result.float.accuracy)}. Each model met its targets and was checked as always.",
        f"{top}: front.csv, front.png, history.csv and the folders above, each a run like any other (jpq evaluate).",
        *(f"note  {note}" for note in result.notes),
    ]
    return Group(table, *(Text(line) for line in lines))
