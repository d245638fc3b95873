"""Run a grid of methods, targets and seeds; one CSV line per run as it ends, then a picture of them all.

Shared by the study scripts beside it: each says what is compared and calls `main`. Lines are appended, so several
processes may work on one grid at the same time (give each its own --methods, --targets or --seeds); a run whose line
is already there is skipped. `--plot` only draws.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import jpq
from jpq.config import Budget, Decide
from jpq.results.record import Result
from jpq.training.epochs import split_epochs
from jpq.training.history import EpochRecord, NullObserver

RESULTS = Path(__file__).parent / "results"
COLOURS = {"djpq": "#0072B2", "djpq-pow2": "#009E73", "l0": "#CC79A7", "uniform": "#E69F00"}
KEY = ["method", "target", "seed", "epochs", "search_epochs"]


class Print(NullObserver):
    """One line per epoch."""

    def epoch(self, row: EpochRecord) -> None:
        print(
            f"  {row.phase} {row.epoch}/{row.epochs} loss {row.loss:.3f} held-out {row.accuracy:.2%} "
            f"BOPs {row.bops_share:.3%} kept {row.kept:.0%} {row.seconds:.0f} s",
            flush=True,
        )


def line(result: Result, config: jpq.Config, command: str) -> dict[str, object]:
    """One run as a row."""
    layers = result.layers
    verified = result.verified["rebuilt_vs_onnxruntime"]
    return {
        "model": config.task.model,
        "data": config.task.data,
        "method": result.method,
        "target": config.budget.target_bops,
        "seed": result.seed,
        "epochs": config.train.epochs,
        "search_epochs": sum(r.phase == "search" for r in result.history),
        "bit_lr": config.decide.bit_lr,
        "float_accuracy": round(result.float.accuracy, 4),
        "accuracy": round(result.compressed.accuracy, 4),
        "bops_share": round(result.compressed.bops_share, 7),
        "target_used": round(result.targets["bops"]["used"], 4),
        "bops": result.compressed.bops,
        "bops_structured": result.compressed.bops_structured,
        "macs": result.compressed.macs,
        "size_bytes": result.compressed.size_bytes,
        "packed_bytes": result.packed["layers"],
        "w_bits_mean": round(statistics.mean(x.w_bits for x in layers), 2),
        "a_bits_mean": round(statistics.mean(x.a_bits for x in layers), 2),
        "density": round(sum(x.macs for x in layers) / max(1, sum(x.macs / x.density for x in layers)), 4),
        "channels_kept": round(sum(x.outputs for x in layers) / sum(x.outputs_all for x in layers), 3),
        "masked_vs_rebuilt": result.verified["masked_vs_rebuilt_float64"],
        "onnx_argmax_agreement": verified["argmax_agreement"],
        "onnx_boundary_images": verified["at_a_rounding_boundary"],
        "onnx_optimised_agreement": result.verified["rebuilt_vs_onnxruntime_optimised"]["argmax_agreement"],
        "test_images": verified["images"],
        "seconds": result.seconds["total"],
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "command": command,
    }


def hardware() -> str:
    """What the run ran on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, shared"


def append(path: Path, row: dict[str, object]) -> None:
    """Add one line (and the header to a new file; lines of before a column was added leave it empty)."""
    if path.exists() and path.stat().st_size:
        table = pd.read_csv(path, dtype=str)
        if list(table) != list(row):
            table = pd.concat([table, pd.DataFrame([row])])
            table[[*row, *(c for c in table if c not in row)]].to_csv(path, index=False)
            return
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if path.stat().st_size == 0:
            writer.writeheader()
        writer.writerow(row)


def done(path: Path) -> set[tuple[str, ...]]:
    """Which runs have their line already."""
    if not path.exists():
        return set()
    table = pd.read_csv(path, dtype=str)
    return {tuple(row) for row in table[KEY].itertuples(index=False)}


def picture(path: Path, title: str) -> None:
    """Accuracy against BOPs, a line per method through the means of its seeds, a dot per run."""
    table = pd.read_csv(path)
    last = table.groupby("method").search_epochs.last().to_dict()
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for (method, epochs, searched), runs in table.groupby(["method", "epochs", "search_epochs"]):
        colour = COLOURS.get(str(method), "#555555")
        label = f"{method}, {epochs} epochs" + (f" ({searched} of search)" if searched else "")
        style = "-" if searched == last.get(method, searched) else ":"
        axes.scatter(100 * runs.bops_share, 100 * runs.accuracy, s=16, color=colour, alpha=0.5)
        means = runs.groupby("target")[["bops_share", "accuracy"]].mean().sort_values("bops_share")
        axes.plot(100 * means.bops_share, 100 * means.accuracy, marker="o", linestyle=style, color=colour, label=label)
    axes.axhline(
        100 * table.float_accuracy.mean(), color="#555555", linestyle="--", linewidth=1, label="float model (mean)"
    )
    axes.set(xscale="log", xlabel="BOPs, % of fp32", ylabel="test accuracy, %", title=title)
    axes.set_xticks(sorted({round(100 * s, 2) for s in table.groupby("target").bops_share.mean()}))
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axes.xaxis.set_minor_formatter(lambda v, _: "")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    FigureCanvasAgg(figure)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def with_float_weights(config: jpq.Config, path: Path) -> jpq.Config:
    """The config with the float weights at `path`, which are trained here where they are not there yet."""
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            short = replace(
                config,
                budget=Budget(target_bops="10%"),
                decide=Decide(method="uniform"),
                train=replace(config.train, epochs=2),
                run=replace(config.run, out=Path(folder)),
            )
            result = jpq.optimize(short, Print())
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(result.folder / "float.safetensors", path)
    return replace(config, task=replace(config.task, weights=path))


def main(
    name: str,
    title: str,
    base: jpq.Config,
    methods: list[str],
    wanted: list[str],
    seeds: list[int],
    prepare: Callable[[jpq.Config], jpq.Config] = lambda config: config,
    draw: Callable[[Path, str], None] = picture,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """The command line of a study: runs what is missing, prints the table of means, draws.

    `prepare` may change what all runs share (train float weights once) before the first that is missing. `variants`
    give names to settings of `Decide`; other names are methods.
    """
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=methods)
    parser.add_argument("--targets", nargs="+", default=wanted)
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds)
    parser.add_argument("--epochs", type=int, default=base.train.epochs)
    parser.add_argument("--data-root", type=Path, default=base.task.data_root)
    parser.add_argument("--weights", type=Path, default=base.task.weights)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", action="store_true", help="only draw what is there")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    path = RESULTS / f"{name}.csv"
    for seed in args.seeds if not args.plot else []:
        for target in args.targets:
            for method in args.methods:
                chosen = {"method": method} if variants is None else variants[method]
                train = replace(base.train, epochs=args.epochs)
                searched = split_epochs(replace(base, train=train), jpq.METHODS[chosen["method"]])[0]
                if (method, target, str(seed), str(args.epochs), str(searched)) in done(path):
                    continue
                print(f"{name}: {method} {target} seed {seed}", flush=True)
                with tempfile.TemporaryDirectory() as folder:
                    task = replace(base.task, data_root=args.data_root, weights=args.weights)
                    config = replace(
                        prepare(replace(base, task=task)),
                        budget=replace(base.budget, target_bops=target),
                        decide=replace(base.decide, **chosen),
                        train=train,
                        run=replace(base.run, seed=seed, out=Path(folder), threads=args.threads),
                    )
                    own = f"--methods {method} --targets {shlex.quote(target)} --seeds {seed} --epochs {args.epochs}"
                    command = f"python studies/{name}.py {own}"
                    try:
                        result = jpq.optimize(config, Print(), command)
                        append(path, line(result, config, command) | {"method": method})
                    except jpq.JpqError as error:  # such as uniform bits at a budget below 2 bits everywhere
                        print(f"  not possible: {error}", flush=True)
    table = pd.read_csv(path)
    means = table.groupby(["target", "method", "epochs", "search_epochs"]).agg(
        n=("accuracy", "size"),
        accuracy=("accuracy", "mean"),
        least=("accuracy", "min"),
        bops_share=("bops_share", "mean"),
    )
    print(f"float {table.float_accuracy.mean():.4f}\n{means.round(5).to_string()}")
    draw(path, title)
