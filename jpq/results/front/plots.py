"""Pictures of a front: pareto.png (metric over cost), and layers.png (bits and densities of every point)."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from jpq.results.formatting import format_metric, format_percent, metric_label, metric_scale, shorten
from jpq.results.front.front import Front, float_accuracy, write_table
from jpq.results.front.points import RunPoint
from jpq.results.front.select import COST_NAMES, Choice
from jpq.results.plots import BLUE, GREEN, INK, ORANGE, save_picture, set_log_ticks, style_axes

RED, PALE = "#D55E00", "#9AA5B1"  # Okabe and Ito's vermillion; grey for what is dominated

COLUMNS = 24  # largest number of columns of a heat map; longer fronts are thinned evenly

CELLS = 14  # most columns (and a third of the rows) of a heat map whose cells show their numbers

PLACES = ((-1, -4.5), (-1, 5), (1, -14), (1, 5), (-1, -14))  # of a name: side, points above

APART = 8  # points between a point and its name

WIDE, HIGH = 590.0, 385.0  # of the plane's axes, in points


def write_front_files(front: Front, folder: Path, choice: Choice | None = None) -> list[Path]:
    """Write pareto.csv, pareto.png and, where runs know their layers, layers.png."""
    table, picture, layers = (folder / name for name in ("pareto.csv", "pareto.png", "layers.png"))
    write_table(front, folder)
    save_picture(draw_front(front, choice), picture)
    drawn = draw_decisions(front, choice)
    if drawn is None:
        return [table, picture]
    save_picture(drawn, layers)
    return [table, picture, layers]


def draw_front(front: Front, choice: Choice | None = None) -> Figure:
    """Held-out accuracy over the (first) cost, in logs: the front as a staircase, and what it is compared with."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    cost = front.costs[0]
    axes.set_xscale("log")
    axes.set_title(_title(front), fontsize=12, color=INK, loc="left", pad=26)

    reference = float_accuracy(front)
    axes.axvline(100, color=INK, lw=0.8, ls=":", gid="fp32")
    if reference is not None:
        height = metric_scale(front.task) * reference
        axes.axhline(height, color=INK, lw=0.8, ls=":", gid="float")
        axes.scatter([100], [height], marker="D", s=46, color=INK, zorder=4, label="float model", gid="float")
    for percent, names in _uniform(front, cost).items():
        axes.axvline(percent, color=ORANGE, lw=1, ls=(0, (4, 3)), alpha=0.8, gid="tick", zorder=1)
        axes.annotate(
            names,
            (percent, 1),
            xycoords=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8.5,
            color="#8A6100",
            xytext=(0, 2),
            textcoords="offset points",
        )

    front_points = front.front_points
    x, y = _coordinates(front_points, cost)
    if len(front.costs) == 1:
        axes.step(x, y, where="post", color=BLUE, lw=1.6, zorder=2, gid="staircase")
    dominated = [p for i, p in enumerate(front.points) if i not in front.front_indices]
    uniform_points = [p for p in front.points if p.is_uniform]
    axes.scatter(
        *_coordinates([p for p in dominated if p not in uniform_points], cost),
        s=26,
        facecolor="white",
        edgecolor=PALE,
        zorder=3,
        label="dominated",
        gid="dominated",
    )
    axes.scatter(
        *_coordinates([p for p in front_points if p not in uniform_points], cost),
        s=40,
        color=BLUE,
        zorder=4,
        label="front",
        gid="front",
    )
    if uniform_points:
        filled = [ORANGE if p in front_points else "white" for p in uniform_points]
        axes.scatter(
            *_coordinates(uniform_points, cost),
            s=44,
            marker="s",
            c=filled,
            edgecolor=ORANGE,
            linewidth=1.4,
            zorder=4,
            label="uniform bits",
            gid="uniform",
        )
    if front.knee is not None:
        axes.scatter(
            *_coordinates([front.points[front.knee]], cost),
            s=190,
            facecolor="none",
            edgecolor=GREEN,
            linewidth=2,
            zorder=5,
            label="knee",
            gid="knee",
        )
    if choice is not None:
        axes.scatter(
            *_coordinates([choice.point], cost),
            s=260,
            marker="*",
            color=RED,
            edgecolor="white",
            zorder=6,
            label=escape_math(f"chosen: {choice.point.name}"),
            gid="chosen",
        )
    set_log_ticks(axes.xaxis)
    axes.set_xlabel(f"{COST_NAMES[cost]}, % of the fp32 model")
    axes.set_ylabel(f"held-out {metric_label(front.task)}")
    axes.margins(x=0.06, y=0.1)
    _name_points(axes, front, cost)
    style_axes(axes)
    axes.grid(True, color="#E3E3E3", lw=0.6)
    figure.legend(loc="outside lower center", ncols=6, fontsize=9, frameon=False)  # below: points lie everywhere
    return figure


def _name_points(axes: Axes, front: Front, cost: str) -> None:
    """Label each point of the front by number and method where there is room, else by number, else not at all."""
    low, high = axes.get_xlim()
    bottom, top = axes.get_ylim()
    scale = metric_scale(front.task)
    positions = [(100 * p.share(cost), scale * p.accuracy) for p in front.points]
    spots = [
        (WIDE * math.log(x / low) / math.log(high / low), HIGH * (y - bottom) / (top - bottom)) for x, y in positions
    ]
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in spots]
    for i in (front.front_indices[-1], *front.front_indices[:-1]):
        number = str(front.number(i))
        named = f"{number} {_method(front.points[i])}".strip()
        texts = (named, number) if len(front.front_indices) <= COLUMNS else (number,)
        for text, (side, rise) in itertools.product(texts, PLACES):
            box = _box(text, spots[i], side, rise)
            if box[0] > 0 and box[2] < WIDE and not any(_overlap(box, label) for label in taken):
                taken.append(box)
                label = axes.annotate(
                    text,
                    positions[i],
                    xytext=(APART * side, rise),
                    textcoords="offset points",
                    fontsize=8.5,
                    color=BLUE,
                    ha="left" if side > 0 else "right",
                    va="bottom",
                    zorder=7,
                )
                label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
                break


def _box(text: str, spot: tuple[float, float], side: int, rise: float) -> tuple[float, float, float, float]:
    """Approximate bounding box (left, bottom, right, top) of a text beside a spot, in points."""
    (x, y), long = spot, 4.9 * len(text)
    left = x + APART if side > 0 else x - APART - long
    return left, y + rise, left + long, y + rise + 9


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _coordinates(points: list[RunPoint] | tuple[RunPoint, ...], cost: str) -> tuple[list[float], list[float]]:
    scale = metric_scale(points[0].metric) if points else 1.0
    return [100 * p.share(cost) for p in points], [scale * p.accuracy for p in points]


def _method(point: RunPoint) -> str:
    """The method of a point, for its label; for uniform bits their widths."""
    if point.is_uniform:
        return f"W{point.layers[-1].w_bits}A{point.layers[-1].a_bits}"
    return escape_math(str(point.decisions.get("method", "")))


def _uniform(front: Front, cost: str) -> dict[float, str]:
    """Cost of uniform bits in per cent of fp32 -> their names; by latency several widths may take the same time."""
    uniform_costs = next((p.uniform for p in front.points if p.uniform), {})  # the same for all runs of one model
    names_by_percent: dict[float, list[str]] = {}
    for name, costs in uniform_costs.items():
        if cost in costs:
            names_by_percent.setdefault(round(100 * costs[cost] / front.points[0].full_costs[cost], 9), []).append(name)
    return {
        cost_percent: names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        for cost_percent, names in names_by_percent.items()
    }


def escape_math(text: str) -> str:
    """A text without mathematics, which matplotlib reads between dollar signs."""
    return text.replace("$", r"\$")


def _title(front: Front) -> str:
    first_point = front.points[0]
    n = len(front.points)
    return (
        f"{first_point.model} on {first_point.data}: {n} run{'s' * (n > 1)}, {len(front.front_indices)} on the front"
        if n > 1
        else f"{first_point.model}: one run"
    )


def _thinned(n: int) -> list[int]:
    """At most COLUMNS numbers from 1 to n, evenly spaced, including the first and the last."""
    return sorted({round(i) for i in np.linspace(1, n, min(n, COLUMNS))})


def draw_decisions(front: Front, choice: Choice | None = None) -> Figure | None:
    """Bits of weights and activations, and kept MACs, of every layer (rows) at every point of the front (columns).

    None where no point of the front knows its layers.
    """
    numbers = [i for i in _thinned(len(front.front_points)) if front.front_points[i - 1].layers]
    line = [front.front_points[i - 1] for i in numbers]
    if not line:
        return None
    names = [layer.name for layer in line[0].layers]
    tables = {
        what: np.array([[getattr(_layer(p, name), what, np.nan) for p in line] for name in names], float)
        for what in ("w_bits", "a_bits", "density")
    }
    rows, columns = len(names), len(line)
    height = 2.0 + max(1.2, rows * (0.36 if rows <= CELLS else 0.2))
    figure = Figure(
        figsize=(2.4 + 3 * max(1.9, (0.58 if columns <= CELLS else 0.3) * columns), height), layout="constrained"
    )
    figure.suptitle(f"{_title(front)}: what each point decided", fontsize=12, color=INK)
    panels = figure.subplots(1, 3, sharey=True)
    top = max(8, int(max(np.nanmax(tables["w_bits"]), np.nanmax(tables["a_bits"]))))
    bits = BoundaryNorm(np.arange(1.5, min(top, 8) + 1), min(top, 8) - 1)
    shades = {"w_bits": _ramp(BLUE, 7), "a_bits": _ramp("#B87400", 7), "density": _ramp(GREEN, 256)}
    titles = {"w_bits": "bits of weights", "a_bits": "bits of activations", "density": "MACs kept, %"}
    for axes, (what, table) in zip(panels, tables.items(), strict=True):
        scale = Normalize(0, 1) if what == "density" else bits
        axes.imshow(table, aspect="auto", cmap=shades[what], norm=scale, interpolation="nearest", gid=what)
        axes.set_title(titles[what], fontsize=10, color=INK, loc="left")
        axes.set_xticks(
            range(columns),
            [_column(p, i, front, choice) for p, i in zip(line, numbers, strict=True)],
            fontsize=8,
            rotation=0 if columns <= CELLS else 90,
        )
        axes.set_yticks(range(rows), [escape_math(shorten(name)) for name in names], fontsize=9 if rows <= CELLS else 7)
        axes.tick_params(length=0, colors=INK)
        axes.spines[:].set_visible(False)
        axes.set_xticks(np.arange(0.5, columns - 1), minor=True)
        axes.set_yticks(np.arange(0.5, rows - 1), minor=True)
        axes.grid(which="minor", color="white", lw=1)
        axes.tick_params(which="minor", length=0)
        if columns <= COLUMNS and rows <= 3 * CELLS:
            _numbers(axes, table, what)
    words = f"point of the front: number, held-out {front.task.metric_name}, {COST_NAMES[front.costs[0]]} over fp32's"
    panels[0].set_xlabel(words, fontsize=9, loc="left", color=INK)
    return figure


def _layer(point: RunPoint, name: str) -> object:
    return next((layer for layer in point.layers if layer.name == name), None)


def _numbers(axes: Axes, table: np.ndarray, what: str) -> None:
    """Write each cell's number into a heat map, white on dark cells."""
    shades = axes.images[0].to_rgba(table)[..., :3] @ (0.299, 0.587, 0.114)
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            text = f"{100 * value:.0f}" if what == "density" else f"{value:.0f}"
            dark = shades[row, column] < 0.55
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else INK)


def _column(point: RunPoint, number: int, front: Front, choice: Choice | None) -> str:
    star = " ★" if choice is not None and choice.point is point else ""
    parts = (f"{number}{star}", format_metric(front.task, point.accuracy), format_percent(point.share(front.costs[0])))
    return ("\n" if len(front.front_indices) <= CELLS else "  ").join(parts)


def _ramp(colour: str, n: int) -> Colormap:
    """A colour map from nearly white to a dark shade of one hue, readable without colour vision."""
    base = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    stops = np.array([0.93 + 0.07 * base, base, 0.55 * base])
    steps = np.linspace(0, 2, n)
    return ListedColormap(np.stack([np.interp(steps, [0, 1, 2], stops[:, c]) for c in range(3)], 1))
