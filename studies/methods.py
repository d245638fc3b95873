"""Every method on one network, at equal budgets: ResNet8 on Fashion-MNIST, 10,000 training images, a few epochs.

    python studies/methods.py --data-root DIR

All runs start from the same float weights (trained once, in this script, and kept in runs/methods) and have the same
epochs, batches and learning rates. Methods that are told how many weights stay keep half of them. Bit-operations count
density: `bops_structured` says what hardware pays that cannot skip zeros that lie anywhere. The accuracies are of the
10,000 test images, read once per run. Two shared x86-64 cores, November 2026, n = 1 or 2: float 85.9 %, djpq 86.1 % at
1 % of the BOPs. At 1 % and at 0.5 % most joint methods keep all channels, so such rows compare bits alone.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from support.figures import plain_log_ticks, save_figure
from support.grid import Grid, run_grid, with_float_weights

import jpq
from jpq.config import Task, Train

WEIGHTS = Path("runs/methods/resnet8-fashion-mnist.safetensors")
BASE = jpq.Config(
    task=Task(model="resnet8", data="fashion-mnist", limit=10_000),
    train=Train(epochs=6, search=0.5, float_epochs=10, batch_size=100, lr=2e-3),
)
METHODS = [name for name in jpq.METHODS if name != "upscale"]  # which is not trained: studies/unconstrained.py
BASELINES = ("uniform", "two-stage")  # drawn with dashed lines


with_shared_weights = partial(with_float_weights, path=WEIGHTS)  # those of all runs


def sort_by_cost(means: pd.DataFrame, column: str) -> pd.DataFrame:
    """The means in the order of a cost; of equal costs the best first."""
    return means.sort_values([column, "accuracy"], ascending=[True, False])


def draw_methods(path: Path, title: str) -> None:
    """Picture of accuracy against bit-operations and against bytes, a line per method through its seeds' means."""
    table = pd.read_csv(path)
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 2, sharey=True)
    _draw_panel(panels[0], table, "bops_share", 100, "BOPs, % of fp32")
    _draw_panel(panels[1], table, "size_bytes", 1e-3, "size, KB")
    panels[0].set_ylabel("test accuracy, % (mean over seeds)")
    plain_log_ticks(panels[0], sorted(float(text.rstrip("%")) for text in set(table.target)))
    panels[1].xaxis.set_minor_formatter(lambda v, _: f"{v:g}")
    panels[1].xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    save_figure(figure, path)


def _draw_panel(axes: Axes, table: pd.DataFrame, column: str, scale: float, label: str) -> None:
    """Accuracy against one cost: the methods, the means that no other dominates, the float model."""
    colours: Sequence[object] = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    for i, name in enumerate(dict.fromkeys(table.method)):
        means = table[table.method == name].groupby("target")[[column, "accuracy"]].mean().sort_values(column)
        if name in BASELINES:
            style = {"linestyle": "--", "color": "#222222" if name == "uniform" else "#888888", "linewidth": 2}
        else:
            style = {"linestyle": "-", "color": colours[i % 20], "linewidth": 1.2}
        marker = "os"[i // 20]  # squares where the colours begin anew
        axes.plot(scale * means[column], 100 * means.accuracy, marker=marker, markersize=4, label=name, **style)
    points = sort_by_cost(table.groupby(["method", "target"])[[column, "accuracy"]].mean(), column)
    front = points[points.accuracy > points.accuracy.cummax().shift(fill_value=0)]
    axes.plot(
        scale * front[column],
        100 * front.accuracy,
        drawstyle="steps-post",
        color="#000000",
        linewidth=0.8,
        alpha=0.6,
        label="not dominated",
    )
    axes.axhline(100 * table.float_accuracy.mean(), color="#555555", linestyle=":", linewidth=1, label="float")
    axes.set(xscale="log", xlabel=label)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    run_grid(
        Grid(
            "methods",
            "methods.py",
            "ResNet8 on Fashion-MNIST, 10,000 images, 6 epochs",
            BASE,
            METHODS,
            targets=["1%", "0.5%"],
            seeds=[0, 1],
            prepare=with_shared_weights,
            draw=draw_methods,
        )
    )
