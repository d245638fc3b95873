"""`jpq pareto`: finished runs as one front, on the screen and as files, and a point of it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jpq.cli.flags import parse_flags, with_help
from jpq.cli.output import Column, print_line, table, text_column
from jpq.cli.run_selection import RunSelection, choose_point, print_choice, print_skipped, read_front
from jpq.results.formatting import format_metric, format_number, format_percent
from jpq.results.intervals import format_interval, is_within_noise, metric_interval
from jpq.types import JpqError

if TYPE_CHECKING:
    from jpq.results.front.front import Front
    from jpq.results.front.select import Choice

OPTIONAL = ("size", "95 %", "method", "test", "BOPs", "target", "bits w, a", "MACs kept")  # left out from the last on

COLUMNS = {
    "run": Column("run", align="left"),
    "method": Column("method", align="left", optional=1 + OPTIONAL.index("method")),
    "target": text_column("target", optional=1 + OPTIONAL.index("target")),
}


@dataclasses.dataclass(frozen=True)
class Pareto(RunSelection):
    """Flags of `jpq pareto`: finished runs as a front, and optionally one point of it."""

    all: bool = False
    """Show dominated runs too."""
    out: Path | None = None
    """Folder for pareto.csv, pareto.png and layers.png. Default: the folder that was given, if it is one that holds
    several runs, else the current one."""


def pareto_command(args: list[str], console: Console) -> None:
    """Run `jpq pareto`."""
    show_front(parse_flags(with_help(Pareto, "runs"), "pareto", args), console)


def show_front(flags: Pareto, console: Console) -> None:
    """Print the front, write its table and pictures, and choose a point where flags describe one."""
    from jpq.results.front import plots

    front, skipped = read_front(flags)
    choice = choose_point(flags, front)
    print_skipped(skipped, console)
    console.print(front_table(front, choice, flags.all))
    for line in (*describe_front(front), *describe_noise(front)):
        print_line(console, line)
    if choice is not None:
        print_line(console, "")
        print_choice(choice, console)
    out = flags.out or _default_folder(flags.runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = plots.write_front_files(front, out, choice)
    except OSError as error:
        raise JpqError(f"Cannot write to {out}: {error.strerror}. Choose another folder with --out.") from error
    print_line(console, f"[dim]files[/] {escape(os.path.relpath(out))}: {', '.join(path.name for path in files)}")


def _default_folder(runs: tuple[Path, ...]) -> Path:
    """The folder of the files without --out: the one that holds several runs, else the current one."""
    from jpq.results.front.points import RESULT_FILE

    holds_several = len(runs) == 1 and not (runs[0] / RESULT_FILE).is_file()
    return runs[0] if holds_several else Path()


def front_table(front: Front, choice: Choice | None = None, dominated: bool = False) -> Table:
    """A row per point of the front, the cheapest first, and the float model last.

    Args:
        front: of the runs.
        choice: the point that is marked.
        dominated: show runs that others beat, too.
    """
    order = [*front.front_indices]
    if dominated:
        order += sorted(set(range(len(front.points))) - set(order), key=lambda i: front.points[i].costs[front.costs[0]])
    rows = [(i, _point_cells(front, i)) for i in order]
    names = _filled_columns(front, [cells for _, cells in rows])
    rows_table = table([_column(name) for name in names], ())
    for i, cells in rows:
        chosen = choice is not None and i == choice.index
        cells[""] = ("★ " if chosen else "") + str(front.number(i) or "")
        rows_table.add_line(
            [cells[n] for n in names], style="bold" if chosen else "" if i in front.front_indices else "dim"
        )
    rows_table.end_section()
    float_cells = _float_cells(front)
    rows_table.add_line([float_cells.get(n, "") for n in names])
    return rows_table


def _filled_columns(front: Front, rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Columns that are not empty."""
    timed = any("latency" in p.costs for p in front.points)
    names = [n for n in rows[0] if timed or n != "latency"]
    return [n for n in names if n in ("", "test") or any(cells[n] for cells in rows)]


def _column(name: str) -> Column:
    """A column by its name; on a narrow screen the last of OPTIONAL are left out first."""
    return COLUMNS.get(name) or Column(name, optional=1 + OPTIONAL.index(name) if name in OPTIONAL else 0)


def _point_cells(front: Front, i: int) -> dict[str, str]:
    """Cells of one run, by column."""
    from jpq.results.front.select import format_point_cost

    p = front.points[i]
    interval = metric_interval(front.task, p.accuracy, p.held_out_samples)
    bits = [statistics.mean(getattr(layer, what) for layer in p.layers) for what in ("w_bits", "a_bits") if p.layers]
    return {
        "": "",
        "run": escape(p.name),
        "method": escape(str(p.decisions.get("method", ""))),
        "target": escape(str(p.decisions.get("target", "")).removeprefix("bops ")),
        "held-out": format_metric(front.task, p.accuracy),
        "95 %": "" if interval is None else format_interval(interval, "-"),
        "test": "-" if p.test_accuracy is None else format_metric(front.task, p.test_accuracy),
        "BOPs share": format_percent(p.share("bops")),
        "BOPs": format_number(p.costs["bops"]),
        "size": format_number(p.costs["size"], "B"),
        "latency": format_point_cost(p, "latency") if "latency" in p.costs else "-",
        "bits w, a": ", ".join(f"{mean:.1f}" for mean in bits) or "-",
        "MACs kept": format_percent(p.share("macs")) if "macs" in p.full_costs else "-",
    }


def _float_cells(front: Front) -> dict[str, str]:
    """Cells of the float model, by column."""
    from jpq.results.front.front import float_accuracy

    full, right = front.full_costs, float_accuracy(front)
    latency = {"latency": f"{full['latency'] / 1e6:#.3g} ms"} if "latency" in full else {}
    return {
        "run": "float model",
        "held-out": "-" if right is None else format_metric(front.task, right),
        "BOPs share": format_percent(1.0),
        "BOPs": format_number(full["bops"]),
        "size": format_number(full["size"], "B") if "size" in full else "-",
        "bits w, a": "32, 32",
        "MACs kept": format_percent(1.0),
        **latency,
    }


def describe_noise(front: Front) -> list[str]:
    """A sentence where neighbours on the front differ by less than the noise of so few held-out samples."""
    points = front.front_points
    samples = min((p.held_out_samples for p in points), default=0)
    pairs = list(itertools.pairwise(points))
    alike = sum(is_within_noise(front.task, a.accuracy, b.accuracy, samples) for a, b in pairs)
    if not alike:
        return []
    which = "The step" if len(pairs) == 1 else f"{alike} of {len(pairs)} steps"
    return [f"{which} along the front: within the noise of {samples} held-out samples (95 % intervals)."]


def describe_front(front: Front) -> list[str]:
    """Sentences on the number of runs, the hypervolume of the front, and its knee."""
    from jpq.results.front.front import hypervolume_by_method
    from jpq.results.front.select import COST_NAMES, format_point_cost

    n, on = len(front.points), len(front.front_indices)
    words = " and ".join(COST_NAMES[cost] for cost in front.costs)
    metric = front.task.metric_name
    lines = [f"{n} run{'s' * (n > 1)}, {on} on the front of held-out {metric} and {words}, {n - on} dominated."]
    chance = format_metric(front.task, max(p.chance for p in front.points))
    unit = f"{metric} x decades" + (" of each" if len(front.costs) > 1 else "")
    if front.hypervolume > 0:
        lines.append(
            f"Hypervolume {front.hypervolume:.4f} ({unit}; better than {chance} {metric}, below the fp32 model's "
            f"{words}, log axis)."
        )
    else:
        lines.append(
            f"No hypervolume: no run has a held-out {metric} better than {chance}, the task's chance level, and "
            f"less {words} than the fp32 model."
        )
    alone = hypervolume_by_method(front) if front.hypervolume > 0 else {}
    if len(alone) > 1:
        each = (f"{escape(method)} {volume:.4f} ({runs})" for method, (volume, runs) in alone.items())
        lines.append(f"Of each method alone (and its runs): {', '.join(each)}.")
    if front.knee is None:
        lines.append("No knee: fewer than three points are on the front, or none stands out.")
    else:
        p = front.points[front.knee]
        lines.append(
            f"Knee: {front.number(front.knee)}, {escape(p.name)}, "
            f"{format_metric(front.task, p.accuracy)} at {format_point_cost(p, front.costs[0])}."
        )
    return lines
