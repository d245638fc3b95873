"""Which sampler finds the better front of density x bits: TPE, NSGA-II or random draws, beside uniform bits and djpq?

    python studies/search_digits.py                        # digits, convnet: minutes on one core
    python studies/search_digits.py --model lenet5 --data fashion-mnist --limit 6000 --data-root DATA

Every search has the same number of trials and epochs, the same float weights, one density and two widths for each
layer, neither anchors nor early stops. `uniform` is W2A2 to W8A8 with every channel, `djpq` a run for each budget, both
with as many epochs for each model as a trial has. Accuracies are held-out: a search looks at nothing else, and the
test split stays unread. A row per model in results/search_NAME.csv; the hypervolume is accuracy above chance x decades
of BOPs (`jpq.results.front.pareto.hypervolume_of`), where models below the smallest of djpq's budgets count as if
they cost that much, and `of_djpq` its share of djpq's with the same seed.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from grid import RESULTS, append, hardware, with_float_weights
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import jpq
from jpq.config import Budget, Decide, Run, Task, Train
from jpq.results.front import pareto
from jpq.results.record import Result

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
Figures = tuple[float, float]  # held-out accuracy, share of the BOPs


def figures(result: Result) -> Figures:
    return result.held_out["compressed"], result.compressed.bops_share


def searched(config: jpq.Config, sampler: str, trials: int) -> Iterator[tuple[str, Figures]]:
    settings = jpq.Study(sampler, trials, sampler, anchors=False, early_stop=False, pictures=False)
    for trial in jpq.study(config, settings).trials:
        if trial.values is not None and "same_as" not in trial.user_attrs:
            yield f"trial {trial.number}", (trial.user_attrs["held_out"], trial.user_attrs["bops_share"])


def uniform(config: jpq.Config) -> Iterator[tuple[str, Figures]]:
    for bits in WIDTHS:
        said = replace(config, decide=Decide(bits=f"{bits}/{bits}"))
        yield f"W{bits}A{bits}", figures(jpq.optimize(said, final=False))


def djpq(config: jpq.Config) -> Iterator[tuple[str, Figures]]:
    for budget in BUDGETS:
        yield budget, figures(jpq.optimize(replace(config, budget=Budget(target_bops=budget)), final=False))


def picture(path: Path, title: str) -> None:
    """Each way's front by seed, held-out accuracy against BOPs."""
    table = pd.read_csv(path)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for way, colour in STYLES.items():
        runs = table[table.way == way]
        for i, (_, one) in enumerate(runs[runs.front].groupby("seed")):
            one = one.sort_values("bops_share")
            volume = runs.groupby("seed").hypervolume.first().mean()
            label = f"{way}: hypervolume {volume:.3f}, n = {runs.seed.nunique()}" if i == 0 else None
            axes.plot(
                100 * one.bops_share,
                100 * one.held_out,
                marker="o",
                ms=4,
                color=colour,
                label=label,
                ls=":" if i else "-",
            )
    axes.set(xscale="log", xlabel="BOPs, % of fp32", ylabel="held-out accuracy, %", title=title)
    axes.set_xticks([t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5) if t >= 100 * table.bops_share.min() * 0.9])
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axes.xaxis.set_minor_formatter(lambda v, _: "")
    axes.set_ylim(max(0, 100 * table[table.front].held_out.quantile(0.1) - 5), 100.5)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    FigureCanvasAgg(figure)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main() -> None:
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
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    name = f"search_{args.data.replace('-', '_')}"
    path = RESULTS / f"{name}.csv"
    own = f"python studies/search_digits.py --model {args.model} --data {args.data} --trials {args.trials} --epochs "
    own += f"{args.epochs}" + (f" --limit {args.limit}" if args.limit else "")
    for seed in args.seeds if not args.plot else []:
        for way in args.ways:
            there = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["way", "seed"])
            if ((there.way == way) & (there.seed == seed)).any():
                continue
            with tempfile.TemporaryDirectory() as folder:
                task = Task(args.model, data=args.data, data_root=args.data_root, limit=args.limit)
                config = jpq.Config(
                    task, train=Train(epochs=args.epochs, lr=3e-3), run=Run(seed=seed, out=Path(folder), threads=1)
                )
                config = with_float_weights(config, Path("runs") / name / f"float-{seed}.safetensors")
                ways = {"uniform": uniform, "djpq": djpq}
                found = list(ways[way](config) if way in ways else searched(config, way, args.trials))
            accuracy, shares = (list(column) for column in zip(*(f for _, f in found), strict=True))
            volume = pareto.hypervolume_of(accuracy, [max(s, LEAST) for s in shares], chance=0.1)
            base = there[(there.way == "djpq") & (there.seed == seed)]
            for (label, (right, share)), on in zip(
                found, pareto.non_dominated(pareto.frame(accuracy, shares)), strict=True
            ):
                append(
                    path,
                    {
                        "model": args.model,
                        "data": args.data,
                        "way": way,
                        "seed": seed,
                        "point": label,
                        "front": bool(on),
                        "held_out": round(right, 4),
                        "bops_share": round(share, 7),
                        "hypervolume": round(volume, 4),
                        "of_djpq": round(volume / base.hypervolume.iloc[0], 3) if len(base) else "",
                        "models": len(found),
                        "epochs": args.epochs * len(found),
                        "threads": torch.get_num_threads(),
                        "hardware": hardware(),
                        "torch": torch.__version__,
                        "command": f"{own} --ways {way} --seeds {seed}",
                    },
                )
            print(f"{name} {way} seed {seed}: hypervolume {volume:.4f} of {len(found)} models", flush=True)
    table = pd.read_csv(path).groupby(["way", "seed"])[["hypervolume", "models", "epochs"]].first()
    print(table.groupby("way").agg(["mean", "min", "max"]).round(3).to_string())
    picture(path, f"{args.model} on {args.data}: {args.trials} trials of {args.epochs} epochs")


if __name__ == "__main__":
    main()
