"""Tables that fit the screen, and lines, in the style that all commands share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from jpq.results.formatting import shorten_names

LEAST_TEXT = 14  # smallest width that a column of texts or names is given before other columns are left out
BETWEEN = 3  # characters between two columns


@dataclass(frozen=True)
class Column:
    """A column of a table: numbers by default, right-aligned and never shortened.

    On a screen that is too narrow, columns with the largest `optional` are left out first, those with 0 never.
    """

    name: str
    footer: str = ""
    align: Literal["left", "right"] = "right"
    wrap: bool = False  # fold long cells
    shorten: bool = False  # long cells lose their middle, as names of layers may
    optional: int = 0

    def width(self, cells: Sequence[str]) -> int:
        """Characters of the widest cell, heading included."""
        return max(cell_len(Text.from_markup(cell, emoji=False).plain) for cell in (self.name, self.footer, *cells))


def text_column(name: str, footer: str = "", optional: int = 0) -> Column:
    """A left-aligned column whose long cells are folded."""
    return Column(name, footer, "left", wrap=True, optional=optional)


def name_column(name: str, footer: str = "") -> Column:
    """A left-aligned column of names of layers, which lose their middle on a narrow screen."""
    return Column(name, footer, "left", shorten=True)


class FittedTable(Table):
    """A table that fits the screen: columns that may be left out are, names are shortened, and no figure is cut.

    Args:
        columns: a text stands for a column of numbers of that name.
        rows: cells, which may hold rich markup.
        title: a line above.
    """

    def __init__(self, columns: Sequence[str | Column], rows: Sequence[Sequence[str]] = (), title: str | None = None):
        super().__init__()
        self.specs = [Column(column) if isinstance(column, str) else column for column in columns]
        self.heading = title
        self.lines: list[tuple[tuple[str, ...], str]] = []  # cells and style of each row
        self.sections: list[int] = []  # numbers of rows above a line
        for row in rows:
            self.add_line(row)

    def add_line(self, cells: Sequence[str], style: str = "") -> None:
        """Add a row."""
        self.lines.append((tuple(cells), style))

    def end_section(self) -> None:
        """Draw a line below the rows so far."""
        self.sections.append(len(self.lines))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table at the width of the screen."""
        yield self.fit(options.max_width)

    def fit(self, width: int) -> Table:
        """The table at a width in characters."""
        shown = self._shown_columns(width)
        specs = [self.specs[i] for i in shown]
        fitted = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1),
            show_footer=any(column.footer for column in specs),
            footer_style="bold",
            title=self.heading,
            title_justify="left",
        )
        for column in specs:
            fitted.add_column(column.name, column.footer, justify=column.align, overflow="fold", no_wrap=False)
        cells = [[row[i] for i in shown] for row, _ in self.lines]
        room = self._shorten_names(specs, cells, width)
        for place, shown_column in enumerate(fitted.columns):
            if not specs[place].wrap:  # figures and names keep their width, texts share what is left
                widest = specs[place].width([row[place] for row in cells])
                shown_column.min_width = min(widest, room) if specs[place].shorten else widest
        for number, (row, (_, style)) in enumerate(zip(cells, self.lines, strict=True), 1):
            fitted.add_row(*row, style=style, end_section=number in self.sections)
        return fitted

    def _shown_columns(self, width: int) -> list[int]:
        """Numbers of the columns that have room."""
        shown = list(range(len(self.specs)))
        while self._least_width(shown) > width:
            optional = max(shown, key=lambda i: self.specs[i].optional)
            if not self.specs[optional].optional:
                break
            shown.remove(optional)
        return shown

    def _least_width(self, shown: Sequence[int]) -> int:
        """Characters that these columns need at least."""
        widths = []
        for i in shown:
            width = self.specs[i].width([row[i] for row, _ in self.lines])
            flexible = self.specs[i].wrap or self.specs[i].shorten
            widths.append(min(width, LEAST_TEXT) if flexible else width)
        return sum(widths) + BETWEEN * len(shown) + 1

    def _shorten_names(self, specs: Sequence[Column], cells: list[list[str]], width: int) -> int:
        """Shorten the names in the rows so that all columns fit; returns the width of the last column of names."""
        widths = [column.width([row[i] for row in cells]) for i, column in enumerate(specs)]
        used = [min(w, LEAST_TEXT) if column.wrap else w for w, column in zip(widths, specs, strict=True)]
        over = sum(used) + BETWEEN * len(specs) + 1 - width
        room = width
        for i, column in enumerate(specs):
            if not column.shorten or over <= 0:
                continue
            names = [Text.from_markup(row[i], emoji=False).plain for row in cells]
            room = max(min(widths[i], LEAST_TEXT), widths[i] - over)
            over -= widths[i] - room
            for row, name in zip(cells, shorten_names(names, room), strict=True):
                row[i] = escape(name)
        return room


def table(columns: Sequence[str | Column], rows: Sequence[Sequence[str]], title: str | None = None) -> FittedTable:
    """A table that fits the screen; a text stands for a column of numbers of that name.

    Cells may hold rich markup. A line of totals is shown where a column has a footer.
    """
    return FittedTable(columns, rows, title)


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
