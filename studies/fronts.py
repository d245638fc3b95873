"""Whole fronts at the same number of epochs: one run down the budgets, separate runs, baselines, and searches.

Shared by the front scripts beside it: each says the task and calls `main`. For every way and seed a front of held-out
accuracy against bit-operations is made of the same number of training epochs in all (the float model's excluded):

    one run     djpq, one `jpq optimize --target-bops 4%,2%,1%,0.5%`
    separate    djpq, a run for each budget
    uniform     uniform bits with training in the loop, a run for each budget
    two-stage   channels by L1 first, then bits, a run for each budget
    random      `jpq study --sampler random` over densities and bits of each block, a few epochs a trial
    tpe         the same with --sampler tpe

No run reads its test split. When a front is there, the models on it by held-out accuracy are measured on the test
split, once, and the hypervolume is given on both. What costs less than the smallest budget counts there as if it cost
that much: searches may go lower, and a decade of useless models is no better front. A row per model in
results/NAME.csv; a way and seed that is there is skipped.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from grid import RESULTS, Print, append, hardware, with_float_weights
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import jpq
from jpq.results.front import pareto
from jpq.results.front.points import RunPoint, point_of
from jpq.tasks.classification import evaluate
from jpq.tasks.load import read_data
from jpq.training.epochs import all_phases

STYLES = {
    "one run": ("#0072B2", "-"),
    "separate": ("#56B4E9", "--"),
    "uniform": ("#E69F00", "-"),
    "two-stage": ("#009E73", "-"),
    "random": ("#999999", ":"),
    "tpe": ("#CC79A7", ":"),
}


@dataclass(frozen=True)
class Plan:
    """How many epochs each way gets: `each` for every budget, or as much in all."""

    budgets: tuple[str, ...] = ("4%", "2%", "1%", "0.5%")
    each: int = 10
    trial: int = 4  # epochs of a trial

    @property
    def total(self) -> int:
        """Epochs of every way."""
        return self.each * len(self.budgets)

    def one_run(self, config: jpq.Config) -> jpq.Config:
        """A run down the budgets with as many --epochs as it may have to train no more than `total` in all."""
        config = replace(config, budget=replace(config.budget, target_bops=",".join(self.budgets)))
        for epochs in range(self.total, 0, -1):
            own = replace(config, train=replace(config.train, epochs=epochs))
            if sum(p.epochs for p in all_phases(own, jpq.METHODS["djpq"]) if p.name != "float") <= self.total:
                return own
        raise ValueError("too few epochs")


def one_run(config: jpq.Config, plan: Plan) -> Iterator[tuple[str, Path]]:
    """djpq down the budgets."""
    result = jpq.optimize(plan.one_run(config), Print(), final=False)
    for point in result.front:
        yield point.budget, result.folder.parent / point.folder


def separate(config: jpq.Config, plan: Plan, method: str) -> Iterator[tuple[str, Path]]:
    """A run for each budget; those that a method cannot meet are said and left out."""
    train = replace(config.train, epochs=plan.each)
    for budget in plan.budgets:
        own = replace(
            config,
            train=train,
            budget=replace(config.budget, target_bops=budget),
            decide=replace(config.decide, method=method),
        )
        try:
            yield budget, jpq.optimize(own, Print(), final=False).folder
        except jpq.JpqError as error:
            print(f"  {method} {budget}: {error}", flush=True)


def searched(config: jpq.Config, plan: Plan, sampler: str) -> Iterator[tuple[str, Path]]:
    """Trials of a study over densities and bits of each block, without its uniform anchors and early stops."""
    settings = jpq.Study(
        name=sampler, trials=plan.total // plan.trial, sampler=sampler, per="block", anchors=False, early_stop=False
    )
    own = replace(config, train=replace(config.train, epochs=plan.trial))
    study = jpq.study(own, settings)
    for trial in study.trials:
        if "run_folder" in trial.user_attrs and trial.values is not None:
            yield f"trial {trial.number}", config.run.out / sampler / trial.user_attrs["run_folder"]


WAYS: dict[str, Callable[[jpq.Config, Plan], Iterator[tuple[str, Path]]]] = {
    "one run": one_run,
    "separate": lambda config, plan: separate(config, plan, "djpq"),
    "uniform": lambda config, plan: separate(config, plan, "uniform"),
    "two-stage": lambda config, plan: separate(config, plan, "two-stage"),
    "random": lambda config, plan: searched(config, plan, "random"),
    "tpe": lambda config, plan: searched(config, plan, "tpe"),
}


def rows(way: str, config: jpq.Config, plan: Plan, command: str) -> list[dict[str, object]]:
    """A row per model of one way, with test accuracies of those on the front."""
    start = time.perf_counter()
    found = [(label, point_of(folder)) for label, folder in WAYS[way](config, plan)]
    seconds = time.perf_counter() - start
    points = [point for _, point in found]
    costs = [p.share("bops") for p in points]
    on = pareto.non_dominated(pareto.frame([p.accuracy for p in points], costs))
    test = read_data(config, torch.device("cpu")).test
    right = [measured(p, test) if front else None for p, front in zip(points, on, strict=True)]
    return [
        {
            "model": config.task.model,
            "data": config.task.data,
            "way": way,
            "seed": config.run.seed,
            "point": label,
            "front": bool(front),
            "accuracy": "" if a is None else round(a, 4),
            "held_out": round(p.accuracy, 4),
            "float_held_out": round(p.float_accuracy or 0, 4),
            "bops_share": round(p.share("bops"), 7),
            "size_bytes": int(p.costs["size"]),
            "epochs": plan.total,
            "chance": points[0].chance,
            "least": min(float(b.rstrip("%")) for b in plan.budgets) / 100,
            "seconds": round(seconds, 1),
            "threads": torch.get_num_threads(),
            "hardware": hardware(),
            "torch": torch.__version__,
            "command": command,
        }
        for (label, p), front, a in zip(found, on, right, strict=True)
    ]


def measured(point: RunPoint, batches: jpq.tasks.data.Batches) -> float:
    """Accuracy of a saved model."""
    assert point.folder is not None
    return evaluate(jpq.load(point.folder)[0], batches)


def volumes(table: pd.DataFrame) -> pd.DataFrame:
    """Hypervolume of each front, a row per way and seed: `test` of the models that were chosen, `held_out` of all."""
    found = []
    for (epochs, way, seed), one in table.groupby(["epochs", "way", "seed"]):
        measured = {"test": one[one.front].accuracy, "held_out": one.held_out}
        row = {
            name: pareto.hypervolume_of(
                list(right), list(one.bops_share[right.index].clip(lower=one.least.iloc[0])), chance=one.chance.iloc[0]
            )
            for name, right in measured.items()
        }
        found.append({"epochs": epochs, "way": way, "seed": seed, **row, "seconds": one.seconds.iloc[0]})
    return pd.DataFrame(found)


def picture(path: Path, title: str) -> None:
    """Each way's front, its seeds in one colour: test accuracy of what held-out accuracy chose, against BOPs."""
    table = pd.read_csv(path)
    volume = volumes(table).groupby("way").test.mean()
    figure = Figure(figsize=(8.2, 5), layout="constrained")
    axes = figure.subplots()
    for way, (colour, style) in STYLES.items():
        runs = table[table.way == way]
        if runs.empty:
            continue
        for i, (_, one) in enumerate(runs[runs.front].groupby("seed")):
            one = one.sort_values("bops_share")
            label = f"{way} (hypervolume {volume[way]:.3f})" if i == 0 else None
            axes.plot(
                100 * one.bops_share, 100 * one.accuracy, style, marker="o", ms=4, lw=1, color=colour, label=label
            )
    axes.set(xscale="log", xlabel="BOPs, % of fp32", ylabel="test accuracy of the front's models, %", title=title)
    axes.axvline(100 * table.least.iloc[0], color="#999999", lw=0.8, ls="--")
    axes.set_xlim(60 * table.least.iloc[0], 110 * table.bops_share[table.front].max())
    axes.set_xticks([0.5, 1, 2, 4])
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axes.xaxis.set_minor_formatter(lambda v, _: "")
    low = table[table.front].accuracy.quantile(0.1)
    axes.set_ylim(100 * low - 3, 100 * table.accuracy.max() + 1)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    FigureCanvasAgg(figure)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def summary() -> str:
    """README's table: the hypervolume of each way's front, by study."""
    tables = {path.stem: pd.read_csv(path) for path in sorted(RESULTS.glob("front_*.csv"))}
    shown = {name: f"{t.model.iloc[0]}, {t.data.iloc[0]}, {t.epochs.iloc[0]} epochs" for name, t in tables.items()}
    lines = [f"| way | {' | '.join(shown.values())} |", "|---|" + "---|" * len(shown)]
    found = {name: volumes(table).groupby("way").test for name, table in tables.items()}
    for way in WAYS:
        cells = [f"{by.mean()[way]:.3f} (n={by.size()[way]})" if way in by.groups else "-" for by in found.values()]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            "Hypervolume on the test split of the models that held-out accuracy chose, down to a budget of 0.5 % (four "
            "budgets from 4 %). one run: `djpq` down the budgets; separate: a `djpq` run for each; random and tpe: "
            "`jpq study --per block`. A model at 0.5 % that is always right would cover 2.07. ResNet8: 10,000 training "
            "images, ResNet20: 5,000, whose few steps a search of channels and bits pays for. "
            "`python studies/front_digits.py`, "
            "`python studies/front_fashion_mnist.py`, `python studies/resnet20_cifar10.py --front`.",
            "",
        ]
    )


def main(name: str, title: str, base: jpq.Config, plan: Plan, seeds: list[int], argv: list[str] | None = None) -> None:
    """The command line of a front study: runs what is missing, prints the hypervolumes, draws."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds)
    parser.add_argument("--each", type=int, default=plan.each, help="epochs for each budget")
    parser.add_argument("--trial", type=int, default=plan.trial, help="epochs of a search's trial")
    parser.add_argument("--data-root", type=Path, default=base.task.data_root)
    parser.add_argument("--weights", type=Path, default=base.task.weights)
    parser.add_argument("--plot", action="store_true", help="only draw what is there")
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    path = RESULTS / f"{name}.csv"
    plan = replace(plan, each=args.each, trial=args.trial)
    for seed in args.seeds if not args.plot else []:
        for way in args.ways:
            there = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["way", "seed", "epochs"])
            if ((there.way == way) & (there.seed == seed) & (there.epochs == plan.total)).any():
                continue
            print(f"{name}: {way}, seed {seed}, {plan.total} epochs", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                task = replace(base.task, data_root=args.data_root, weights=args.weights)
                run = replace(base.run, seed=seed, out=Path(folder), threads=1)
                config = replace(base, task=task, run=run)
                if config.task.weights is None:
                    config = with_float_weights(config, Path("runs") / name / f"float-{seed}.safetensors")
                command = f'python studies/{sys.argv[0].rpartition("/")[2]} --ways "{way}" --seeds {seed}'
                for row in rows(way, config, plan, f"{command} --each {plan.each} --trial {plan.trial}"):
                    append(path, row)
    table = pd.read_csv(path)
    means = volumes(table).groupby(["epochs", "way"])[["test", "held_out", "seconds"]].agg(["mean", "min", "max"])
    print(means.round(3).to_string())
    picture(path, title)
