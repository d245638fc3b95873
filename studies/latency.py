"""Does a table of measured layers predict how long a whole compressed model takes in onnxruntime?

Layers of ResNet8 and ResNet20 (random weights: time does not depend on them) are measured one by one, then exported
models at random widths and bits, all of them in turns in one process. `predicted` is the sum over the layers; what
runs between them is not in it, so ratios a little above 1 are expected.

    python studies/latency.py            # about two minutes on one core
    python studies/latency.py --plot     # only draws
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import torch
from grid import RESULTS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import jpq
from jpq.costs import latency_ns
from jpq.costs.latency import NS
from jpq.costs.latency_table import LatencyTable
from jpq.export.onnx import export
from jpq.export.rebuild import rebuild
from jpq.export.timing import layer_table
from jpq.export.timing.layer_model import call_model
from jpq.export.timing.runner import Runner, hardware, take_turns
from jpq.plan import Plan
from jpq.tasks.models import build
from jpq.tracing.trace import trace

MODELS = {"resnet8": "#E69F00", "resnet20": "#0072B2"}
SAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def drawn(plan: Plan, seed: int) -> Plan:
    """The same plan with random widths: every site keeps a share of its own around a common one; bits are 2 to 8."""
    rng = random.Random(seed)
    common = rng.uniform(0.1, 0.9) if seed else 1.0
    kept = {}
    for site, units in plan.kept.items():
        count = max(1, round(len(units) * min(1.0, common * rng.uniform(0.7, 1.3)))) if seed else len(units)
        stays = set(rng.sample(range(len(units)), count))
        kept[site] = tuple(i in stays for i in range(len(units)))
    bits = lambda now: rng.randint(2, 8) if seed else 8  # noqa: E731
    image = next(iter(plan.layers))
    layers = {n: replace(x, w_bits=bits(x), a_bits=8 if n == image else bits(x)) for n, x in plan.layers.items()}
    return replace(plan, layers=layers, kept=kept)


def compressed(name: str, table: LatencyTable, seed: int, path: Path) -> tuple[float, float, float]:
    """Export one random plan; (predicted ms, share of the channels kept, mean bits)."""
    torch.manual_seed(0)
    model = build(name, 10, 3).eval()
    net = jpq.compress(model, SAMPLE, method="djpq", latency="100%", table=table).net
    net.freeze(drawn(net.plan(), seed))
    small, plan = rebuild(net, model)
    export.export(small, SAMPLE, path)
    units = [k for site in plan.kept.values() for k in site]
    bits = [b for x in plan.layers.values() for b in (x.w_bits, x.a_bits)]
    return float(latency_ns(net.exact_usage())) / NS, sum(units) / len(units), sum(bits) / len(bits)


def measured(plans: int, repeats: int, command: str) -> pd.DataFrame:
    """One row per plan: the first of each model keeps everything at 8 bits."""
    rows, runners = [], [Runner(call_model())]
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            table = LatencyTable(name, tuple(layer_table.measure(trace(build(name, 10, 3), SAMPLE), name, 1, repeats)))
            for seed in range(plans):
                path = Path(folder) / f"{name}_{seed}.onnx"
                ms, kept, bits = compressed(name, table, seed, path)
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
        seconds = 1e3 * take_turns(runners, repeats)
    call = np.median(seconds[0])
    frame = pd.DataFrame(rows)
    frame["measured_ms"] = (np.median(seconds[1:], 1) - call).round(5)
    frame["measured_over_predicted"] = (frame.measured_ms / frame.predicted_ms).round(4)
    more = {"n": repeats, "threads": 1, "hardware": hardware(), "onnxruntime": onnxruntime.__version__}
    return frame.assign(**more, command=command)


def picture(frame: pd.DataFrame, path: Path) -> None:
    """Measured against predicted, with the line of a perfect prediction."""
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    axes = figure.subplots()
    for name, rows in frame.groupby("model"):
        dots = {"s": 26, "color": MODELS[name], "label": f"{name}, {len(rows)} plans"}
        axes.scatter(rows.predicted_ms, rows.measured_ms, **dots)
    top = 1.08 * max(frame.predicted_ms.max(), frame.measured_ms.max())
    axes.plot([0, top], [0, top], color="#555555", lw=1, ls="--", label="measured = predicted")
    axes.set(xlim=(0, top), ylim=(0, top), title="Latency of random widths and bits, one thread")
    axes.set(xlabel="predicted from single layers, ms", ylabel="whole model in onnxruntime, ms")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """By model: number of plans, correlation of predicted and measured time, median and extremes of their ratio."""
    rows = []
    for name, own in [*frame.groupby("model"), ("both", frame)]:
        ratio = own.measured_over_predicted
        rows.append(
            {
                "model": name,
                "plans": len(own),
                "correlation": own.predicted_ms.corr(own.measured_ms),
                "rank_correlation": own.predicted_ms.rank().corr(own.measured_ms.rank()),
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
    path = RESULTS / "latency.csv"
    if not args.plot:
        command = f"python studies/latency.py --plans {args.plans} --repeats {args.repeats}"
        measured(args.plans, args.repeats, command).to_csv(path, index=False)
    frame = pd.read_csv(path)
    print(summary(frame).to_string(index=False), file=sys.stdout)
    picture(frame, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
