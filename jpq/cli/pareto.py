"""The commands `jpq pareto` and `jpq export`: their flags and what they say. Heavy imports wait until needed."""

from __future__ import annotations

import dataclasses
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jpq.cli.flags import parsed, shown
from jpq.cli.output import Column, print_line, table, text_column
from jpq.results.formatting import format_metric, format_number, format_percent
from jpq.types import JpqError

if TYPE_CHECKING:
    from jpq.results.front.front import Front
    from jpq.results.front.select import Choice


@dataclasses.dataclass(frozen=True)
class Pick:
    """Which runs, and which point of them."""

    runs: tuple[Path, ...] = ()
    """Folders of runs, of studies, or that hold several; they are merged."""
    costs: tuple[str, ...] = ("bops",)
    """What counts beside held-out accuracy: one or two of bops, bops-structured, macs, size, latency."""
    min_accuracy: str | None = None
    """The cheapest point with at least this held-out accuracy: "91%" or 0.91."""
    max_bops: str | None = None
    """Only points with at most so many bit-operations: "1%" of the fp32 model, or "12M". Of the points within limits
    the most accurate is picked, or with --min-accuracy the cheapest."""
    max_macs: str | None = None
    """Only points with at most so many multiply-accumulates: "50%" or "12M"."""
    max_size: str | None = None
    """Only points whose weights take at most so many bytes: "60KB" or "5%"."""
    max_latency: str | None = None
    """Only points whose predicted latency is at most this: "3ms", "250us" or "50%"."""
    knee: bool = False
    """The point where the front bends (of the points that keep to the limits)."""


@dataclasses.dataclass(frozen=True)
class Pareto(Pick):
    """Runs as a front, and perhaps a point of it."""

    all: bool = False
    """Show dominated runs too."""
    out: Path | None = None
    """Folder for pareto.csv, pareto.png and layers.png. Default: the folder that was given, if it is one that holds
    several runs, else the current one."""


def show_front(wanted: Pareto, console: Console) -> None:
    """Show the front, write its table and pictures, and pick a point where that was asked for."""
    from jpq.results.front import plots

    front, skipped = read_picked_runs(wanted)
    choice = pick_point(wanted, front)
    for line in skipped:
        print_line(console, f"[yellow]skipped[/] {escape(line)}")
    console.print(front_table(front, choice, wanted.all, console.width))
    for line in summary(front):
        print_line(console, line)
    if choice is not None:
        print_line(console, "")
        for line in reasons(choice):
            print_line(console, line)
    out = wanted.out or _usual(wanted.runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = plots.write_front_files(front, out, choice)
    except OSError as error:
        raise JpqError(f"Cannot write to {out}: {error.strerror}. Choose another folder with --out.") from error
    print_line(console, f"[dim]files[/] {escape(os.path.relpath(out))}: {', '.join(path.name for path in files)}")


def read_picked_runs(wanted: Pick) -> tuple[Front, tuple[str, ...]]:
    """The front of the named runs, and what was passed over."""
    from jpq.results.front.front import make, missing_cost_messages
    from jpq.results.front.points import read

    if not wanted.runs:
        raise JpqError("Name the runs: the folder of a run or of a study, or one that holds several, such as runs.")
    found = read(wanted.runs)
    return make(found.points, wanted.costs), (*found.skipped, *missing_cost_messages(found.points, wanted.costs))


def pick_point(wanted: Pick, front: Front) -> Choice | None:
    """The point that the flags describe; None without any."""
    from jpq.results.front.select import LIMITS, limits, pick

    asked = limits({name: getattr(wanted, name) for name in LIMITS}, front.full)
    return pick(front, asked, wanted.knee) if asked or wanted.knee else None


def _usual(runs: tuple[Path, ...]) -> Path:
    """Where files go by default: into the one folder that holds several runs, else into the current one."""
    from jpq.results.front.points import FILE

    one = len(runs) == 1 and not (runs[0] / FILE).is_file()
    return runs[0] if one else Path()


def front_table(front: Front, choice: Choice | None = None, every: bool = False, width: int = 100) -> Table:
    """The front from the cheapest on, with `every` the dominated runs too, and the float model at the end.

    Columns that people can do without stay away from screens that are not `width` enough.
    """
    order = [*front.best]
    if every:
        order += sorted(set(range(len(front.points))) - set(order), key=lambda i: front.points[i].costs[front.costs[0]])
    rows = [(i, _cells(front, i)) for i in order]
    least = {"target": 92, "bits w, a": 100, "MACs kept": 110, "BOPs": 84, "test": 78, "size": 66}
    timed = any("latency" in p.costs for p in front.points)
    names = [n for n in rows[0][1] if least.get(n, 0) <= width and (timed or n != "latency")]
    names = [n for n in names if n in ("", "test") or any(cells[n] for _, cells in rows)]
    texts = {"run": Column("run", align="left"), "method": Column("method", align="left")}
    columns = [{**texts, "target": text_column("target")}.get(name, Column(name)) for name in names]
    shows = table(columns, ())
    for i, cells in rows:
        chosen = choice is not None and i == choice.index
        cells[""] = ("★ " if chosen else "") + str(front.number(i) or "")
        shows.add_row(*(cells[n] for n in names), style="bold" if chosen else "" if i in front.best else "dim")
    shows.add_section()
    whole = _float_cells(front)
    shows.add_row(*(whole.get(n, "") for n in names))
    return shows


def _cells(front: Front, i: int) -> dict[str, str]:
    """One run's cells, by column."""
    from jpq.results.front.select import shown

    p = front.points[i]
    bits = [statistics.mean(getattr(layer, what) for layer in p.layers) for what in ("w_bits", "a_bits") if p.layers]
    return {
        "": "",
        "run": escape(p.name),
        "method": escape(str(p.decisions.get("method", ""))),
        "target": escape(str(p.decisions.get("target", "")).removeprefix("bops ")),
        "held-out": format_metric(front.task, p.accuracy),
        "test": "-" if p.test_accuracy is None else format_metric(front.task, p.test_accuracy),
        "BOPs share": format_percent(p.share("bops")),
        "BOPs": format_number(p.costs["bops"]),
        "size": format_number(p.costs["size"], "B"),
        "latency": shown(p, "latency") if "latency" in p.costs else "-",
        "bits w, a": ", ".join(f"{mean:.1f}" for mean in bits) or "-",
        "MACs kept": format_percent(p.share("macs")) if "macs" in p.full else "-",
    }


def _float_cells(front: Front) -> dict[str, str]:
    from jpq.results.front.front import float_accuracy

    full, right = front.full, float_accuracy(front)
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


def summary(front: Front) -> list[str]:
    """How many runs there are, how much the front covers, and where it bends."""
    from jpq.results.front.front import by_method
    from jpq.results.front.select import WORDS, shown

    n, on = len(front.points), len(front.best)
    words = " and ".join(WORDS[cost] for cost in front.costs)
    metric = front.task.metric_name
    lines = [f"{n} run{'s' * (n > 1)}, {on} on the front of held-out {metric} and {words}, {n - on} dominated."]
    chance = format_metric(front.task, max(p.chance for p in front.points))
    unit = f"{metric} x decades" + (" of each" if len(front.costs) > 1 else "")
    lines.append(
        f"Hypervolume {front.covered:.4f} ({unit}; above {chance} {metric}, below the fp32 model's {words}, log axis)."
    )
    alone = by_method(front)
    if len(alone) > 1:
        each = (f"{escape(method)} {volume:.4f} ({runs})" for method, (volume, runs) in alone.items())
        lines.append(f"Of each method alone (and its runs): {', '.join(each)}.")
    if front.knee is None:
        lines.append("No knee: fewer than three points are on the front, or none stands out.")
    else:
        p = front.points[front.knee]
        lines.append(
            f"Knee: {front.number(front.knee)}, {escape(p.name)}, "
            f"{format_metric(front.task, p.accuracy)} at {shown(p, front.costs[0])}."
        )
    return lines


def reasons(choice: Choice) -> list[str]:
    """Which point was picked, and why."""
    from jpq.results.front.select import shown
    from jpq.tasks import pick_task

    p = choice.point
    costs = ", ".join(shown(p, cost) for cost in ("bops", "size", "latency") if cost in p.costs)
    where = "" if p.folder is None else f" ({escape(os.path.relpath(p.folder))})"
    metric = format_metric(pick_task(p.task), p.accuracy)
    first = f"[bold]Chosen: {escape(p.name)}[/]{where}, {metric} held-out, {costs}."
    return [first, *(escape(line) for line in choice.why)]


def pareto_command(args: list[str], console: Console) -> None:
    """Run `jpq pareto`."""
    show_front(parsed(shown(Pareto, "runs"), "pareto", args), console)
