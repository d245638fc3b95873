"""The heat map of a sensitivity table: layers from input to output, blocks of weights, inputs and kept channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jpq.allocation.measured.table import SensitivityTable
from jpq.results.formatting import shorten
from jpq.results.plots import INK

DECADES = 5.0  # that the colour scale shows, from the largest divergence down
MARKED = 5  # largest entries of each block that get a frame
EIGHTHS = tuple(n / 8 for n in range(8, 0, -1))  # shares of a site's units, the columns of its block


@dataclass(frozen=True)
class Block:
    """Columns of one kind: the divergences of every row, nan where there is none."""

    title: str
    columns: Sequence[str]
    values: npt.NDArray[np.float64]  # [rows, columns]


def draw_sensitivity(table: SensitivityTable, layers: Sequence[str], title: str, unit: str = "nats") -> Figure:
    """Heat map of a table on a logarithmic scale; the largest entries of each block are framed.

    Args:
        table: as measured.
        layers: the rows, from the input to the output; sites that no layer is named after follow them.
        title: above the picture.
        unit: of the divergence.
    """
    measured = {layer for layer, _ in table.bits}
    rows = [name for name in layers if name in measured] + [site for site in table.units if site not in measured]
    blocks = [block for block in _blocks(table, rows) if block.columns]
    largest = max((float(np.nanmax(b.values)) for b in blocks if np.isfinite(b.values).any()), default=1.0)
    norm = LogNorm(max(largest, 1e-12) * 10**-DECADES, max(largest, 1e-12))
    height = 1.9 + len(rows) * (0.27 if len(rows) <= 40 else 0.165)
    figure = Figure(figsize=(3.6 + 0.42 * sum(len(b.columns) for b in blocks), height), layout="constrained")
    figure.suptitle(title, fontsize=11, color=INK)
    widths = [len(block.columns) for block in blocks]
    panels = figure.subplots(1, len(blocks), sharey=True, width_ratios=widths, squeeze=False)[0]
    small = 8.5 if len(rows) <= 40 else 6.5
    for axes, block in zip(panels, blocks, strict=True):
        image = axes.imshow(
            np.clip(block.values, norm.vmin, None), norm=norm, cmap="magma_r", aspect="auto", interpolation="nearest"
        )
        axes.set_title(block.title, fontsize=9.5, color=INK)
        axes.set_xticks(range(len(block.columns)), block.columns, fontsize=small)
        axes.set_facecolor("#EDEDED")
        axes.tick_params(length=0, colors=INK)
        axes.spines[:].set_visible(False)
        _mark_largest(axes, block)
    panels[0].set_yticks(range(len(rows)), [shorten(name) for name in rows], fontsize=small)
    bar = figure.colorbar(image, ax=list(panels), fraction=0.03, pad=0.01, extend="min")
    bar.set_label(f"divergence from the float model, {unit}", fontsize=9, color=INK)
    figure.supxlabel(f"framed: the {MARKED} largest of each block; grey: not there", fontsize=8, color=INK)
    return figure


def _blocks(table: SensitivityTable, rows: Sequence[str]) -> list[Block]:
    """The three blocks of columns."""
    found = []
    for side, title in (("w", "weights, bits"), ("a", "inputs, bits")):
        by_name = {layer: row for (layer, s), row in table.bits.items() if s == side}
        widths = sorted({b for row in by_name.values() for b in row}, reverse=True)
        values = [[by_name.get(name, {}).get(b, math.nan) for b in widths] for name in rows]
        found.append(Block(title, [str(b) for b in widths], np.array(values, float).reshape(len(rows), len(widths))))
    if table.units:
        values = [_by_share(table.units.get(name, {}), len(table.orders.get(name, ()))) for name in rows]
        shares = [f"{100 * share:.0f}" for share in EIGHTHS]
        found.append(Block("channels kept, %", shares, np.array(values, float)))
    return found


def _by_share(row: Mapping[int, float], units: int) -> list[float]:
    """The divergences of a site at the shares of EIGHTHS: of the measured count that is nearest, within a sixteenth."""
    values = []
    for share in EIGHTHS:
        near = min(row, key=lambda count: abs(count / units - share), default=0)
        values.append(row[near] if row and abs(near / units - share) <= 1 / 16 else math.nan)
    return values


def _mark_largest(axes: Axes, block: Block) -> None:
    """Frame the largest entries of a block, one for each row at most."""
    best = np.where(np.isfinite(block.values), block.values, -np.inf)
    columns = best.argmax(1)
    tops = best[np.arange(len(best)), columns]
    for row in np.argsort(-tops, kind="stable")[:MARKED]:
        if tops[row] > 0:
            corner = columns[row] - 0.5, row - 0.5
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#00A2FF", lw=2, zorder=3))
