"""Allocators of channels and bits on one network at equal budgets.

    python studies/allocation.py --data-root DIR
    python studies/allocation.py --latency [--seeds 0 1 2]      # at an equal latency, on digits; a minute a seed

Two-stage runs (channels by one score, then bits) that differ in the allocator alone: same score, same float weights,
same epochs, same target for bit-operations. ResNet8 on Fashion-MNIST with 10,000 training images, as studies/methods.py
has it; `djpq`, which learns both, beside them. The accuracies are of the 10,000 test images, read once per run;
allocators that measure do so on held-out images, and `seconds` counts what that takes. Two shared x86-64 cores,
November 2026, n = 1 or 2: no allocator is clearly better than `uniform`, and `threshold` is worse (82.3 % at 0.5 %).

With --latency the target is time: 120 % of what the float model takes (all layers as int8 take 170 % on the machine
that was used, where int8 is slower than float for so small a network), by a table that is measured first. Bits cost no
time there, so the allocators differ in channels alone. Writes results/allocation_latency.csv.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from methods import BASE, with_shared_weights
from support.figures import plain_log_ticks, save_figure
from support.grid import Grid, run_grid
from support.result_rows import RESULTS, provenance

import jpq
from jpq.allocation import ALLOCATORS
from jpq.config import Budget, Decide, Run, Train

LATENCY_TARGET = "120%"
SCORE = "taylor"
VARIANTS = {name: {"method": "two-stage", "allocator": name, "score": SCORE} for name in ALLOCATORS}
VARIANTS["djpq"] = {"method": "djpq"}


def draw_allocators(path: Path, title: str) -> None:
    """Picture of accuracy against bit-operations through the means of the seeds, and of the seconds of a run."""
    table = pd.read_csv(path)
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    figure.suptitle(title)
    quality, time = figure.subplots(1, 2, width_ratios=[3, 2])
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for i, name in enumerate(name for name in VARIANTS if name in set(table.method)):
        runs = table[table.method == name]
        means = runs.groupby("target")[["bops_share", "accuracy"]].mean().sort_values("bops_share")
        quality.plot(100 * means.bops_share, 100 * means.accuracy, marker="o", color=colours[i], label=name)
        quality.scatter(100 * runs.bops_share, 100 * runs.accuracy, s=10, color=colours[i], alpha=0.5)
        time.barh(name, runs.seconds.median(), color=colours[i])
    quality.axhline(100 * table.float_accuracy.mean(), color="#555555", linestyle=":", label="float")
    quality.set(xscale="log", xlabel="BOPs, % of fp32", ylabel="test accuracy, % (mean over seeds)")
    plain_log_ticks(quality, sorted(float(text.rstrip("%")) for text in set(table.target)))
    quality.grid(alpha=0.3)
    quality.legend(frameon=False, fontsize=9)
    time.set(xlabel="seconds of a whole run (median)")
    time.invert_yaxis()
    save_figure(figure, path)


def run_at_equal_latency(seeds: Sequence[int]) -> None:
    """Every allocator under one latency target: convnet on digits, a row per run."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        latency_table = Path(folder) / "convnet.csv"
        bench = [sys.executable, "-m", "jpq", "bench", "--model", "convnet", "--table", str(latency_table)]
        if subprocess.run(bench).returncode:
            raise SystemExit("The layers could not be measured.")
        for seed in seeds:
            for name in VARIANTS:
                config = jpq.Config(
                    budget=Budget(target_latency=LATENCY_TARGET, latency_table=latency_table),
                    decide=replace(Decide(), **VARIANTS[name]),
                    train=Train(epochs=20, float_epochs=20),
                    run=Run(seed=seed, out=Path(folder) / "runs", threads=1),
                )
                rows.append(_latency_row(name, seed, jpq.optimize(config)))
                print(name, seed, rows[-1]["accuracy"], rows[-1]["channels_kept"], flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(RESULTS / "allocation_latency.csv", index=False)
    print(table.groupby("method", sort=False)[["accuracy", "predicted_ms", "measured_ms", "target_used"]].mean())


def _latency_row(name: str, seed: int, result: jpq.results.Result) -> dict[str, object]:
    """One run under a latency target as a row."""
    return {
        "model": "convnet",
        "data": "digits",
        "method": name,
        "target": f"latency {LATENCY_TARGET}",
        "seed": seed,
        "float_accuracy": round(result.float.accuracy, 4),
        "accuracy": round(result.compressed.accuracy, 4),
        "predicted_ms": round(result.compressed.latency_ms, 5),
        "float_ms": round(result.float.latency_ms, 5),
        "measured_ms": round(result.latency["measured_ms"], 5),
        "target_used": round(result.targets["latency"]["used"], 4),
        "bops_share": round(result.compressed.bops_share, 6),
        "channels_kept": " ".join(f"{x.outputs}/{x.outputs_all}" for x in result.layers),
        "seconds": round(result.seconds["total"], 1),
        **provenance(f"python studies/allocation.py --latency --seeds {seed}", threads=1),
    }


GRID = Grid(
    "allocation",
    "allocation.py",
    "Two-stage, ResNet8 on Fashion-MNIST: what the allocator changes",
    BASE,
    list(VARIANTS),
    targets=["1%", "0.5%", "0.3%"],
    seeds=[0, 1],
    prepare=with_shared_weights,
    draw=draw_allocators,
    variants=VARIANTS,
)


def main() -> None:
    """The grid at equal BOPs, or with --latency the runs at equal latency."""
    if "--latency" not in sys.argv:
        run_grid(GRID)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    run_at_equal_latency(parser.parse_args().seeds)


if __name__ == "__main__":
    main()
