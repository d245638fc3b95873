"""Flags that select finished runs and a point of their front, shared by `jpq pareto` and `jpq export`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from jpq.cli.output import print_line
from jpq.results.formatting import format_metric
from jpq.types import JpqError

if TYPE_CHECKING:  # --help shows without torch
    from jpq.results.front.front import Front
    from jpq.results.front.select import Choice


@dataclasses.dataclass(frozen=True)
class RunSelection:
    """Flags that name finished runs, and limits that choose a point of their front."""

    runs: tuple[Path, ...] = ()
    """Folders of runs, of studies, or that hold several; they are merged."""
    costs: tuple[str, ...] = ("bops",)
    """What counts beside the held-out metric: one or two of bops, bops-structured, macs, size, latency."""
    min_metric: str | None = None
    """The cheapest point with at least this held-out accuracy: "91%" or 0.91. Of other tasks, at least this metric in
    its unit: "60%" of mIoU, 29dB of PSNR, 0.9 of R² (at most this, where a lower metric is better)."""
    max_bops: str | None = None
    """Only points with at most so many bit-operations: "1%" of the fp32 model, or "12M". Of the points within limits
    that of the best metric is picked, or with --min-accuracy or --min-metric the cheapest."""
    max_macs: str | None = None
    """Only points with at most so many multiply-accumulates: "50%" or "12M"."""
    max_size: str | None = None
    """Only points whose weights take at most so many bytes: "60KB" or "5%"."""
    max_latency: str | None = None
    """Only points whose predicted latency is at most this: "3ms", "250us" or "50%"."""
    knee: bool = False
    """The point where the front bends (of the points that keep to the limits)."""


def read_front(selection: RunSelection) -> tuple[Front, tuple[str, ...]]:
    """The front of the named runs, and a sentence for each run that is left out."""
    from jpq.results.front.front import build_front, missing_cost_messages
    from jpq.results.front.points import read_points

    if not selection.runs:
        raise JpqError("Name the runs: the folder of a run or of a study, or one that holds several, such as runs.")
    collection = read_points(selection.runs)
    messages = missing_cost_messages(collection.points, selection.costs)
    return build_front(collection.points, selection.costs), (*collection.skipped, *messages)


def choose_point(selection: RunSelection, front: Front) -> Choice | None:
    """The point of the front that the flags describe; None where no flag does."""
    from jpq.results.front.select import LIMITS, parse_limits, pick_point
    from jpq.tasks.metric_text import metric_flag

    smallest = metric_flag(front.task).removeprefix("--").replace("-", "_")
    texts = {name: getattr(selection, name) for name in LIMITS if name.startswith("max")}
    bounds = parse_limits({smallest: selection.min_metric, **texts}, front.full_costs, front.task)
    return pick_point(front, bounds, selection.knee) if bounds or selection.knee else None


def print_skipped(messages: Sequence[str], console: Console) -> None:
    """Print the runs that are left out, a line each."""
    for message in messages:
        print_line(console, f"[yellow]skipped[/] {escape(message)}")


def print_choice(choice: Choice, console: Console) -> None:
    """Print the chosen point, and the reasons, a line each."""
    from jpq.results.front.select import format_point_cost

    point = choice.point
    costs = ", ".join(format_point_cost(point, cost) for cost in ("bops", "size", "latency") if cost in point.costs)
    folder = "" if point.folder is None else f" ({escape(os.path.relpath(point.folder))})"
    metric = format_metric(point.metric, point.accuracy)
    print_line(console, f"[bold]Chosen: {escape(point.name)}[/]{folder}, {metric} held-out, {costs}.")
    for reason in choice.why:
        print_line(console, escape(reason))
