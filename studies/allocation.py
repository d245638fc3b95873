"""How much stays where: the allocators, in channels and in bits, on one network at equal budgets.

    python studies/allocation.py --data-root DIR
    python studies/allocation.py --latency [--seeds 0 1 2]      # at an equal latency, on digits; a minute a seed

Two-stage runs (channels by one score, then bits) that differ in the allocator alone: same score, same float weights,
same epochs, same target for bit-operations. ResNet8 on Fashion-MNIST with 10,000 training images, as studies/methods.py
has it; `djpq`, which learns both, beside them. The accuracies are of the 10,000 test images, read once per run;
allocators that measure do so on held-out images, and `seconds` counts what that takes.

With --latency the target is time: 120 % of what the float model takes (all layers as int8 take 170 % on the machine
that was used, where int8 is slower than float for so small a network), by a table that is measured first. Bits cost no
time there, so the allocators differ in channels alone. Writes results/allocation_latency.csv.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import grid
import matplotlib
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from methods import BASE, prepare

import jpq
from jpq.allocation.allocators import ALLOCATORS
from jpq.cli.main import main as cli
from jpq.config import Budget, Decide, Run, Train

LIMIT = "120%"
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


def at_equal_latency(seeds):
    """Every allocator under one target for latency: convnet on digits, a row per run."""
    path = grid.RESULTS / "allocation_latency.csv"
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "convnet.csv"
        if cli(["bench", "--model", "convnet", "--table", str(table)]):
            raise SystemExit("The layers could not be measured.")
        rows = []
        for seed in seeds:
            for name, chosen in VARIANTS.items():
                config = jpq.Config(
                    budget=Budget(target_latency=LIMIT, latency_table=table),
                    decide=replace(Decide(), **chosen),
                    train=Train(epochs=20, float_epochs=20),
                    run=Run(seed=seed, out=Path(folder) / "runs", threads=1),
                )
                result = jpq.optimize(config)
                now, full = result.compressed, result.float
                rows.append(
                    {
                        "model": "convnet",
                        "data": "digits",
                        "method": name,
                        "target": f"latency {LIMIT}",
                        "seed": seed,
                        "float_accuracy": round(full.accuracy, 4),
                        "accuracy": round(now.accuracy, 4),
                        "predicted_ms": round(now.latency_ms, 5),
                        "float_ms": round(full.latency_ms, 5),
                        "measured_ms": round(result.latency["measured_ms"], 5),
                        "target_used": round(result.targets["latency"]["used"], 4),
                        "bops_share": round(now.bops_share, 6),
                        "channels_kept": " ".join(f"{x.outputs}/{x.outputs_all}" for x in result.layers),
                        "seconds": round(result.seconds["total"], 1),
                        "n": 1,
                        "threads": 1,
                        "hardware": grid.hardware(),
                        "torch": torch.__version__,
                        "command": f"python studies/allocation.py --latency --seeds {seed}",
                    }
                )
                print(name, seed, rows[-1]["accuracy"], rows[-1]["channels_kept"], flush=True)
    found = pd.DataFrame(rows)
    found.to_csv(path, index=False)
    print(found.groupby("method", sort=False)[["accuracy", "predicted_ms", "measured_ms", "target_used"]].mean())


if __name__ == "__main__":
    if "--latency" in sys.argv:
        at_equal_latency([int(text) for text in sys.argv if text.isdigit()] or [0])
    else:
        grid.main(
            "allocation",
            "Two-stage, ResNet8 on Fashion-MNIST: what the allocator changes",
            BASE,
            list(VARIANTS),
            ["1%", "0.5%", "0.3%"],
            [0, 1],
            prepare,
            draw,
            VARIANTS,
        )
