"""One run down several budgets (`--target-bops 2%,1%,0.5%,0.25%`) beside a run of its own for each, at equal settings.

Both start from the same float weights, whose training is not counted. Seconds are processor time, since other jobs
share the machine.

python studies/one_run.py --seeds 0 1 2
python studies/one_run.py --fashion --seeds 0 --data-root DIR
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import grid
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import jpq
from jpq.config import Budget, Run, Task, Train
from jpq.methods.compatibility import compose
from jpq.training.epochs import all_phases

PATH = grid.RESULTS / "one_run.csv"
BUDGETS = ("2%", "1%", "0.5%", "0.25%")
FASHION = jpq.Config(
    task=Task(model="lenet5", data="fashion-mnist", limit=2000), train=Train(epochs=8, float_epochs=8, batch_size=64)
)
TWICE = "one run, twice the epochs"
KINDS = {"one run": "#0072B2", TWICE: "#009E73", "separate runs": "#E69F00"}
KEY = ["data", "kind", "seed"]


class Clock(grid.Print):
    """Notes the processor time when each model is fine-tuned; what follows is the same for both kinds."""

    def __init__(self) -> None:
        self.began = time.process_time()
        self.spent: list[float] = []

    def phase(self, name: str, epochs: int, steps: int) -> None:
        if not epochs:
            self.spent.append(time.process_time() - self.began)


def lines(base: jpq.Config, kind: str, command: str) -> list[dict[str, object]]:
    """One way to a front, a row for each budget; `seconds` is what was spent until its model was there."""
    clock, rows = Clock(), []
    for text in BUDGETS if kind == "separate runs" else [",".join(BUDGETS)]:
        result = jpq.optimize(replace(base, budget=Budget(target_bops=text)), clock)
        one = result.compressed
        found = [(p.budget, p.accuracy, p.held_out, p.bops_share) for p in result.front]
        found = found or [(text, one.accuracy, result.held_out["compressed"], one.bops_share)]
        times = clock.spent[-len(found) :]
        for (budget, accuracy, held_out, share), seconds in zip(found, times, strict=True):
            rows.append(
                {
                    "model": base.task.model,
                    "data": base.task.data,
                    "kind": kind,
                    "target": budget,
                    "seed": base.run.seed,
                    "epochs": base.train.epochs,
                    "trained": trained(base, kind),
                    "float_accuracy": round(result.float.accuracy, 4),
                    "accuracy": round(accuracy, 4),
                    "held_out": round(held_out, 4),
                    "bops_share": round(share, 7),
                    "seconds": round(seconds, 1),
                    "hardware": grid.hardware(),
                    "torch": torch.__version__,
                    "command": command,
                }
            )
    return rows


def trained(base: jpq.Config, kind: str) -> int:
    """Epochs of search and fine-tuning for the whole front."""
    runs, text = (len(BUDGETS), BUDGETS[0]) if kind == "separate runs" else (1, ",".join(BUDGETS))
    every = all_phases(replace(base, budget=Budget(target_bops=text)), compose(base.decide.method))
    return runs * sum(p.epochs for p in every if p.name != "float")


def summary() -> str:
    """One run down several budgets beside a run for each."""
    table = pd.read_csv(PATH)
    lines = []
    for data, runs in table.groupby("data", sort=False):
        targets = list(dict.fromkeys(runs.target))
        lines += ["| " + " | ".join(["", *(f"% right at {t}" for t in targets), "epochs", "seconds"]) + " |"]
        lines += ["|" + "---|" * (len(targets) + 3)]
        for kind, mine in runs.groupby("kind", sort=False):
            by = mine.groupby("target").accuracy
            several = len(mine) > len(by)
            ends = {t: f" ({100 * by.min()[t]:.2f} to {100 * by.max()[t]:.2f})" if several else "" for t in targets}
            cells = [f"{100 * by.mean()[t]:.2f}{ends[t]}" for t in targets]
            seconds = mine.groupby("seed").seconds.max().mean()
            lines += ["| " + " | ".join([kind, *cells, str(mine.trained.iloc[0]), f"{seconds:.0f}"]) + " |"]
        lines += [
            "",
            f"{runs.model.iloc[0]} on {data}, n = {runs.seed.nunique()}, the same float weights "
            f"({100 * runs.float_accuracy.mean():.2f} % right), test split, epochs and processor seconds of the whole "
            f"front without the float model; {runs.hardware.iloc[0]} (`python studies/one_run.py`).",
            "",
        ]
    return "\n".join(lines)


def picture() -> None:
    """Accuracy at each budget, a panel for each data set; seconds in the legend."""
    table = pd.read_csv(PATH)
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels = figure.subplots(1, table.data.nunique(), squeeze=False)[0]
    for axes, (data, runs) in zip(panels, table.groupby("data", sort=False), strict=True):
        for kind, colour in KINDS.items():
            mine = runs[runs.kind == kind]
            if mine.empty:
                continue
            seconds = mine.groupby("seed").seconds.max().mean()
            axes.scatter(100 * mine.bops_share, 100 * mine.accuracy, s=16, color=colour, alpha=0.5)
            means = mine.groupby("target")[["bops_share", "accuracy"]].mean().sort_values("bops_share")
            label = f"{kind}, {mine.trained.iloc[0]} epochs, {seconds:.0f} s"
            axes.plot(100 * means.bops_share, 100 * means.accuracy, marker="o", color=colour, label=label)
        level = 100 * runs.float_accuracy.mean()
        axes.axhline(level, color="#555555", ls="--", lw=1, label="float model")
        title = f"{runs.model.iloc[0]} on {data}, n = {runs.seed.nunique()}"
        axes.set(xscale="log", xlabel="BOPs, % of fp32", title=title)
        axes.set_xticks([2, 1, 0.5, 0.25], ["2", "1", "0.5", "0.25"])
        axes.xaxis.set_minor_formatter(lambda v, _: "")
        axes.grid(alpha=0.3)
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.35 * (high - low), high)  # room for the legend
        axes.legend(frameon=False, loc="lower right")
    panels[0].set_ylabel("test accuracy, %")
    FigureCanvasAgg(figure)
    figure.savefig(PATH.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", action="store_true")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--data-root", type=Path, default=Path("../shared/data"))
    parser.add_argument("--plot", action="store_true", help="only draw what is there")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    base = FASHION if args.fashion else jpq.Config()
    known = pd.read_csv(PATH)[KEY].drop_duplicates() if PATH.exists() else pd.DataFrame(columns=KEY)
    for seed in args.seeds if not args.plot else []:
        for kind in args.kinds:
            if [base.task.data, kind, seed] in known.to_numpy().tolist():
                continue
            with tempfile.TemporaryDirectory() as folder:
                run = Run(seed=seed, out=Path(folder), threads=1, device="cpu")
                config = replace(base, task=replace(base.task, data_root=args.data_root), run=run)
                float_weights = Path(tempfile.gettempdir()) / f"jpq_one_run_{base.task.data}_{seed}.safetensors"
                config = grid.with_float_weights(config, float_weights)
                if kind == TWICE:
                    config = replace(config, train=replace(config.train, epochs=2 * config.train.epochs))
                command = f"python studies/one_run.py{' --fashion' if args.fashion else ''} --seeds {seed}"
                for row in lines(config, kind, command):
                    grid.append(PATH, row)
                    print(row, flush=True)
    table = pd.read_csv(PATH)
    means = table.groupby(["data", "target", "kind"])[["accuracy", "seconds"]].agg(["mean", "min", "max", "size"])
    print(means.to_string())
    picture()
