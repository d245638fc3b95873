"""How much stays where: the allocators, in channels and in bits, on one network at equal budgets.

    python studies/allocation.py --data-root DIR

Two-stage runs (channels by one score, then bits) that differ in the allocator alone: same score, same float weights,
same epochs, same target for bit-operations. ResNet8 on Fashion-MNIST with 10,000 training images, as studies/methods.py
has it; `djpq`, which learns both, beside them. The accuracies are of the 10,000 test images, read once per run;
allocators that measure do so on held-out images, and `seconds` counts what that takes.
"""

import grid
import matplotlib
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from methods import BASE, prepare

from jpq.allocators import ALLOCATORS

SCORE = "taylor"
VARIANTS = {name: {"method": "two-stage", "allocator": name, "score": SCORE} for name in ALLOCATORS}
VARIANTS["djpq"] = {"method": "djpq"}


def draw(path, title):
    """Accuracy against bit-operations through the means of the seeds, and what a run took."""
    table = pd.read_csv(path)
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    figure.suptitle(title)
    quality, time = figure.subplots(1, 2, width_ratios=[3, 2])
    colours = matplotlib.colormaps["tab10"].colors
    names = [name for name in VARIANTS if name in set(table.method)]
    for i, name in enumerate(names):
        runs = table[table.method == name]
        means = runs.groupby("target")[["bops_share", "accuracy"]].mean().sort_values("bops_share")
        quality.plot(100 * means.bops_share, 100 * means.accuracy, marker="o", color=colours[i], label=name)
        quality.scatter(100 * runs.bops_share, 100 * runs.accuracy, s=10, color=colours[i], alpha=0.5)
        time.barh(name, runs.seconds.median(), color=colours[i])
    quality.axhline(100 * table.float_accuracy.mean(), color="#555555", linestyle=":", label="float")
    quality.set(xscale="log", xlabel="BOPs, % of fp32", ylabel="test accuracy, % (mean over seeds)")
    quality.set_xticks(sorted(float(text.rstrip("%")) for text in set(table.target)))
    quality.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    quality.xaxis.set_minor_formatter(lambda v, _: "")
    quality.grid(alpha=0.3)
    quality.legend(frameon=False, fontsize=9)
    time.set(xlabel="seconds of a whole run (median)")
    time.invert_yaxis()
    FigureCanvasAgg(figure)
    figure.savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    grid.main(
        "allocation", "Two-stage, ResNet8 on Fashion-MNIST: what the allocator changes", BASE, list(VARIANTS),
        ["1%", "0.5%", "0.3%"], [0, 1], prepare, draw, VARIANTS,
    )  # fmt: skip
