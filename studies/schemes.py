"""Mask structures for the layers of one network: one scheme everywhere, by rules, by search, at equal budgets.

    python studies/schemes.py

ResNet8 on the digits, ten epochs. All runs start from the same float weights (trained here, kept in runs/schemes), have
the same batches, rates and target of bit-operations, and keep 4 of 9 weights where a mask is: of each layer with admm
and scheme-mapping, of all blocks together with dpf, which takes them where weights are small. Milliseconds are modelled
(jpq/allocation/structure_latency.py), on the densities that training ended with; nothing was timed. Written are
schemes.csv (a row per run), schemes_proxies.csv (what the two proxies of the search say of random mappings, and what
training made of them) and schemes.png. Test images are read once per run, and by no search. `--part proxies` or
`--part runs` does one. Two shared x86-64 cores, November 2026, two seeds: search helps methods that project at once,
`admm` and `scheme-mapping`; `dpf` needs none.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from support.figures import save_figure
from support.grid import run_row, with_float_weights
from support.result_rows import RESULTS, append_row, provenance

import jpq
from jpq.allocation import MappingEvaluator, allowed_structures, mapping_ms
from jpq.config import Budget, Decide, Task, Train
from jpq.costs import DENSE
from jpq.methods import compose_method, is_allowed
from jpq.results import Result
from jpq.tasks import build_model, load_weights, read_data
from jpq.tracing import Network

WEIGHTS = Path("runs/schemes/resnet8-digits.safetensors")
BASE = jpq.Config(
    task=Task(model="resnet8", data="digits"),
    budget=Budget(target_bops="0.5%"),
    decide=Decide(method="dpf", density=4 / 9),
    train=Train(epochs=10, search=0.5, float_epochs=20),
)
RANDOM_MAPPINGS = 8  # mappings that the proxies judge
RUNS_PATH, PROXIES_PATH = RESULTS / "schemes.csv", RESULTS / "schemes_proxies.csv"


@dataclass(frozen=True)
class Case:
    """A method and how its layers get their structures: one structure, "rules", or "search" by a proxy."""

    method: str
    structure: str
    proxy: str = ""


CASES = [
    *(Case(method, structure) for method in ("admm", "dpf") for structure in ("pattern", "punched:8x8", "block:8x1")),
    *(Case(method, "rules") for method in ("admm", "dpf", "scheme-mapping")),
    *(Case(method, "search", "projected") for method in ("admm", "dpf", "scheme-mapping")),
]


def trace_network() -> Network:
    """The network of the model that all runs have."""
    return jpq.trace(build_model("resnet8", 10, 1).eval(), torch.randn(2, 1, 8, 8))


def run_case(base: jpq.Config, case: Case, seed: int, command: str) -> tuple[Result, jpq.Config]:
    """One run from the shared weights, its folder gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        decide = replace(
            base.decide, method=case.method, structure=case.structure, proxy=case.proxy or base.decide.proxy
        )
        config = replace(base, decide=decide, run=replace(base.run, seed=seed, out=Path(folder), threads=1))
        return jpq.optimize(config, command=command), config


def modelled_columns(network: Network, result: Result) -> dict[str, float]:
    """Modelled milliseconds of the run's masks, and of the dense network."""
    structures = {r.name: r.structure for r in result.layers}
    ms = mapping_ms(network, structures, {r.name: r.density for r in result.layers})
    return {
        "modelled_ms": round(sum(ms.values()), 5),
        "modelled_dense_ms": round(sum(mapping_ms(network, {}, 1.0).values()), 5),
    }


def mapping_text(mapping: Mapping[str, str]) -> str:
    """LAYER=STRUCTURE, separated by commas; dense layers are left out."""
    return ",".join(f"{name}={structure}" for name, structure in mapping.items() if structure != DENSE)


def measure_runs(base: jpq.Config, seeds: list[int]) -> None:
    """Append a row to schemes.csv for each case and seed that has none."""
    network, known = trace_network(), set()
    if RUNS_PATH.exists():
        table = pd.read_csv(RUNS_PATH, dtype=str)
        known = set(zip(table.method, table.structure, table.seed, strict=True))
    for seed in seeds:
        for case in CASES:
            if (case.method, case.structure, str(seed)) in known:
                continue
            command = f"python studies/schemes.py --part runs --seeds {seed}"
            result, config = run_case(base, case, seed, command)
            row = {
                "structure": case.structure,
                "proxy": case.proxy,
                **modelled_columns(network, result),
                "search_seconds": result.seconds.get("schemes", 0.0),
                **run_row(result, config, command),
                "mapping": mapping_text({r.name: r.structure for r in result.layers}),
            }
            append_row(RUNS_PATH, row)
            seconds = result.seconds["total"]
            print(case.method, case.structure, seed, row["accuracy"], row["modelled_ms"], seconds, flush=True)


def random_mappings(network: Network) -> list[dict[str, str]]:
    """One structure for each layer, drawn from those that ADMM may have there."""
    draw, allowed = random.Random(0), is_allowed(compose_method("admm", "rules"))
    mappings = []
    for _ in range(RANDOM_MAPPINGS):
        mapping = {}
        for layer in network.layers:
            structures = allowed_structures(layer, allowed)
            choices = [s for scheme, members in structures.items() if scheme != DENSE for s in members]
            mapping[layer.name] = draw.choice(choices or [DENSE])
        mappings.append(mapping)
    return mappings


def measure_proxies(base: jpq.Config) -> None:
    """Append a row to schemes_proxies.csv for each random mapping: its proxies, and its accuracy after training."""
    network = trace_network()
    assert base.task.weights is not None
    data = read_data(base, torch.device("cpu"))
    model = build_model("resnet8", data.classes, data.shape[0]).eval()
    load_weights(model, base.task.weights)
    proxies = {
        kind: MappingEvaluator(network, model, data, BASE.decide.density, pretrain=kind == "trained", lr=BASE.train.lr)
        for kind in ("projected", "trained")
    }
    known = len(pd.read_csv(PROXIES_PATH)) if PROXIES_PATH.exists() else 0
    for i, mapping in enumerate(random_mappings(network)):
        if i < known:
            continue
        columns: dict[str, float] = {}
        for kind, proxy in proxies.items():
            start = time.perf_counter()
            columns[f"{kind}_accuracy"] = round(proxy(mapping), 4)
            columns[f"{kind}_seconds"] = round(time.perf_counter() - start, 3)
        command = "python studies/schemes.py --part proxies"
        result, _ = run_case(base, Case("admm", mapping_text(mapping)), 0, command)
        row = {
            "number": i,
            **columns,
            "final_held_out": round(result.held_out["compressed"], 4),
            "final_accuracy": round(result.compressed.accuracy, 4),
            **modelled_columns(network, result),
            "mapping": mapping_text(mapping),
            "held_out_images": data.held_out.size,
            **provenance(command),
        }
        append_row(PROXIES_PATH, row)
        print(i, columns, result.compressed.accuracy, flush=True)


def draw_runs() -> None:
    """Picture of accuracy against modelled milliseconds: a dot per run, a large one for the mean of a case's seeds."""
    table = pd.read_csv(RUNS_PATH)
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(table.structure))}
    markers = dict(zip(dict.fromkeys(table.method), "osD^", strict=False))
    for (method, structure), runs in table.groupby(["method", "structure"], sort=False):
        style = {"color": colours[structure], "marker": markers[method]}
        axes.scatter(1e3 * runs.modelled_ms, 100 * runs.accuracy, s=14, alpha=0.5, **style)
        mean = runs[["modelled_ms", "accuracy"]].mean()
        axes.scatter(1e3 * mean.modelled_ms, 100 * mean.accuracy, s=60, label=f"{method}, {structure}", **style)
    axes.axhline(100 * table.float_accuracy.mean(), color="#555555", linestyle="--", linewidth=1, label="float model")
    axes.set(
        xlabel="modelled microseconds of one sample (not measured)",
        ylabel="test accuracy, %",
        title="ResNet8 on the digits, 0.5 % of fp32's BOPs, 4 of 9 weights kept",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, RUNS_PATH)


def print_summary() -> None:
    """Print the means over seeds, and the rank correlations of the proxies."""
    columns = {
        "n": ("accuracy", "size"),
        "accuracy": ("accuracy", "mean"),
        "least": ("accuracy", "min"),
        "ms": ("modelled_ms", "mean"),
        "dense_ms": ("modelled_dense_ms", "mean"),
        "bops_share": ("bops_share", "mean"),
    }
    table = pd.read_csv(RUNS_PATH)
    print(f"float {table.float_accuracy.mean():.4f}")
    print(table.groupby(["method", "structure"], sort=False).agg(**columns).round(4).to_string())
    if PROXIES_PATH.exists():
        table = pd.read_csv(PROXIES_PATH)
        names = ["projected_accuracy", "trained_accuracy", "final_held_out", "final_accuracy"]
        rank = table[names].rank()
        print(f"rank correlations, {len(table)} mappings\n{rank.corr().round(2).to_string()}")
        print(table[["projected_seconds", "trained_seconds"]].mean().round(3).to_string())


def main() -> None:
    """Run what is missing, draw, print the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("proxies", "runs", "plot"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    if args.part != "plot":
        base = with_float_weights(BASE, WEIGHTS)
        if args.part in (None, "runs"):
            measure_runs(base, args.seeds)
        if args.part in (None, "proxies"):
            measure_proxies(base)
    draw_runs()
    print_summary()


if __name__ == "__main__":
    main()
