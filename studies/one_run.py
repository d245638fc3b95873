"""One run down several budgets (`--target-bops 2%,1%,0.5%,0.25%`) beside a separate run for each, at equal settings.

    python studies/one_run.py --seeds 0 1 2
    python studies/one_run.py --fashion --seeds 0 --data-root DIR

Both start from the same float weights, whose training is not counted. Seconds are processor time, since other jobs
share the machine. Test split, two shared x86-64 cores, November 2026: on the digits (n = 3) and with LeNet-5 on 2,000
images of Fashion-MNIST (n = 1); README's table has the accuracies and seconds.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from support.figures import save_figure
from support.grid import EpochPrinter, with_float_weights
from support.result_rows import RESULTS, append_row, provenance, read_rows

import jpq
from jpq.config import Budget, Run, Task, Train
from jpq.methods import compose_method
from jpq.training import all_phases

PATH = RESULTS / "one_run.csv"
BUDGETS = ("2%", "1%", "0.5%", "0.25%")
FASHION_MNIST = jpq.Config(
    task=Task(model="lenet5", data="fashion-mnist", limit=2000), train=Train(epochs=8, float_epochs=8, batch_size=64)
)
TWICE = "one run, twice the epochs"
SEPARATE = "separate runs"
COLOURS = {"one run": "#0072B2", TWICE: "#009E73", SEPARATE: "#E69F00"}
KEY = ["data", "kind", "seed"]


@dataclass
class FineTuneClock(EpochPrinter):
    """Observer that notes the processor time at the end of each fine-tuning; the rest is equal for all kinds."""

    start: float = field(default_factory=time.process_time)
    seconds: list[float] = field(default_factory=list)

    def phase(self, name: str, epochs: int, steps: int) -> None:
        if not epochs:
            self.seconds.append(time.process_time() - self.start)


def front_rows(base: jpq.Config, kind: str, command: str) -> list[dict[str, object]]:
    """One kind of front, a row for each budget; `seconds` is what was spent until its model was there."""
    clock, rows = FineTuneClock(), []
    for text in BUDGETS if kind == SEPARATE else [",".join(BUDGETS)]:
        result = jpq.optimize(replace(base, budget=Budget(target_bops=text)), clock)
        figures = [(p.budget, p.accuracy, p.held_out, p.bops_share) for p in result.front]
        if not figures:
            model = result.compressed
            figures = [(text, model.accuracy, result.held_out["compressed"], model.bops_share)]
        times = clock.seconds[-len(figures) :]
        for (budget, accuracy, held_out, share), seconds in zip(figures, times, strict=True):
            rows.append(
                {
                    "model": base.task.model,
                    "data": base.task.data,
                    "kind": kind,
                    "target": budget,
                    "seed": base.run.seed,
                    "epochs": base.train.epochs,
                    "trained": count_epochs(base, kind),
                    "float_accuracy": round(result.float.accuracy, 4),
                    "accuracy": round(accuracy, 4),
                    "held_out": round(held_out, 4),
                    "bops_share": round(share, 7),
                    "seconds": round(seconds, 1),
                    **provenance(command),
                }
            )
    return rows


def count_epochs(base: jpq.Config, kind: str) -> int:
    """Epochs of search and fine-tuning for the whole front."""
    runs, text = (len(BUDGETS), BUDGETS[0]) if kind == SEPARATE else (1, ",".join(BUDGETS))
    phases = all_phases(replace(base, budget=Budget(target_bops=text)), compose_method(base.decide.method))
    return runs * sum(p.epochs for p in phases if p.name != "float")


def one_run_table() -> str:
    """README's tables: accuracies, epochs and seconds of each kind, a table per data set."""
    lines = []
    for data, runs in pd.read_csv(PATH).groupby("data", sort=False):
        targets = list(dict.fromkeys(runs.target))
        lines += ["| " + " | ".join(["", *(f"% right at {t}" for t in targets), "epochs", "seconds"]) + " |"]
        lines += ["|" + "---|" * (len(targets) + 3)]
        lines += [_table_row(str(kind), of_kind, targets) for kind, of_kind in runs.groupby("kind", sort=False)]
        lines += [
            "",
            f"{runs.model.iloc[0]} on {data}, n = {runs.seed.nunique()}, the same float weights "
            f"({100 * runs.float_accuracy.mean():.2f} % right), test split, epochs and processor seconds of the whole "
            f"front without the float model; {runs.hardware.iloc[0]} (`python studies/one_run.py`).",
            "",
        ]
    return "\n".join(lines)


def _table_row(kind: str, runs: pd.DataFrame, targets: list[str]) -> str:
    """One kind: means over seeds, with their ends where there are several."""
    accuracies = runs.groupby("target").accuracy
    several = len(runs) > len(accuracies)
    low, mean, high = accuracies.min(), accuracies.mean(), accuracies.max()
    cells = [f"{100 * mean[t]:.2f}" + several * f" ({100 * low[t]:.2f} to {100 * high[t]:.2f})" for t in targets]
    seconds = runs.groupby("seed").seconds.max().mean()
    return "| " + " | ".join([kind, *cells, str(runs.trained.iloc[0]), f"{seconds:.0f}"]) + " |"


def draw_fronts() -> None:
    """Picture of the accuracy at each budget, a panel for each data set; seconds in the legend."""
    table = pd.read_csv(PATH)
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels = figure.subplots(1, table.data.nunique(), squeeze=False)[0]
    for axes, (data, runs) in zip(panels, table.groupby("data", sort=False), strict=True):
        _draw_panel(axes, str(data), runs)
    panels[0].set_ylabel("test accuracy, %")
    save_figure(figure, PATH)


def _draw_panel(axes: Axes, data: str, table: pd.DataFrame) -> None:
    """Accuracy against BOPs of each kind on one data set."""
    for kind, colour in COLOURS.items():
        runs = table[table.kind == kind]
        if runs.empty:
            continue
        seconds = runs.groupby("seed").seconds.max().mean()
        axes.scatter(100 * runs.bops_share, 100 * runs.accuracy, s=16, color=colour, alpha=0.5)
        means = runs.groupby("target")[["bops_share", "accuracy"]].mean().sort_values("bops_share")
        label = f"{kind}, {runs.trained.iloc[0]} epochs, {seconds:.0f} s"
        axes.plot(100 * means.bops_share, 100 * means.accuracy, marker="o", color=colour, label=label)
    axes.axhline(100 * table.float_accuracy.mean(), color="#555555", ls="--", lw=1, label="float model")
    title = f"{table.model.iloc[0]} on {data}, n = {table.seed.nunique()}"
    axes.set(xscale="log", xlabel="BOPs, % of fp32", title=title)
    axes.set_xticks([2, 1, 0.5, 0.25], ["2", "1", "0.5", "0.25"])
    axes.xaxis.set_minor_formatter(lambda v, _: "")
    axes.grid(alpha=0.3)
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.35 * (high - low), high)  # room for the legend
    axes.legend(frameon=False, loc="lower right")


def main() -> None:
    """Run what is missing, print the means, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", action="store_true")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=list(COLOURS))
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--plot", action="store_true", help="only draw what is there")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    base = FASHION_MNIST if args.fashion else jpq.Config()
    known = read_rows(PATH, KEY)[KEY].drop_duplicates()
    for seed in args.seeds if not args.plot else []:
        for kind in args.kinds:
            if [base.task.data, kind, seed] not in known.to_numpy().tolist():
                _run_kind(base, kind, seed, args)
    table = pd.read_csv(PATH)
    means = table.groupby(["data", "target", "kind"])[["accuracy", "seconds"]].agg(["mean", "min", "max", "size"])
    print(means.to_string())
    draw_fronts()


def _run_kind(base: jpq.Config, kind: str, seed: int, args: argparse.Namespace) -> None:
    """Run one kind with one seed in a temporary folder, and append its rows."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(seed=seed, out=Path(folder), threads=1, device="cpu")
        config = replace(base, task=replace(base.task, data_root=args.data_root), run=run)
        weights = Path(tempfile.gettempdir()) / f"jpq_one_run_{base.task.data}_{seed}.safetensors"
        config = with_float_weights(config, weights)
        if kind == TWICE:
            config = replace(config, train=replace(config.train, epochs=2 * config.train.epochs))
        command = f"python studies/one_run.py{' --fashion' if args.fashion else ''} --seeds {seed}"
        for row in front_rows(config, kind, command):
            append_row(PATH, row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
