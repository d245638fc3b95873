"""Search of density and bits per layer by TPE, NSGA-II or random draws, beside uniform bits and djpq: hypervolumes.

    python studies/samplers.py                        # digits, convnet: minutes on one core
    python studies/samplers.py --model lenet5 --data fashion-mnist --limit 6000 --data-root DATA

Every search has the same number of trials and epochs, the same float weights, one density and two widths for each
layer, neither anchors nor early stops. `uniform` is W2A2 to W8A8 with every channel, `djpq` a run for each budget, both
with as many epochs for each model as a trial has. Accuracies are held-out: a search looks at nothing else, and the
test split stays unread. A row per model in results/search_NAME.csv; the hypervolume is accuracy above chance x decades
of BOPs (`jpq.results.front.hypervolume_of`), where models below the smallest of djpq's budgets count as if
they cost that much, and `of_djpq` its share of djpq's with the same seed. Digits, two seeds, two shared x86-64 cores,
November 2026: searches of 40 trials of 4 epochs 2.34, djpq 2.33 in an eighth of the epochs, uniform 2.14.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from support.figures import plain_log_ticks, save_figure
from support.grid import with_float_weights
from support.result_rows import RESULTS, append_row, provenance, read_rows

import jpq
from jpq.config import Budget, Decide, Run, Task, Train
from jpq.results import Result
from jpq.results.front import hypervolume_of, non_dominated, to_objectives

WIDTHS = (8, 6, 5, 4, 3, 2)
BUDGETS = ("4%", "2%", "1%", "0.5%", "0.25%")
LEAST = 0.0025  # the smallest of them
STYLES = {
    "tpe": "#CC79A7",
    "nsga2": "#009E73",
    "gp": "#56B4E9",
    "random": "#999999",
    "uniform": "#E69F00",
    "djpq": "#0072B2",
}


@dataclass(frozen=True)
class Model:
    """One model of a front: where it comes from, held-out accuracy, share of the float model's BOPs."""

    label: str
    held_out: float
    bops_share: float


def search_models(config: jpq.Config, sampler: str, trials: int) -> Iterator[Model]:
    """The models of a study's trials; repeated decisions once."""
    settings = jpq.Study(sampler, trials, sampler, anchors=False, early_stop=False, pictures=False)
    for trial in jpq.study(config, settings).trials:
        if trial.values is not None and "same_as" not in trial.user_attrs:
            yield Model(f"trial {trial.number}", trial.user_attrs["held_out"], trial.user_attrs["bops_share"])


def uniform_models(config: jpq.Config) -> Iterator[Model]:
    """A model with every channel for each width."""
    for bits in WIDTHS:
        manual = replace(config, decide=Decide(bits=f"{bits}/{bits}"))
        yield _model(f"W{bits}A{bits}", jpq.optimize(manual, final=False))


def djpq_models(config: jpq.Config) -> Iterator[Model]:
    """A run of djpq for each budget."""
    for budget in BUDGETS:
        yield _model(budget, jpq.optimize(replace(config, budget=Budget(target_bops=budget)), final=False))


def models_of(way: str, config: jpq.Config, trials: int) -> list[Model]:
    """All models of one way."""
    if way == "uniform":
        return list(uniform_models(config))
    return list(djpq_models(config) if way == "djpq" else search_models(config, way, trials))


def draw_fronts(path: Path, title: str) -> None:
    """Picture of each way's front by seed: held-out accuracy against BOPs."""
    table = pd.read_csv(path)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for way, colour in STYLES.items():
        runs = table[table.way == way]
        volume = runs.groupby("seed").hypervolume.first().mean()
        for i, (_, front) in enumerate(runs[runs.front].groupby("seed")):
            front = front.sort_values("bops_share")
            axes.plot(
                100 * front.bops_share,
                100 * front.held_out,
                marker="o",
                ms=4,
                color=colour,
                label=None if i else f"{way}: hypervolume {volume:.3f}, n = {runs.seed.nunique()}",
                ls=":" if i else "-",
            )
    axes.set(xscale="log", xlabel="BOPs, % of fp32", ylabel="held-out accuracy, %", title=title)
    plain_log_ticks(axes, [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5) if t >= 100 * table.bops_share.min() * 0.9])
    axes.set_ylim(max(0, 100 * table[table.front].held_out.quantile(0.1) - 5), 100.5)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    save_figure(figure, path)


def main() -> None:
    """Run what is missing, print the hypervolumes, draw."""
    args = _arguments()
    logging.disable(logging.WARNING)
    name = f"search_{args.data.replace('-', '_')}"
    path = RESULTS / f"{name}.csv"
    for seed in args.seeds if not args.plot else []:
        for way in args.ways:
            known = read_rows(path, ["way", "seed"])
            if not ((known.way == way) & (known.seed == seed)).any():
                _run_way(path, name, args, way, seed)
    table = pd.read_csv(path).groupby(["way", "seed"])[["hypervolume", "models", "epochs"]].first()
    print(table.groupby("way").agg(["mean", "min", "max"]).round(3).to_string())
    draw_fronts(path, f"{args.model} on {args.data}: {args.trials} trials of {args.epochs} epochs")


def _model(label: str, result: Result) -> Model:
    """The figures of a run."""
    return Model(label, result.held_out["compressed"], result.compressed.bops_share)


def _arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="convnet")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--ways", nargs="+", choices=STYLES, default=["djpq", "uniform", "tpe", "nsga2", "random"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--plot", action="store_true", help="only draw what is there")
    return parser.parse_args()


def _run_way(path: Path, name: str, args: argparse.Namespace, way: str, seed: int) -> None:
    """Run one way with one seed in a temporary folder, and append its rows."""
    with tempfile.TemporaryDirectory() as folder:
        task = Task(args.model, data=args.data, data_root=args.data_root, limit=args.limit)
        run = Run(seed=seed, out=Path(folder), threads=1)
        config = jpq.Config(task, train=Train(epochs=args.epochs, lr=3e-3), run=run)
        config = with_float_weights(config, Path("runs") / name / f"float-{seed}.safetensors")
        models = models_of(way, config, args.trials)
    accuracies, shares = [m.held_out for m in models], [m.bops_share for m in models]
    volume = hypervolume_of(accuracies, [max(s, LEAST) for s in shares], chance=0.1)
    known = read_rows(path, ["way", "seed", "hypervolume"])
    djpq_volume = known[(known.way == "djpq") & (known.seed == seed)].hypervolume
    flags = ["--model", args.model, "--data", args.data, "--trials", str(args.trials), "--epochs", str(args.epochs)]
    flags += ["--limit", str(args.limit)] if args.limit else []
    command = shlex.join(["python", "studies/samplers.py", *flags, "--ways", way, "--seeds", str(seed)])
    on_front = non_dominated(to_objectives(accuracies, shares))
    for model, is_on_front in zip(models, on_front, strict=True):
        row = {
            "model": args.model,
            "data": args.data,
            "way": way,
            "seed": seed,
            "point": model.label,
            "front": bool(is_on_front),
            "held_out": round(model.held_out, 4),
            "bops_share": round(model.bops_share, 7),
            "hypervolume": round(volume, 4),
            "of_djpq": round(volume / djpq_volume.iloc[0], 3) if len(djpq_volume) else "",
            "models": len(models),
            "epochs": args.epochs * len(models),
            **provenance(command),
        }
        append_row(path, row)
    print(f"{name} {way} seed {seed}: hypervolume {volume:.4f} of {len(models)} models", flush=True)


if __name__ == "__main__":
    main()
