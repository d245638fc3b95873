"""Whole fronts at the same number of training epochs: one run down the budgets, separate runs, baselines, searches.

    python studies/fronts.py digits                     # convnet, 40 epochs for a front, three seeds
    python studies/fronts.py fashion_mnist --data-root DIR
    python studies/fronts.py resnet20 --data-root DIR --weights resnet20-12fca82f.th

For every way and seed a front of held-out accuracy against bit-operations is made of the same number of training
epochs in all (the float model's excluded):

    one run     djpq, one `jpq optimize --target-bops 4%,2%,1%,0.5%`
    separate    djpq, a run for each budget
    uniform     uniform bits with training in the loop, a run for each budget
    two-stage   channels by L1 first, then bits, a run for each budget
    random      `jpq study --sampler random` over densities and bits of each block, a few epochs a trial
    tpe         the same with --sampler tpe

No run reads its test split. When a front is there, the models on it by held-out accuracy are measured on the test
split, once, and the hypervolume is given on both. What costs less than the smallest budget counts there as if it cost
that much: searches may go lower, and a decade of useless models is no better front. A row per model in
results/front_NAME.csv; a way and seed that is there is skipped. Measured on two shared x86-64 cores in November 2026:
three seeds on the digits, one on the others; README's table has the hypervolumes.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import budgets
import methods
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from support.figures import plain_log_ticks, save_figure
from support.grid import EpochPrinter, with_float_weights
from support.result_rows import RESULTS, append_row, provenance, read_rows

import jpq
from jpq.results.front import RunPoint, hypervolume_of, non_dominated, read_point, to_objectives
from jpq.tasks import CLASSIFICATION, Batches, read_data
from jpq.training import all_phases

STYLES = {
    "one run": ("#0072B2", "-"),
    "separate": ("#56B4E9", "--"),
    "uniform": ("#E69F00", "-"),
    "two-stage": ("#009E73", "-"),
    "random": ("#999999", ":"),
    "tpe": ("#CC79A7", ":"),
}
LabelledFolders = Iterator[tuple[str, Path]]  # (label of a model, its run folder)


@dataclass(frozen=True)
class EpochPlan:
    """Number of epochs of each way to a front: `each` for every budget, the same total for a search."""

    budgets: tuple[str, ...] = ("4%", "2%", "1%", "0.5%")
    each: int = 10
    trial: int = 4  # epochs of a search's trial

    @property
    def total(self) -> int:
        """Epochs of every way."""
        return self.each * len(self.budgets)

    def one_run(self, config: jpq.Config) -> jpq.Config:
        """A run down the budgets with the largest --epochs that train no more than `total` in all."""
        config = replace(config, budget=replace(config.budget, target_bops=",".join(self.budgets)))
        for epochs in range(self.total, 0, -1):
            candidate = replace(config, train=replace(config.train, epochs=epochs))
            phases = all_phases(candidate, jpq.METHODS["djpq"])
            if sum(p.epochs for p in phases if p.name != "float") <= self.total:
                return candidate
        raise ValueError("too few epochs")


@dataclass(frozen=True)
class FrontStudy:
    """One data set and network of this study, and its CSV `results/front_NAME.csv`."""

    name: str
    title: str
    base: jpq.Config
    plan: EpochPlan
    seeds: Sequence[int] = (0,)

    @property
    def path(self) -> Path:
        """The CSV file."""
        return RESULTS / f"front_{self.name}.csv"


def digits() -> FrontStudy:
    """The built-in job, three seeds."""
    title = "convnet on digits (8x8): 40 epochs for a front"
    return FrontStudy("digits", title, jpq.Config(), EpochPlan(), (0, 1, 2))


def fashion_mnist() -> FrontStudy:
    """ResNet8 on Fashion-MNIST, 10,000 training images."""
    title = "ResNet8 on Fashion-MNIST: 16 epochs for a front"
    return FrontStudy("fashion_mnist", title, methods.BASE, EpochPlan(each=4, trial=2))


def resnet20() -> FrontStudy:
    """ResNet20 on CIFAR-10 from public weights, 5,000 training images."""
    base = budgets.RESNET20
    base = replace(base, task=replace(base.task, limit=5_000), train=replace(base.train, search=0.5))
    title = "ResNet20 on CIFAR-10, 5,000 training images: 12 epochs for a front"
    return FrontStudy("resnet20", title, base, EpochPlan(each=3, trial=2))


STUDIES: dict[str, Callable[[], FrontStudy]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "resnet20": resnet20,
}


def one_run(config: jpq.Config, plan: EpochPlan) -> LabelledFolders:
    """djpq down the budgets."""
    result = jpq.optimize(plan.one_run(config), EpochPrinter(), final=False)
    for record in result.front:
        yield record.budget, result.folder.parent / record.folder


def separate_runs(config: jpq.Config, plan: EpochPlan, method: str) -> LabelledFolders:
    """A run for each budget; budgets that a method cannot meet are printed and left out."""
    for budget in plan.budgets:
        run_config = replace(
            config,
            train=replace(config.train, epochs=plan.each),
            budget=replace(config.budget, target_bops=budget),
            decide=replace(config.decide, method=method),
        )
        try:
            yield budget, jpq.optimize(run_config, EpochPrinter(), final=False).folder
        except jpq.JpqError as error:
            print(f"  {method} {budget}: {error}", flush=True)


def search_trials(config: jpq.Config, plan: EpochPlan, sampler: str) -> LabelledFolders:
    """Trials of a study over densities and bits of each block, without its uniform anchors and early stops."""
    settings = jpq.Study(
        name=sampler, trials=plan.total // plan.trial, sampler=sampler, per="block", anchors=False, early_stop=False
    )
    study = jpq.study(replace(config, train=replace(config.train, epochs=plan.trial)), settings)
    for trial in study.trials:
        if "run_folder" in trial.user_attrs and trial.values is not None:
            yield f"trial {trial.number}", config.run.out / sampler / trial.user_attrs["run_folder"]


WAYS: dict[str, Callable[[jpq.Config, EpochPlan], LabelledFolders]] = {
    "one run": one_run,
    "separate": partial(separate_runs, method="djpq"),
    "uniform": partial(separate_runs, method="uniform"),
    "two-stage": partial(separate_runs, method="two-stage"),
    "random": partial(search_trials, sampler="random"),
    "tpe": partial(search_trials, sampler="tpe"),
}


def front_rows(way: str, config: jpq.Config, plan: EpochPlan, command: str) -> list[dict[str, object]]:
    """A row per model of one way, with test accuracies of those on the front."""
    start = time.perf_counter()
    labelled = [(label, read_point(folder)) for label, folder in WAYS[way](config, plan)]
    seconds = time.perf_counter() - start
    points = [point for _, point in labelled]
    on_front = non_dominated(to_objectives([p.accuracy for p in points], [p.share("bops") for p in points]))
    test = read_data(config, torch.device("cpu")).test
    return [
        {
            "model": config.task.model,
            "data": config.task.data,
            "way": way,
            "seed": config.run.seed,
            "point": label,
            "front": bool(is_on_front),
            "accuracy": round(test_accuracy(point, test), 4) if is_on_front else "",
            "held_out": round(point.accuracy, 4),
            "float_held_out": round(point.float_accuracy or 0, 4),
            "bops_share": round(point.share("bops"), 7),
            "size_bytes": int(point.costs["size"]),
            "epochs": plan.total,
            "chance": points[0].chance,
            "least": min(float(budget.rstrip("%")) for budget in plan.budgets) / 100,
            "seconds": round(seconds, 1),
            **provenance(command),
        }
        for (label, point), is_on_front in zip(labelled, on_front, strict=True)
    ]


def test_accuracy(point: RunPoint, batches: Batches) -> float:
    """Accuracy of a saved model on the test split."""
    assert point.folder is not None
    return CLASSIFICATION.evaluate(jpq.load(point.folder)[0], batches)


def hypervolumes(table: pd.DataFrame) -> pd.DataFrame:
    """Hypervolume of each front, a row per way and seed: `test` of the models that were chosen, `held_out` of all."""
    rows = []
    for (epochs, way, seed), front in table.groupby(["epochs", "way", "seed"]):
        volumes = {
            split: hypervolume_of(
                list(accuracies),
                list(front.bops_share[accuracies.index].clip(lower=front.least.iloc[0])),
                chance=front.chance.iloc[0],
            )
            for split, accuracies in (("test", front[front.front].accuracy), ("held_out", front.held_out))
        }
        rows.append({"epochs": epochs, "way": way, "seed": seed, **volumes, "seconds": front.seconds.iloc[0]})
    return pd.DataFrame(rows)


def draw_fronts(path: Path, title: str) -> None:
    """Picture of each way's front: test accuracy of the models that held-out accuracy chose, against BOPs."""
    table = pd.read_csv(path)
    volume = hypervolumes(table).groupby("way").test.mean()
    figure = Figure(figsize=(8.2, 5), layout="constrained")
    axes = figure.subplots()
    for way in STYLES:
        runs = table[(table.way == way) & table.front]
        if len(runs):
            _draw_way(axes, way, runs, f"{way} (hypervolume {volume[way]:.3f})")
    axes.set(xscale="log", xlabel="BOPs, % of fp32", ylabel="test accuracy of the front's models, %", title=title)
    axes.axvline(100 * table.least.iloc[0], color="#999999", lw=0.8, ls="--")
    axes.set_xlim(60 * table.least.iloc[0], 110 * table.bops_share[table.front].max())
    plain_log_ticks(axes, [0.5, 1, 2, 4])
    axes.set_ylim(100 * table[table.front].accuracy.quantile(0.1) - 3, 100 * table.accuracy.max() + 1)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    save_figure(figure, path)


def _draw_way(axes: Axes, way: str, runs: pd.DataFrame, label: str) -> None:
    """One line per seed in the way's colour; the first has the label."""
    colour, style = STYLES[way]
    for i, (_, front) in enumerate(runs.groupby("seed")):
        front = front.sort_values("bops_share")
        axes.plot(
            100 * front.bops_share,
            100 * front.accuracy,
            style,
            marker="o",
            ms=4,
            lw=1,
            color=colour,
            label=None if i else label,
        )


def hypervolume_table() -> str:
    """README's table: the hypervolume of each way's front, a column per data set."""
    tables = [pd.read_csv(path) for path in sorted(RESULTS.glob("front_*.csv"))]
    heads = [f"{t.model.iloc[0]}, {t.data.iloc[0]}, {t.epochs.iloc[0]} epochs" for t in tables]
    lines = [f"| way | {' | '.join(heads)} |", "|---|" + "---|" * len(tables)]
    volumes = [hypervolumes(table).groupby("way").test for table in tables]
    for way in WAYS:
        cells = [f"{v.mean()[way]:.3f} (n={v.size()[way]})" if way in v.groups else "-" for v in volumes]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            "Hypervolume on the test split of the models that held-out accuracy chose, down to a budget of 0.5 % (four "
            "budgets from 4 %). one run: `djpq` down the budgets; separate: a `djpq` run for each; random and tpe: "
            "`jpq study --per block`. A model at 0.5 % that is always right would cover 2.07. ResNet8: 10,000 training "
            "images, ResNet20: 5,000, whose few steps a search of channels and bits pays for. "
            "`python studies/fronts.py digits`, `python studies/fronts.py fashion_mnist`, "
            "`python studies/fronts.py resnet20`.",
            "",
        ]
    )


def run_fronts(study: FrontStudy, argv: Sequence[str] | None = None) -> None:
    """The command line of one front study: run what is missing, print the hypervolumes, draw."""
    args = _parser(study).parse_args(argv)
    logging.disable(logging.WARNING)
    plan = replace(study.plan, each=args.each, trial=args.trial)
    for seed in args.seeds if not args.plot else ():
        for way in args.ways:
            known = read_rows(study.path, ["way", "seed", "epochs"])
            if ((known.way == way) & (known.seed == seed) & (known.epochs == plan.total)).any():
                continue
            print(f"front_{study.name}: {way}, seed {seed}, {plan.total} epochs", flush=True)
            _run_way(study, args, way, seed, plan)
    means = hypervolumes(pd.read_csv(study.path)).groupby(["epochs", "way"])[["test", "held_out", "seconds"]]
    print(means.agg(["mean", "min", "max"]).round(3).to_string())
    draw_fronts(study.path, study.title)


def _parser(study: FrontStudy) -> argparse.ArgumentParser:
    """The flags of a front study, with the study's own values as defaults."""
    parser = argparse.ArgumentParser(
        prog=f"fronts.py {study.name}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(study.seeds))
    parser.add_argument("--each", type=int, default=study.plan.each, help="epochs for each budget")
    parser.add_argument("--trial", type=int, default=study.plan.trial, help="epochs of a search's trial")
    parser.add_argument("--data-root", type=Path, default=study.base.task.data_root)
    parser.add_argument("--weights", type=Path, default=study.base.task.weights)
    parser.add_argument("--plot", action="store_true", help="only draw what is there")
    return parser


def _run_way(study: FrontStudy, args: argparse.Namespace, way: str, seed: int, plan: EpochPlan) -> None:
    """Run one way with one seed in a temporary folder, and append its rows."""
    with tempfile.TemporaryDirectory() as folder:
        task = replace(study.base.task, data_root=args.data_root, weights=args.weights)
        run = replace(study.base.run, seed=seed, out=Path(folder), threads=1)
        config = replace(study.base, task=task, run=run)
        config = with_float_weights(config, Path("runs") / f"front_{study.name}" / f"float-{seed}.safetensors")
        flags = ["--ways", way, "--seeds", str(seed), "--each", str(plan.each), "--trial", str(plan.trial)]
        command = shlex.join(["python", "studies/fronts.py", study.name, *flags])
        for row in front_rows(way, config, plan, command):
            append_row(study.path, row)


def main() -> None:
    """Run the study that the first argument names; the rest are its flags."""
    if len(sys.argv) < 2 or sys.argv[1] not in STUDIES:
        print(f"{__doc__}\nfirst argument: one of {', '.join(STUDIES)}; then --help shows its flags")
        raise SystemExit(0 if sys.argv[1:] == ["--help"] else 2)
    run_fronts(STUDIES[sys.argv[1]](), sys.argv[2:])


if __name__ == "__main__":
    main()
