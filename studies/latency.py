"""Latency predicted from a table of measured layers, beside whole compressed models measured in onnxruntime.

Layers of ResNet8 and ResNet20 (random weights: time does not depend on them) are measured one by one, then exported
models at random widths and bits, all of them in turns in one process. `predicted` is the sum over the layers; what
runs between them is not in it, so ratios a little above 1 are expected. AMD EPYC, one thread, November 2026, 32 plans,
n = 60 calls each: whole models took 1.24 times as long as predicted (median; 1.07 to 1.37, correlation 0.99).

    python studies/latency.py            # about two minutes on one core
    python studies/latency.py --plot     # only draws
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from support.figures import save_figure
from support.result_rows import RESULTS, provenance

import jpq
from jpq.config import Budget, Decide
from jpq.costs import LatencyTable, latency_ns
from jpq.export.timing import Runner, empty_model, measure_layers, take_turns
from jpq.tasks import build_model

PATH = RESULTS / "latency.csv"
COLOURS = {"resnet8": "#E69F00", "resnet20": "#0072B2"}  # of the models
SAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NANOSECONDS = 10**6  # in a millisecond


def random_plan(plan: jpq.Plan, seed: int) -> jpq.Plan:
    """The plan with random widths: each site keeps a share around a common one, bits are 2 to 8.

    Seed 0 keeps every channel at 8 bits.
    """
    rng = random.Random(seed)
    common = rng.uniform(0.1, 0.9) if seed else 1.0
    kept = {}
    for site, units in plan.kept.items():
        count = max(1, round(len(units) * min(1.0, common * rng.uniform(0.7, 1.3)))) if seed else len(units)
        open_units = set(rng.sample(range(len(units)), count))
        kept[site] = tuple(i in open_units for i in range(len(units)))

    def draw_bits() -> int:
        return rng.randint(2, 8) if seed else 8

    image = next(iter(plan.layers))
    layers = {
        name: replace(layer, w_bits=draw_bits(), a_bits=8 if name == image else draw_bits())
        for name, layer in plan.layers.items()
    }
    return replace(plan, layers=layers, kept=kept)


def export_plan(name: str, table: LatencyTable, seed: int, path: Path) -> tuple[float, float, float]:
    """Export one random plan; (predicted ms, share of the channels kept, mean bits)."""
    torch.manual_seed(0)
    model = build_model(name, 10, 3).eval()
    budget = Budget(target_latency="100%")
    net = jpq.compress(model, SAMPLE, decide=Decide(method="djpq"), budget=budget, table=table).net
    net.freeze(random_plan(net.plan(), seed))
    small, plan = jpq.rebuild(net, model)
    jpq.export_onnx(small, SAMPLE, path)
    units = [kept for site in plan.kept.values() for kept in site]
    bits = [b for x in plan.layers.values() for b in (x.w_bits, x.a_bits)]
    return float(latency_ns(net.exact_usage())) / NANOSECONDS, sum(units) / len(units), sum(bits) / len(bits)


def measure_plans(plans: int, repeats: int, command: str) -> pd.DataFrame:
    """One row per plan: the first of each model keeps everything at 8 bits."""
    rows, runners = [], [Runner(empty_model())]
    with tempfile.TemporaryDirectory() as folder:
        for name in COLOURS:
            network = jpq.trace(build_model(name, 10, 3), SAMPLE)
            table = LatencyTable(name, tuple(measure_layers(network, name, 1, repeats)))
            for seed in range(plans):
                path = Path(folder) / f"{name}_{seed}.onnx"
                ms, kept, bits = export_plan(name, table, seed, path)
                rows.append(
                    {
                        "model": name,
                        "plan": seed,
                        "channels_kept": round(kept, 3),
                        "bits_mean": round(bits, 2),
                        "predicted_ms": round(ms, 5),
                    }
                )
                runners.append(Runner(path))
        milliseconds = 1e3 * take_turns(runners, repeats)
    call = np.median(milliseconds[0])
    table = pd.DataFrame(rows)
    table["measured_ms"] = (np.median(milliseconds[1:], 1) - call).round(5)
    table["measured_over_predicted"] = (table.measured_ms / table.predicted_ms).round(4)
    return table.assign(**provenance(command, repeats, ("onnxruntime", "torch"), threads=1))


def draw_latencies(table: pd.DataFrame, path: Path) -> None:
    """Picture of measured against predicted time, with the line of a perfect prediction."""
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    axes = figure.subplots()
    for name, rows in table.groupby("model"):
        dots = {"s": 26, "color": COLOURS[name], "label": f"{name}, {len(rows)} plans"}
        axes.scatter(rows.predicted_ms, rows.measured_ms, **dots)
    top = 1.08 * max(table.predicted_ms.max(), table.measured_ms.max())
    axes.plot([0, top], [0, top], color="#555555", lw=1, ls="--", label="measured = predicted")
    axes.set(xlim=(0, top), ylim=(0, top), title="Latency of random widths and bits, one thread")
    axes.set(xlabel="predicted from single layers, ms", ylabel="whole model in onnxruntime, ms")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, path)


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """By model: number of plans, correlation of predicted and measured time, median and extremes of their ratio."""
    rows = []
    for name, plans in [*table.groupby("model"), ("both", table)]:
        ratio = plans.measured_over_predicted
        rows.append(
            {
                "model": name,
                "plans": len(plans),
                "correlation": plans.predicted_ms.corr(plans.measured_ms),
                "rank_correlation": plans.predicted_ms.rank().corr(plans.measured_ms.rank()),
                "median_ratio": ratio.median(),
                "least": ratio.min(),
                "most": ratio.max(),
            }
        )
    return pd.DataFrame(rows).round(4)


def main() -> None:
    """Measure, write the CSV, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--plot", action="store_true", help="only draw what is there")
    args = parser.parse_args()
    if not args.plot:
        command = f"python studies/latency.py --plans {args.plans} --repeats {args.repeats}"
        measure_plans(args.plans, args.repeats, command).to_csv(PATH, index=False)
    table = pd.read_csv(PATH)
    print(summarize(table).to_string(index=False))
    draw_latencies(table, PATH)


if __name__ == "__main__":
    main()
