"""Tables and lines in the style that all commands share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Column:
    """A column of a table: numbers by default, right-aligned and never wrapped."""

    name: str
    footer: str = ""
    align: Literal["left", "right"] = "right"
    wrap: bool = False  # fold long cells instead of shortening them


def text_column(name: str, footer: str = "") -> Column:
    """A left-aligned column whose long cells are folded."""
    return Column(name, footer, "left", wrap=True)


def table(columns: Sequence[str | Column], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """A table without side lines; a text stands for a column of numbers of that name.

    Cells may hold rich markup. A line of totals is shown where a column has a footer.
    """
    full = [Column(column) if isinstance(column, str) else column for column in columns]
    rich_table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        show_footer=any(column.footer for column in full),
        footer_style="bold",
        title=title,
        title_justify="left",
    )
    for column in full:
        rich_table.add_column(
            column.name,
            column.footer,
            justify=column.align,
            no_wrap=not column.wrap,
            overflow="fold" if column.wrap else "ellipsis",
        )
    for row in rows:
        rich_table.add_row(*row)
    return rich_table


def label_grid(rows: Sequence[tuple[str, str]] = ()) -> Table:
    """Labels with a text beside each, without lines or heads."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(label, text)
    return grid


def print_line(console: Console, line: str) -> None:
    """Print one line of rich markup, however wide the terminal is."""
    console.print(line, soft_wrap=True, highlight=False)
