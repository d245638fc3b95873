"""Which structure for which layer: one scheme everywhere, by rules, by search, at equal budgets.

    python studies/schemes.py

ResNet8 on the digits, ten epochs. All runs start from the same float weights (trained here, kept in runs/schemes), have
the same batches, rates and target of bit-operations, and keep 4 of 9 weights where a mask is: of each layer with admm
and scheme-mapping, of all blocks together with dpf, which takes them where weights are small. Milliseconds are modelled
(jpq/costs/roofline.py), on the densities that training ended with; nothing was timed. Written are schemes.csv (a line
per run), schemes_proxies.csv (what the two proxies of the search say of random mappings, and what training made of
them) and schemes.png. Test images are read once per run, and by no search. `--part proxies` or `--part runs` does one.
"""

from __future__ import annotations

import argparse
import logging
import random
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
from jpq.allocation.structure_rules import milliseconds, variants
from jpq.allocation.structure_search import MappingEvaluator
from jpq.config import Budget, Decide, Task, Train
from jpq.methods.compatibility import compose, is_allowed
from jpq.results.record import Result
from jpq.tasks.load import read_data
from jpq.tasks.models import build, load_weights
from jpq.tracing.network import Network
from jpq.tracing.trace import trace
from jpq.types import DENSE

WEIGHTS = Path("runs/schemes/resnet8-digits.safetensors")
BASE = jpq.Config(
    task=Task(model="resnet8", data="digits"),
    budget=Budget(target_bops="0.5%"),
    decide=Decide(method="dpf", density=4 / 9),
    train=Train(epochs=10, search=0.5, float_epochs=20),
)
CASES = [  # (method, structure, proxy)
    *((method, structure, "") for method in ("admm", "dpf") for structure in ("pattern", "punched:8x8", "block:8x1")),
    *((method, "rules", "") for method in ("admm", "dpf", "scheme-mapping")),
    *((method, "search", "projected") for method in ("admm", "dpf", "scheme-mapping")),
]
RANDOM = 8  # mappings that the proxies are asked about
PATHS = {"runs": grid.RESULTS / "schemes.csv", "proxies": grid.RESULTS / "schemes_proxies.csv"}


def prepared() -> jpq.Config:
    """What all runs share, with float weights."""
    return grid.with_float_weights(BASE, WEIGHTS)


def network() -> Network:
    """Of the model that all runs have."""
    return trace(build("resnet8", 10, 1).eval(), torch.randn(2, 1, 8, 8))


def optimized(
    base: jpq.Config, method: str, structure: str, proxy: str, seed: int, command: str
) -> tuple[Result, jpq.Config]:
    """One run from the shared weights, its folder gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            base,
            decide=replace(base.decide, method=method, structure=structure, proxy=proxy or "projected"),
            run=replace(base.run, seed=seed, out=Path(folder), threads=1),
        )
        return jpq.optimize(config, command=command), config


def modelled(seen: Network, result: Result) -> dict[str, float]:
    """Milliseconds of the run's masks, by the roofline."""
    ms = milliseconds(seen, {r.name: r.structure for r in result.layers}, {r.name: r.density for r in result.layers})
    return {
        "modelled_ms": round(sum(ms.values()), 5),
        "modelled_dense_ms": round(sum(milliseconds(seen, {}, 1.0).values()), 5),
    }


def runs(base: jpq.Config, seeds: list[int]) -> None:
    """A line of schemes.csv for each case and seed that has none."""
    seen, path = network(), PATHS["runs"]
    before = pd.read_csv(path, dtype=str) if path.exists() else pd.DataFrame(columns=["method", "structure", "seed"])
    done = set(zip(before.method, before.structure, before.seed, strict=True))
    for seed in seeds:
        for method, structure, proxy in CASES:
            if (method, structure, str(seed)) in done:
                continue
            command = f"python studies/schemes.py --part runs --seeds {seed}"
            result, config = optimized(base, method, structure, proxy, seed, command)
            mapping = ",".join(f"{r.name}={r.structure}" for r in result.layers if r.structure != DENSE)
            row = {
                "structure": structure,
                "proxy": proxy,
                **modelled(seen, result),
                "search_seconds": result.seconds.get("schemes", 0.0),
                **grid.line(result, config, command),
                "mapping": mapping,
                "n": 1,
            }
            grid.append(path, row)
            print(method, structure, seed, row["accuracy"], row["modelled_ms"], result.seconds["total"], flush=True)


def proxies(base: jpq.Config) -> None:
    """A line of schemes_proxies.csv for each random mapping: what is guessed of it, and what becomes of it."""
    seen, path = network(), PATHS["proxies"]
    method = compose("admm", "rules")
    assert base.task.weights is not None
    data = read_data(base, torch.device("cpu"))
    model = build("resnet8", data.classes, data.shape[0]).eval()
    load_weights(model, base.task.weights)
    guesses = {
        kind: MappingEvaluator(seen, model, data, BASE.decide.density, trained=kind == "trained", lr=BASE.train.lr)
        for kind in ("projected", "trained")
    }
    draw = random.Random(0)
    have = len(pd.read_csv(path)) if path.exists() else 0
    for i in range(RANDOM):
        mapping = {}
        for layer in seen.layers:
            kinds = {k: v for k, v in variants(layer, is_allowed(method)).items() if k != DENSE}
            mapping[layer.name] = draw.choice([s for kind in kinds.values() for s in kind] or [DENSE])
        if i < have:
            continue
        said = {}
        for kind, guess in guesses.items():
            start = time.perf_counter()
            said |= {f"{kind}_accuracy": round(guess(mapping), 4)}
            said |= {f"{kind}_seconds": round(time.perf_counter() - start, 3)}
        text = ",".join(f"{name}={s}" for name, s in mapping.items() if s != DENSE)
        command = "python studies/schemes.py --part proxies"
        result, _ = optimized(base, "admm", text, "", 0, command)
        grid.append(
            path,
            {
                "number": i,
                **said,
                "final_held_out": round(result.held_out["compressed"], 4),
                "final_accuracy": round(result.compressed.accuracy, 4),
                **modelled(seen, result),
                "mapping": text,
                "n": 1,
                "held_out_images": data.held_out.size,
                "hardware": grid.hardware(),
                "command": command,
            },
        )
        print(i, said, result.compressed.accuracy, flush=True)


def draw() -> None:
    """Accuracy against modelled milliseconds: a dot per run, a large one for the mean of a case's seeds."""
    table = pd.read_csv(PATHS["runs"])
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(table.structure))}
    shapes = dict(zip(dict.fromkeys(table.method), "osD^", strict=False))
    for (method, structure), own in table.groupby(["method", "structure"], sort=False):
        look = {"color": colours[structure], "marker": shapes[method]}
        axes.scatter(1e3 * own.modelled_ms, 100 * own.accuracy, s=14, alpha=0.5, **look)
        mean = own[["modelled_ms", "accuracy"]].mean()
        axes.scatter(1e3 * mean.modelled_ms, 100 * mean.accuracy, s=60, label=f"{method}, {structure}", **look)
    axes.axhline(100 * table.float_accuracy.mean(), color="#555555", linestyle="--", linewidth=1, label="float model")
    axes.set(
        xlabel="modelled microseconds of one sample (not measured)",
        ylabel="test accuracy, %",
        title="ResNet8 on the digits, 0.5 % of fp32's BOPs, 4 of 9 weights kept",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    FigureCanvasAgg(figure)
    figure.savefig(PATHS["runs"].with_suffix(".png"), dpi=110)


def summary() -> None:
    """What the CSVs hold, on the screen."""
    columns = {
        "n": ("accuracy", "size"),
        "accuracy": ("accuracy", "mean"),
        "least": ("accuracy", "min"),
        "ms": ("modelled_ms", "mean"),
        "dense_ms": ("modelled_dense_ms", "mean"),
        "bops_share": ("bops_share", "mean"),
    }
    table = pd.read_csv(PATHS["runs"])
    print(f"float {table.float_accuracy.mean():.4f}")
    print(table.groupby(["method", "structure"], sort=False).agg(**columns).round(4).to_string())
    if PATHS["proxies"].exists():
        table = pd.read_csv(PATHS["proxies"])
        names = ["projected_accuracy", "trained_accuracy", "final_held_out", "final_accuracy"]
        rank = table[names].rank()
        print(f"rank correlations, {len(table)} mappings\n{rank.corr().round(2).to_string()}")
        print(table[["projected_seconds", "trained_seconds"]].mean().round(3).to_string())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("proxies", "runs", "plot"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    asked = prepared()
    if args.part in (None, "runs"):
        runs(asked, args.seeds)
    if args.part in (None, "proxies"):
        proxies(asked)
    draw()
    summary()
