"""The commands `jpq pareto` and `jpq export`: their flags and what they say. Heavy imports wait until they are needed."""

from __future__ import annotations

import dataclasses
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jpq.result import human, percent
from jpq.types import JpqError

if TYPE_CHECKING:
    from jpq.fronts import Front
    from jpq.picking import Choice
    from jpq.point import Point


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
    """Only points with at most so many bit-operations: "1%" of the fp32 model, or "12M". Without --min-accuracy the most
    accurate of them is picked."""
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


@dataclasses.dataclass(frozen=True)
class Export(Pick):
    """The run to export, or the runs to pick it from."""

    data_root: Path | None = None
    """Where the data lie now. Default: where the run read them."""
    out: Path | None = None
    """Leave the run's folder as it is and write the final one here."""


def run(wanted: Pareto, console: Console) -> None:
    """Show the front, write its table and pictures, and pick a point where that was asked for."""
    from jpq import front_report

    front, skipped = _front(wanted)
    choice = _picked(wanted, front)
    for line in skipped:
        _say(console, f"[yellow]skipped[/] {escape(line)}")
    console.print(table(front, choice, wanted.all))
    for line in summary(front):
        _say(console, line)
    if choice is not None:
        _say(console, "")
        for line in reasons(choice):
            _say(console, line)
    out = wanted.out or _usual(wanted.runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = front_report.write(front, out, choice)
    except OSError as error:
        raise JpqError(f"Cannot write to {out}: {error.strerror}. Choose another folder with --out.") from error
    _say(console, f"[dim]files[/] {escape(os.path.relpath(out))}: {', '.join(path.name for path in files)}")


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False)


def _front(wanted: Pick) -> tuple[Front, tuple[str, ...]]:
    """The front of the named runs, and what was passed over."""
    from jpq.fronts import make
    from jpq.runs import read

    if not wanted.runs:
        raise JpqError("Name the runs: the folder of a run or of a study, or one that holds several, such as runs.")
    found = read(wanted.runs)
    return make(found.points, wanted.costs), found.skipped


def _picked(wanted: Pick, front: Front) -> Choice | None:
    """The point that the flags describe; None without any."""
    from jpq.picking import LIMITS, limits, pick

    asked = limits({name: getattr(wanted, name) for name in LIMITS}, front.points[0].full)
    return pick(front, asked, wanted.knee) if asked or wanted.knee else None


def _usual(runs: tuple[Path, ...]) -> Path:
    """Where files go by default: into the one folder that holds several runs, else into the current one."""
    from jpq.point import FILE

    one = len(runs) == 1 and not (runs[0] / FILE).is_file()
    return runs[0] if one else Path()


def table(front: Front, choice: Choice | None = None, every: bool = False) -> Table:
    """The front from the cheapest on, with `every` the dominated runs too, and the float model at the end."""
    from jpq.fronts import float_accuracy
    from jpq.picking import shown

    shows = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    others = [i for i in range(len(front.points)) if i not in front.best]
    points = [front.points[i] for i in (*front.best, *(others if every else ()))]
    timed = any("latency" in p.costs for p in points)
    names = [
        "",
        "run",
        "method",
        "target",
        "held-out",
        "test",
        "BOPs",
        "of fp32",
        "size",
        "w bits",
        "a bits",
        "MACs kept",
    ]
    for name in [*names, *(["latency"] if timed else [])]:
        words = name in ("run", "method", "target")
        shows.add_column(name, justify="left" if words else "right", no_wrap=name != "target", overflow="fold")
    for place, point in enumerate(points):
        on = place < len(front.best)
        bold = "bold" if choice is not None and point is choice.point else "" if on else "dim"
        test = "-" if point.test_accuracy is None else percent(point.test_accuracy)
        target = str(point.decisions.get("target", "")).removeprefix("bops ")
        cells = [
            f"{'★ ' if bold == 'bold' else ''}{place + 1 if on else ''}", escape(point.name),
            escape(str(point.decisions.get("method", ""))), escape(target), percent(point.accuracy), test,
            human(point.costs["bops"]), percent(point.share("bops")), human(point.costs["size"], "B"),
            *_means(point),
        ]  # fmt: skip
        latency = [shown(point, "latency") if "latency" in point.costs else "-"] if timed else []
        shows.add_row(*cells, *latency, style=bold)
    full, quality = front.points[0].full, float_accuracy(front)
    size = human(full["size"], "B") if "size" in full else "-"
    shows.add_section()
    shows.add_row("", "float model", "", "", "-" if quality is None else percent(quality), "", human(full["bops"]),
                  percent(1.0), size, "32", "32", percent(1.0))  # fmt: skip
    return shows


def _means(point: Point) -> tuple[str, str, str]:
    """Mean bits over the layers, and the share of the MACs that stays."""
    if not point.layers:
        return "-", "-", "-"
    kept = percent(point.share("macs")) if "macs" in point.full else "-"
    bits = (statistics.mean(getattr(layer, what) for layer in point.layers) for what in ("w_bits", "a_bits"))
    return (*(f"{mean:.1f}" for mean in bits), kept)  # type: ignore[return-value]


def summary(front: Front) -> list[str]:
    """How many runs there are, how much the front covers, and where it bends."""
    from jpq.picking import WORDS, shown

    n, on = len(front.points), len(front.best)
    words = " and ".join(WORDS[cost] for cost in front.costs)
    lines = [f"{n} runs, {on} on the front of held-out accuracy and {words}, {n - on} dominated."]
    chance = percent(max(p.chance for p in front.points))
    unit = "accuracy x decades" + (" of each" if len(front.costs) > 1 else "")
    lines.append(
        f"Hypervolume {front.covered:.4f} ({unit}; above {chance} accuracy, below the fp32 model's {words}, log axis)."
    )
    if front.knee is None:
        lines.append("No knee: fewer than three points are on the front, or none stands out.")
    else:
        p = front.points[front.knee]
        lines.append(
            f"Knee: {front.number(front.knee)}, {escape(p.name)}, {percent(p.accuracy)} at {shown(p, front.costs[0])}."
        )
    return lines


def reasons(choice: Choice) -> list[str]:
    """Which point was picked, and why."""
    from jpq.picking import shown

    p = choice.point
    costs = ", ".join(shown(p, cost) for cost in ("bops", "size", "latency") if cost in p.costs)
    where = "" if p.folder is None else f" ({escape(os.path.relpath(p.folder))})"
    first = f"[bold]Chosen: {escape(p.name)}[/]{where}, {percent(p.accuracy)} held-out, {costs}."
    return [first, *(escape(line) for line in choice.why)]
