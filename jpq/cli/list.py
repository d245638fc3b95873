"""`jpq list`: a table of the runs in a folder, the newest first, with those that are unfinished or broken."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jpq.cli.flags import parse_flags, with_help
from jpq.cli.output import print_line
from jpq.config import TARGETS, Config
from jpq.files.paths import SETTINGS_FILE
from jpq.results.formatting import format_metric, format_percent, shorten_middle
from jpq.results.run_status import (
    BROKEN,
    CHECKPOINT,
    FINISHED,
    FRONT_TABLE,
    RESULT,
    TRIAL,
    UNFINISHED,
    RunStatus,
    read_status,
)
from jpq.types import JpqError

STUDY_FILE = "study.toml"  # the folder of a study has one

HEADS = ("when", "run", "model", "data", "method", "target", "accuracy", "status")
SETTINGS = ("method", "target")  # columns whose texts are shortened before names are
NAMES = ("run", "model", "data")
LEAST = dict.fromkeys(SETTINGS, 6) | dict.fromkeys(NAMES, 11)  # characters that a shortened text keeps
OPTIONAL = ("method", "when", "target")  # columns that are left out, in this order, where names need their room

COLOURS = {UNFINISHED: "yellow", BROKEN: "red", FINISHED: "green"}


@dataclasses.dataclass(frozen=True)
class ListFlags:
    """Flags of `jpq list`: where the runs are, and the form of the table."""

    runs: tuple[Path, ...] = ()
    """Folders that hold runs. Default: runs."""
    all: bool = False
    """Also list the trials of studies that lie in these folders."""
    csv: bool = False
    """Print the table as CSV, with nothing shortened."""


@dataclasses.dataclass(frozen=True)
class RunRow:
    """One run as a row of the table; texts are empty where nothing is known."""

    time: float  # seconds since 1970 of what was written last
    name: str  # path of its folder below the one that was given
    status: RunStatus
    target: str
    metric: str  # on the test split; of a trial on held-out data
    metric_name: str = ""  # "" where the metric is not known

    @property
    def cells(self) -> tuple[str, ...]:
        """The texts of the row, in the order of `HEADS`."""
        now, when = datetime.now(), datetime.fromtimestamp(self.time)
        time = f"{when:%m-%d %H:%M}" if when.year == now.year else f"{when:%Y-%m-%d}"
        return (time, self.name, *self.settings, self.target, self.metric, self.status.state)

    @property
    def settings(self) -> tuple[str, str, str]:
        """Model, data and method."""
        config = self.status.config
        return (config.task.model, config.task.data, config.decide.method) if config else ("", "", "")


def list_command(args: list[str], console: Console) -> None:
    """Run `jpq list`."""
    flags = parse_flags(with_help(ListFlags, "runs"), "list", args)
    if not flags.runs and not Path("runs").is_dir():
        print_line(console, "There are no runs here yet: jpq optimize --target-bops 1% makes one in the folder runs.")
        return
    rows, trials = read_rows(flags.runs or (Path("runs"),), flags.all)
    if flags.csv:
        write_csv(rows, console)
        return
    if rows:
        console.print(build_table(rows, console.width))
    else:
        print_line(console, "No runs were found.")
    for row in rows:
        if row.status.problem:
            print_line(console, f"[red]{BROKEN}[/] {escape(row.name)}: {escape(row.status.problem)}")
    if trials:
        runs = "1 run is a trial of a study" if trials == 1 else f"{trials} runs are trials of studies"
        print_line(console, f"{runs} and not listed: --all lists {'it' if trials == 1 else 'them'}.")


def read_rows(folders: Sequence[Path], with_trials: bool = False) -> tuple[list[RunRow], int]:
    """(the runs in and below some folders, the newest first; number of trials of studies that are left out).

    Raises JpqError for a folder that is not there.
    """
    found: dict[Path, RunRow] = {}
    trials = 0
    for top in folders:
        if not top.is_dir():
            what = "is a file" if top.exists() else "is not there"
            raise JpqError(f"{top} {what}: give a folder of runs, such as runs.")
        for place, in_study in _run_folders(top):
            if in_study and not with_trials:
                trials += 1
            else:
                found.setdefault(place.resolve(), _row(top, place))
    finished = {row.status.folder for row in found.values() if row.status.state == FINISHED and row.status.result}
    rows = [row for row in found.values() if not _is_shown_by_budgets(row.status, finished)]
    return sorted(rows, key=lambda row: (-row.time, row.name)), trials


def build_table(rows: Sequence[RunRow], width: int) -> Table:
    """The table, at most `width` characters wide: names of runs, models and data have the room that there is.

    Where it is scarce the time of day goes first, then methods and targets are shortened in their middle. Columns are
    left out if all names are whole then; else names are shortened too, and columns go where little of these would stay.
    """
    cells = {head: [row.cells[i] for row in rows] for i, head in enumerate(HEADS)}
    named = any(row.metric_name not in ("", "accuracy") for row in rows)
    if named:
        cells["accuracy"] = [f"{row.metric_name} {row.metric}".strip() for row in rows]
    if _table_width(_natural_widths(cells)) > width:
        cells["when"] = [text.split()[0] for text in cells["when"]]
    widths = _natural_widths(cells)
    for head in _columns_to_drop(widths, width):
        del widths[head]
    for heads in (SETTINGS, NAMES):
        _shorten_widest(widths, [head for head in heads if head in widths], width)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for head in widths:
        title = "metric" if named and head == "accuracy" else head
        table.add_column(title, justify="right" if head == "accuracy" else "left", no_wrap=True)
    for i, row in enumerate(rows):
        short = [escape(shorten_middle(cells[head][i], widths[head])) for head in widths]
        colour = COLOURS.get(row.status.state, "dim")
        table.add_row(*short[:-1], f"[{colour}]{short[-1]}[/]")
    return table


def _natural_widths(cells: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Characters of the widest text of each column, its head included."""
    return {head: max(map(len, (head, *texts))) for head, texts in cells.items()}


def _table_width(widths: Mapping[str, int]) -> int:
    """Characters of a row, with a blank between two columns."""
    return sum(widths.values()) + len(widths) - 1


def _columns_to_drop(widths: Mapping[str, int], width: int) -> tuple[str, ...]:
    """The fewest of `OPTIONAL` without which all names are whole; where that cannot be, each keeps `LEAST`."""
    choices = [OPTIONAL[:count] for count in range(len(OPTIONAL) + 1)]
    for shortened in (SETTINGS, SETTINGS + NAMES):
        least = {head: min(widths[head], LEAST[head]) if head in shortened else widths[head] for head in widths}
        for dropped in choices:
            if _table_width({head: least[head] for head in widths if head not in dropped}) <= width:
                return dropped
    return OPTIONAL


def _shorten_widest(widths: dict[str, int], heads: Sequence[str], width: int) -> None:
    """Take characters from the widest of these columns until the table fits or they keep no more than `LEAST`."""
    while _table_width(widths) > width:
        long = [head for head in heads if widths[head] > LEAST[head]]
        if not long:
            return
        widths[max(long, key=lambda head: widths[head])] -= 1


def write_csv(rows: Sequence[RunRow], console: Console) -> None:
    """Print the rows as CSV."""
    writer = csv.writer(console.file, lineterminator="\n")
    writer.writerow(("when", "folder", "model", "data", "method", "target", "accuracy", "held_out", "status"))
    for row in rows:
        result = row.status.result or {}
        when = datetime.fromtimestamp(row.time).isoformat(timespec="seconds")
        numbers = (_number(result, "compressed", "accuracy"), _number(result, "held_out", "compressed"))
        shown = ("" if number is None else str(number) for number in numbers)
        writer.writerow((when, os.path.relpath(row.status.folder), *row.settings, row.target, *shown, row.status.state))


def _run_folders(top: Path) -> Iterator[tuple[Path, bool]]:
    """(folder, whether it is a trial) of every run in and below a folder; that of a study has no trials, but runs."""
    studies: set[Path] = set()
    for place, below, files in os.walk(top):
        here = Path(place)
        below[:] = sorted(name for name in below if not name.startswith("."))
        if STUDY_FILE in files and here != top:
            studies.add(here)
        if SETTINGS_FILE in files:
            yield here, any(study in here.parents for study in studies)


def _row(top: Path, place: Path) -> RunRow:
    status = read_status(place)
    name = place.resolve().name if place == top else str(place.relative_to(top))
    target = _format_targets(status.config) if status.config else ""
    metric_name, metric = _format_result(status)
    return RunRow(_last_written(place), name, status, target, metric, metric_name)


def _is_shown_by_budgets(status: RunStatus, finished: set[Path]) -> bool:
    """Whether a finished run of several budgets is left out, because its budgets have rows of their own."""
    return (
        status.state == FINISHED and not status.result and any(status.folder in folder.parents for folder in finished)
    )


def _last_written(place: Path) -> float:
    files = (place / name for name in (RESULT, FRONT_TABLE, CHECKPOINT, SETTINGS_FILE))
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def _format_targets(config: Config) -> str:
    """The targets in a few characters: `1%` of the BOPs, `50KB size`."""
    texts = {name.removeprefix("target_"): getattr(config.budget, name) for name in TARGETS}
    return ", ".join(text if name == "bops" else f"{text} {name}" for name, text in texts.items() if text)


def _format_result(status: RunStatus) -> tuple[str, str]:
    """(name, text) of the metric of a run's compressed model; of a trial the held-out one. Empty where not known."""
    result = status.result or {}
    trial = status.state == TRIAL
    number = _number(result, "held_out", "compressed") if trial else _number(result, "compressed", "accuracy")
    if number is None:
        return "", ""
    data = result.get("data")
    if not isinstance(data, dict) or "task" not in data:
        return "accuracy", format_percent(number)
    from jpq.tasks import recorded_task  # imports torch

    try:
        task = recorded_task(data)
        return task.metric_name, format_metric(task, number)
    except JpqError:  # a task of the user's own
        return "", f"{number:.4g}"


def _number(result: dict[str, object], section: str, key: str) -> float | None:
    """A number of result.json; None where it is missing or no number."""
    part = result.get(section)
    value = part.get(key) if isinstance(part, dict) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
