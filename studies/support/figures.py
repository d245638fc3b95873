"""Drawing and saving of the studies' pictures: a figure without a window, and axes in per cent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def save_figure(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a figure as PNG, beside the CSV at `path` or at `path` itself."""
    FigureCanvasAgg(figure)
    figure.savefig(path.with_suffix(".png"), dpi=dpi)


def plain_log_ticks(axes: Axes, ticks: Sequence[float]) -> None:
    """Ticks of a logarithmic x axis at these values, written as plain numbers, without minor labels."""
    axes.set_xticks(list(ticks))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
