"""Pictures of a run, curves.png and layers.png, and the figure style that fronts share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from jpq.config import Config
from jpq.files.atomic import replace_file
from jpq.results.formatting import format_metric, format_number, format_percent, metric_label, metric_scale, shorten
from jpq.results.record import LayerRecord, Result
from jpq.training.history import EpochRecord

BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#E69F00", "#009E73", "#E3E3E3", "#333333"  # Okabe and Ito's palette

SHADES = {"search": "#F1F5F9", "reconstruction": "#E8EEF4", "fine-tune": "#FFFFFF"}


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    figure.set_dpi(110)
    canvas = FigureCanvasAgg(figure)
    replace_file(path, lambda part: canvas.print_png(part))  # savefig draws a figure twice to lay it out


def draw_curves(result: Result, config: Config) -> Figure:
    """Plot of BOPs against the target, of bits and kept units, and of the held-out metric, over the epochs."""
    figure = Figure(figsize=(9, 8.4), layout="constrained")
    figure.suptitle(_title(result, config), fontsize=12, color=INK)
    cost, decisions, quality = figure.subplots(3, 1, sharex=True, height_ratios=(1.2, 1, 1))
    rows = [row for row in result.history if row.phase in SHADES]
    x = list(range(1, len(rows) + 1))
    mark = "o" if len(rows) <= 60 else ""

    if any(row.bops_share > 0 for row in rows):
        cost.set_yscale("log")
        cost.plot(x, [100 * row.aim_share for row in rows], color=ORANGE, lw=2, ls="--", label="aim of the controller")
        cost.plot(x, [100 * row.bops_share for row in rows], color=BLUE, lw=2, marker=mark, ms=3.5, label="BOPs now")
        set_log_ticks(cost.yaxis)
    limit = next((t["limit"] for name, t in result.targets.items() if name.startswith("bops")), None)
    if limit is not None and result.float.bops > 0:
        share = limit / result.float.bops
        cost.axhline(100 * share, color=INK, lw=1.2, ls=":", label=f"budget {format_percent(share)}")
    cost.set_ylabel("BOPs, % of the fp32 model")

    scale = metric_scale(result.task)
    quality.plot(x, [scale * row.accuracy for row in rows], color=BLUE, lw=2, marker=mark, ms=3.5, label="held-out")
    reference = result.held_out.get("float")
    if reference is not None:
        text = format_metric(result.task, reference)
        quality.axhline(scale * reference, color=INK, lw=1.2, ls=":", label=f"float model {text}")
    quality.set_ylabel(f"held-out {metric_label(result.task)}")
    quality.set_xlabel("epoch")
    quality.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    masked = any(row.density < 1 for row in result.layers)
    _draw_decisions(decisions, rows, x, mark, "weights" if masked else "channels")
    _shade_phases(rows, (cost, decisions, quality))
    style_axes(decisions)
    decisions.grid(True, color="#D8D8D8", lw=0.6)
    for axes, where in ((cost, "upper right"), (quality, "lower right")):
        style_axes(axes)
        axes.grid(True, color="#D8D8D8", lw=0.6)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc=where, fontsize=9, framealpha=0.9, edgecolor="none")
    return figure


def _draw_decisions(axes: Axes, rows: Sequence[EpochRecord], x: Sequence[int], mark: str, units: str) -> None:
    """Mean bits of weights and activations on one side, the share of units that stay on the other."""
    style: dict[str, Any] = {"lw": 2, "marker": mark, "ms": 3.5}
    lines = axes.plot(x, [row.w_bits for row in rows], color=BLUE, label="bits of weights", **style)
    lines += axes.plot(x, [row.a_bits for row in rows], color=ORANGE, label="bits of activations", **style)
    axes.set_ylabel("bits, mean over layers")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    share = axes.twinx()
    shares = [100 * row.kept for row in rows]
    lines += share.plot(x, shares, color=GREEN, ls="-.", label=f"{units} kept", **style)
    least = min((s for s in shares if s == s), default=100.0)
    share.set_ylim(min(90.0, least - 5), 102)
    share.set_ylabel(f"{units} kept, %")
    share.spines[["top", "left"]].set_visible(False)
    share.tick_params(colors=INK)
    share.legend(handles=lines, loc="lower right", bbox_to_anchor=(1, 0.98), fontsize=9, ncols=3, frameon=False)


def _shade_phases(rows: Sequence[EpochRecord], panels: Sequence[Axes]) -> None:
    """A background for each phase, with its name at the top of the first panel."""
    start = 0
    for name, colour in SHADES.items():
        length = sum(row.phase == name for row in rows)
        if not length:
            continue
        low, high = start + 0.5, start + length + 0.5
        for axes in panels:
            axes.axvspan(low, high, color=colour, zorder=0, lw=0)
            if start:
                axes.axvline(low, color="#9AA5B1", lw=1)
        middle = (low + high) / 2
        panels[0].text(
            middle,
            1.01,
            name,
            transform=panels[0].get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=10,
            color="#5A6672",
        )
        start += length
    if start:
        panels[0].set_xlim(0.5, start + 0.5)


def set_log_ticks(axis: Axis) -> None:
    """Set ticks at 1, 2 and 5 of each decade, or at round numbers where less than a decade is shown."""
    low, high = axis.get_view_interval()
    few = low > 0 and high / low < 4
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]) if few else LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_layers(result: Result, config: Config) -> Figure:
    """Bar chart of bits, kept channels and share of the BOPs of each layer, from the input down to the output."""
    return draw_layer_bars(result.layers, _title(result, config))


def draw_layer_bars(layers: Sequence[LayerRecord], title: str) -> Figure:
    """The bar chart of `draw_layers`, of any records of layers."""
    n = max(len(layers), 1)
    figure = Figure(figsize=(10, 1.5 + max(1.4, n * (0.42 if n <= 12 else 0.24))), layout="constrained")
    figure.suptitle(title, fontsize=12, color=INK)
    bits, kept, work = figure.subplots(1, 3, sharey=True, width_ratios=(1.1, 1, 1))
    y = range(len(layers))
    small = 9 if n <= 12 else 7.5

    bits.barh([i - 0.19 for i in y], [row.w_bits for row in layers], height=0.34, color=BLUE, label="weights")
    bits.barh([i + 0.19 for i in y], [row.a_bits for row in layers], height=0.34, color=ORANGE, label="activations")
    most = max([8, *(max(row.w_bits, row.a_bits) for row in layers)])
    bits.set_xlim(0, most + 0.3)
    bits.set_xticks(range(0, most + 1, 1 if most <= 8 else 2))
    bits.set_yticks(list(y), [shorten(row.name) for row in layers], fontsize=small)
    bits.set_ylim(n - 0.4, -0.6)
    bits.set_title("bits", fontsize=10, color=INK, loc="left")
    if layers:
        bits.legend(
            loc="lower right",
            bbox_to_anchor=(1, 1),
            fontsize=8,
            ncols=2,
            frameon=False,
            borderaxespad=0.2,
            columnspacing=1,
            handlelength=1,
        )

    masked = any(row.density < 1 for row in layers)
    shares = [row.density if masked else row.outputs / max(row.outputs_all, 1) for row in layers]
    kept.barh(y, [1.0] * len(layers), height=0.72, color=GREY)
    kept.barh(y, shares, height=0.72, color=GREEN)
    for i, row in enumerate(layers):
        text = format_percent(row.density) if masked else f"{row.outputs}/{row.outputs_all}"
        kept.text(1.03, i, text, va="center", fontsize=small, color=INK)
    kept.set_xlim(0, 1.38)
    kept.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    kept.set_title("weights kept" if masked else "output channels kept", fontsize=10, color=INK, loc="left")

    work.barh(y, [row.share for row in layers], height=0.72, color=INK)
    top = max([row.share for row in layers], default=1.0) or 1.0
    for i, row in enumerate(layers):
        text = f"{100 * row.share:.1f} %  ({format_number(row.bops)})"
        work.text(row.share + 0.02 * top, i, text, va="center", fontsize=small, color=INK)
    work.set_xlim(0, 1.75 * top)
    work.set_xticks([])  # each bar has its number beside it
    work.spines["bottom"].set_visible(False)
    work.set_title("share of the BOPs", fontsize=10, color=INK, loc="left")
    for axes in (bits, kept, work):
        style_axes(axes)
        axes.tick_params(axis="y", length=0)
    bits.grid(True, axis="x", color="#D8D8D8", lw=0.6)
    return figure


def _title(result: Result, config: Config) -> str:
    now = result.compressed
    what = f"{config.task.model} on {config.task.data}, {result.method}"
    metric = format_metric(result.task, now.accuracy if result.final else result.held_out["compressed"])
    split = "" if result.final else " (held-out)"
    return f"{what}: {result.task.metric_name} {metric}{split} at {format_percent(now.bops_share)} of the fp32 BOPs"


def style_axes(axes: Axes) -> None:
    """Style of a panel: no box, and the grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK)
