"""Every method on one network, at equal budgets: ResNet8 on Fashion-MNIST, 10,000 training images, a few epochs.

    python studies/methods.py --data-root DIR

All runs start from the same float weights (trained once, in this script, and kept in runs/methods) and have the same
epochs, batches and learning rates. Methods that are told how many weights stay keep half of them. Bit-operations count
density: `bops_structured` says what hardware pays that cannot skip zeros that lie anywhere. The accuracies are of the
10,000 test images, read once per run.
"""

from pathlib import Path

import grid
import matplotlib
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import jpq
from jpq.config import Task, Train

WEIGHTS = Path("runs/methods/resnet8-fashion-mnist.safetensors")
BASE = jpq.Config(
    task=Task(model="resnet8", data="fashion-mnist", limit=10_000),
    train=Train(epochs=6, search=0.5, float_epochs=10, batch_size=100, lr=2e-3),
)
METHODS = [name for name in jpq.METHODS if name != "upscale"]  # which is not trained: studies/unconstrained.py
PLAIN = ("uniform", "two-stage")


def prepare(config: jpq.Config) -> jpq.Config:
    """The config with the float weights that all runs share."""
    return config if config.task.weights else grid.with_float_weights(config, WEIGHTS)


def by_cost(means: pd.DataFrame, column: str) -> pd.DataFrame:
    """The means in the order of a cost; of equal costs the best first."""
    return means.sort_values([column, "accuracy"], ascending=[True, False])


def draw(path: Path, title: str) -> None:
    """Accuracy against bit-operations and against bytes, a line per method through the means of its seeds."""
    table = pd.read_csv(path)
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(table.method))
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    for axes, column, label in zip(panels, ("bops_share", "size_bytes"), ("BOPs, % of fp32", "size, KB"), strict=True):
        scale = 100 if column == "bops_share" else 1e-3
        for i, name in enumerate(names):
            runs = table[table.method == name]
            means = runs.groupby("target")[[column, "accuracy"]].mean().sort_values(column)
            style = {"linestyle": "--", "color": "#222222" if name == "uniform" else "#888888", "linewidth": 2}
            style = style if name in PLAIN else {"linestyle": "-", "color": colours[i % 20], "linewidth": 1.2}
            axes.plot(scale * means[column], 100 * means.accuracy, marker="o", markersize=4, label=name, **style)
        points = by_cost(table.groupby(["method", "target"])[[column, "accuracy"]].mean(), column)
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
    panels[0].set_ylabel("test accuracy, % (mean over seeds)")
    ticks = sorted(float(text.rstrip("%")) for text in set(table.target))
    panels[0].set_xticks(ticks)
    panels[0].xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    panels[0].xaxis.set_minor_formatter(lambda v, _: "")
    panels[1].xaxis.set_minor_formatter(lambda v, _: f"{v:g}")
    panels[1].xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    FigureCanvasAgg(figure)
    figure.savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    grid.main(
        "methods",
        "ResNet8 on Fashion-MNIST, 10,000 images, 6 epochs",
        BASE,
        METHODS,
        ["1%", "0.5%"],
        [0, 1],
        prepare,
        draw,
    )
