"""A grid of methods, targets and seeds: one run of `jpq.optimize` and one CSV row per cell, then a picture.

Study scripts describe a `Grid` and call `run_grid`. Rows are appended, so several processes may work on one grid at
the same time (give each its own --methods, --targets or --seeds); a run whose row is already there is skipped.
`--plot` only draws.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import jpq
from jpq.config import Budget, Decide
from jpq.results import Result, format_metric, format_percent
from jpq.tasks import CLASSIFICATION, Task
from jpq.training import EpochRecord, NullObserver, split_epochs
from support.figures import plain_log_ticks, save_figure
from support.result_rows import RESULTS, append_row, provenance

COLOURS = {"djpq": "#0072B2", "djpq-pow2": "#009E73", "l0": "#CC79A7", "uniform": "#E69F00"}
KEY = ["method", "target", "seed", "epochs", "search_epochs"]


class EpochPrinter(NullObserver):
    """Observer of a run that prints one line per epoch, with the metric as the run's task writes it."""

    task: Task = CLASSIFICATION

    def begin(self, task: Task) -> None:
        self.task = task

    def epoch(self, record: EpochRecord) -> None:
        metric = f"{self.task.metric_name} {format_metric(self.task, record.accuracy)}"
        print(
            f"  {record.phase} {record.epoch}/{record.epochs} loss {record.loss:.3f} "
            f"held-out {metric} BOPs {format_percent(record.bops_share)} kept {format_percent(record.kept)} "
            f"{record.seconds:.0f} s",
            flush=True,
        )


def draw_accuracy(path: Path, title: str) -> None:
    """Picture of test accuracy against BOPs: a line per method through the means of its seeds, a dot per run."""
    table = pd.read_csv(path)
    latest = table.groupby("method").search_epochs.last().to_dict()
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for (method, epochs, search_epochs), runs in table.groupby(["method", "epochs", "search_epochs"]):
        colour = COLOURS.get(str(method), "#555555")
        label = f"{method}, {epochs} epochs" + (f" ({search_epochs} of search)" if search_epochs else "")
        style = "-" if search_epochs == latest.get(method, search_epochs) else ":"
        axes.scatter(100 * runs.bops_share, 100 * runs.accuracy, s=16, color=colour, alpha=0.5)
        means = runs.groupby("target")[["bops_share", "accuracy"]].mean().sort_values("bops_share")
        axes.plot(100 * means.bops_share, 100 * means.accuracy, marker="o", linestyle=style, color=colour, label=label)
    axes.axhline(
        100 * table.float_accuracy.mean(), color="#555555", linestyle="--", linewidth=1, label="float model (mean)"
    )
    axes.set(xscale="log", xlabel="BOPs, % of fp32", ylabel="test accuracy, %", title=title)
    plain_log_ticks(axes, sorted({round(100 * s, 2) for s in table.groupby("target").bops_share.mean()}))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, path)


def keep_config(config: jpq.Config) -> jpq.Config:
    """The config as it is: nothing has to be prepared before the runs of a grid."""
    return config


@dataclass(frozen=True)
class Grid:
    """One study: settings that all its runs share, and the methods, targets and seeds that differ.

    `prepare` may change what all runs share (train float weights once) before the first run that is missing.
    `variants` gives names to settings of `Decide`; a name that is not in it is a method.
    """

    name: str  # of results/NAME.csv
    script: str  # what follows `python studies/` in the command of a row
    title: str
    base: jpq.Config
    methods: Sequence[str]
    targets: Sequence[str]
    seeds: Sequence[int]
    prepare: Callable[[jpq.Config], jpq.Config] = keep_config
    draw: Callable[[Path, str], None] = draw_accuracy
    variants: Mapping[str, Mapping[str, Any]] | None = None

    @property
    def path(self) -> Path:
        """The CSV file."""
        return RESULTS / f"{self.name}.csv"

    def decide(self, method: str) -> Decide:
        """The decision settings of a method or variant."""
        return replace(self.base.decide, **(self.variants or {}).get(method, {"method": method}))


def run_grid(grid: Grid, argv: Sequence[str] | None = None) -> None:
    """The command line of a grid: run what is missing, print the table of means, draw."""
    args = _parser(grid).parse_args(argv)
    logging.disable(logging.WARNING)
    for method, target, seed in _missing(grid, args) if not args.plot else ():
        print(f"{grid.name}: {method} {target} seed {seed}", flush=True)
        try:
            append_row(grid.path, _run_cell(grid, args, method, target, seed))
        except jpq.JpqError as error:  # such as uniform bits at a budget below 2 bits everywhere
            print(f"  not possible: {error}", flush=True)
    _print_means(grid.path)
    grid.draw(grid.path, grid.title)


def run_row(result: Result, config: jpq.Config, command: str) -> dict[str, object]:
    """One finished run as a CSV row."""
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
        "channels_kept": channels_kept(result),
        "masked_vs_rebuilt": result.verified["masked_vs_rebuilt_float64"],
        "onnx_argmax_agreement": verified["argmax_agreement"],
        "onnx_boundary_images": verified["at_a_rounding_boundary"],
        "onnx_optimised_agreement": result.verified["rebuilt_vs_onnxruntime_optimised"]["argmax_agreement"],
        "test_images": verified["images"],
        "seconds": result.seconds["total"],
        **provenance(command),
    }


def channels_kept(result: Result) -> float:
    """Share of the layers' output channels that a run kept."""
    return round(sum(x.outputs for x in result.layers) / sum(x.outputs_all for x in result.layers), 3)


def with_float_weights(config: jpq.Config, path: Path) -> jpq.Config:
    """The config with its own float weights, else with those at `path`, trained here where they are not there yet."""
    if config.task.weights is not None:
        return config
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            short = replace(
                config,
                budget=Budget(target_bops="10%"),
                decide=Decide(method="uniform"),
                train=replace(config.train, epochs=2),
                run=replace(config.run, out=Path(folder)),
            )
            result = jpq.optimize(short, EpochPrinter())
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(result.folder / "float.safetensors", path)
    return replace(config, task=replace(config.task, weights=path))


def _parser(grid: Grid) -> argparse.ArgumentParser:
    """The flags of a grid, with the grid's own values as defaults."""
    parser = argparse.ArgumentParser(
        prog=grid.script,
        description=sys.modules["__main__"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--methods", nargs="+", default=list(grid.methods))
    parser.add_argument("--targets", nargs="+", default=list(grid.targets))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(grid.seeds))
    parser.add_argument("--epochs", type=int, default=grid.base.train.epochs)
    parser.add_argument("--data-root", type=Path, default=grid.base.task.data_root)
    parser.add_argument("--weights", type=Path, default=grid.base.task.weights)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", action="store_true", help="only draw what is there")
    return parser


def _missing(grid: Grid, args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Method, target and seed of every cell whose row is not there; looked up anew before each, as others may write."""
    train = replace(grid.base.train, epochs=args.epochs)
    for seed, target, method in product(args.seeds, args.targets, args.methods):
        decide = grid.decide(method)
        by_hand = decide.bits and decide.method != "measured"
        search_epochs = 0 if by_hand else split_epochs(replace(grid.base, train=train), jpq.METHODS[decide.method])[0]
        if (method, target, str(seed), str(args.epochs), str(search_epochs)) not in _known_keys(grid.path):
            yield method, target, seed


def _known_keys(path: Path) -> set[tuple[str, ...]]:
    """The keys of the rows that are there already."""
    if not path.exists():
        return set()
    table = pd.read_csv(path, dtype=str)
    return {tuple(row) for row in table[KEY].itertuples(index=False)}


def _run_cell(grid: Grid, args: argparse.Namespace, method: str, target: str, seed: int) -> dict[str, object]:
    """Run one cell of the grid in a temporary folder; its row."""
    with tempfile.TemporaryDirectory() as folder:
        base = grid.base
        config = replace(
            grid.prepare(replace(base, task=replace(base.task, data_root=args.data_root, weights=args.weights))),
            budget=replace(base.budget, target_bops=target),
            decide=grid.decide(method),
            train=replace(base.train, epochs=args.epochs),
            run=replace(base.run, seed=seed, out=Path(folder), threads=args.threads),
        )
        flags = f"--methods {shlex.quote(method)} --targets {shlex.quote(target)} --seeds {seed} --epochs {args.epochs}"
        command = f"python studies/{grid.script} {flags}"
        result = jpq.optimize(config, EpochPrinter(), command)
        return run_row(result, config, command) | {"method": method}


def _print_means(path: Path) -> None:
    """The means over seeds, on the screen."""
    table = pd.read_csv(path)
    means = table.groupby(["target", "method", "epochs", "search_epochs"]).agg(
        n=("accuracy", "size"),
        accuracy=("accuracy", "mean"),
        least=("accuracy", "min"),
        bops_share=("bops_share", "mean"),
    )
    print(f"float {table.float_accuracy.mean():.4f}\n{means.round(5).to_string()}")
