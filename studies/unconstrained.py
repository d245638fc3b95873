"""What unconstrained pruning copies, and what that costs: three exports at equal kept channels of every reader.

    python studies/unconstrained.py [--models resnet50 ...] [--rounds 15] [--out FILE.csv]

Every reader of every site keeps the same number of channels in all three exports, the largest by L1 of its weights:

    naive        readers keep channels of their own; natural order, and each selection is a gather
    reordered    the same channels, in the order that `export.unconstrained.reorder` chooses; contiguous ones are views
    constrained  all readers of a site keep the same channels (mean rank over its readers): nothing is selected

With `agreement` a, a reader ranks channels by a x (mean rank over readers) + (1 - a) x (its own rank). The weights are
random, so at 0 readers agree no more than by chance, which is the hardest case; trained ones lie somewhere above.
Times: processor time of one sample on one thread, torch in eager mode and onnxruntime, the three exports in turn, two
rounds to warm up; only for agreement 0. Ratios are medians over rounds of the ratio to the naive export in that round.
Rows that results/unconstrained.csv has already stay as they are.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from jpq import costs
from jpq.compression.usage import exact_usage
from jpq.export import float_equivalence, runtimes
from jpq.export.onnx import export as export_module
from jpq.export.unconstrained.reorder import export
from jpq.export.unconstrained.select import copies
from jpq.plan import Plan
from jpq.tasks import zoo
from jpq.tracing.channel_shares import ChannelShares
from jpq.tracing.network import Network
from jpq.tracing.sites import Site, channels, per_consumer
from jpq.tracing.trace import trace

RESULTS = Path(__file__).parent / "results" / "unconstrained.csv"
MODELS = ("densenet121", "googlenet", "efficientnet_v2_s", "resnet50")
AMOUNTS = (0.3, 0.5)  # share of its input channels that every reader gives up
AGREEMENTS = (0.0, 0.9)


def ranks(model: nn.Module, network: Network, site: Site) -> Tensor:
    """[readers, n]: each reader's rank of each unit in [0, 1], by L1 of its weights."""
    out = []
    for tap in site.taps:
        weight = model.get_parameter(network.layer(tap.layer).weight).detach()
        out.append(tap.structure.pool(weight.abs())[0].argsort().argsort() / max(1, site.n - 1))
    return torch.stack(out)


def largest(scores: Tensor, amount: float) -> list[bool]:
    """Keep all but `amount` of the units, at least one."""
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[: max(1, round((1 - amount) * len(scores)))]] = True
    return kept.tolist()


def decide(
    model: nn.Module, network: Network, amount: float, agreement: float
) -> tuple[dict[str, list[bool]], dict[str, list[bool]]]:
    """(what coupled sites keep, what every reader keeps)."""
    coupled, own = {}, {}
    split = {(s.taps[0].layer, s.labels.tobytes()): s.name for s in per_consumer(network) if len(s.taps) == 1}
    for site in channels(network):
        each = ranks(model, network, site)
        together = each.mean(0)
        coupled[site.name] = largest(together, amount)
        for tap, mine in zip(site.taps, each, strict=True):
            name = split.get((tap.layer, site.labels.tobytes()), site.name)
            own[name] = (
                coupled[site.name]
                if name == site.name
                else largest(agreement * together + (1 - agreement) * mine, amount)
            )
    return coupled, own


def macs(network: Network, sites: Sequence[Site], kept: Mapping[str, Any]) -> int:
    """Multiply-accumulates of one sample."""
    return int(costs.macs(exact_usage(network, ChannelShares(network, sites), Plan("", {}, kept))))


def in_turn(runs: Mapping[str, Callable[[], Any]], rounds: int, warm: int = 2) -> dict[str, dict[str, float]]:
    """Median, 10th and 90th percentile in ms of processor time, and the median ratio to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(warm + rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if k >= warm:
                seconds[name].append(time.process_time() - start)
    first = np.array(next(iter(seconds.values())))
    return {
        name: {
            "ms": round(1000 * float(np.median(t)), 2),
            "ms_p10": round(1000 * float(np.percentile(t, 10)), 2),
            "ms_p90": round(1000 * float(np.percentile(t, 90)), 2),
            "ratio": round(float(np.median(np.array(t) / first)), 3),
        }
        for name, t in seconds.items()
    }


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """All rows of one network."""
    torch.manual_seed(0)
    model = zoo.build_torchvision(name, 1000).eval()
    x = torch.randn(1, *zoo.usual_shape(name))
    network = trace(model, x)
    model = float_equivalence.randomize(
        model, x
    ).float()  # else some outputs hardly depend on the image, and differences say nothing
    sites, own_sites = channels(network), per_consumer(network)
    dense = sum(layer.macs for layer in network.layers)
    rows = []
    for amount in AMOUNTS:
        for agreement in AGREEMENTS:
            coupled, own = decide(model, network, amount, agreement)
            small = {
                "naive": export(model, network, own_sites, own, reorder=False, gather=True).eval(),
                "reordered": export(model, network, own_sites, own).eval(),
                "constrained": export(model, network, sites, coupled).eval(),
            }
            spent = {
                k: macs(network, *(pair))
                for k, pair in {"naive": (own_sites, own), "constrained": (sites, coupled)}.items()
            }
            with torch.no_grad():
                wanted = small["naive"](x)
                gap = float((wanted - small["reordered"](x)).norm() / wanted.norm())
            found = {}
            if agreement == 0:
                found = times(small, x, rounds)
            for how, made in small.items():
                rows.append(
                    {
                        "model": name,
                        "amount": amount,
                        "agreement": agreement,
                        "export": how,
                        "macs_share": round(spent.get(how, spent["naive"]) / dense, 4),
                        **copies(made, x).to_dict(),
                        "difference_to_naive": float(f"{gap:.2g}") if how == "reordered" else None,
                        **found.get(how, {}),
                    }
                )
    return rows


def times(small: Mapping[str, nn.Module], x: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """Times of every export, in torch and in onnxruntime, and how far the two are apart."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        sessions = {}
        for how, made in small.items():
            path = Path(folder) / f"{how}.onnx"
            export_module.export(made, x, path)
            sessions[how] = runtimes.Session(path, threads=1)
        eager = in_turn({how: lambda made=made: made(x) for how, made in small.items()}, rounds)
        ort = in_turn({how: lambda s=session: s(x) for how, session in sessions.items()}, rounds)
        gaps = {how: float((made(x) - sessions[how](x)).norm() / made(x).norm()) for how, made in small.items()}
    return {
        how: {
            **{f"torch_{k}": v for k, v in eager[how].items()},
            **{f"onnx_{k}": v for k, v in ort[how].items()},
            "torch_vs_onnx": float(f"{gaps[how]:.2g}"),
            "rounds": rounds,
        }
        for how in small
    }


def table(path: Path = RESULTS) -> list[str]:
    """The rows of README, for readers that agree by chance."""
    rows = pd.read_csv(path)
    lines = [
        "**Unconstrained pruning**: every reader keeps its own channels, equally many in all three exports (random "
        "weights, so readers agree by chance only; one 224 x 224 or 384 x 384 image, processor time of one thread, "
        "medians; `python studies/unconstrained.py`)",
        "",
        "| network | given up | export | MACs % | channels copied | gathers | MB copied | torch ms (ratio) "
        "| onnxruntime ms (ratio) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows[rows.agreement == 0].itertuples():
        copied = f"{row.channels:,.0f} | {row.gathers:.0f} | {row.size_bytes / 1e6:.2f}"
        lines.append(
            f"| {row.model} | {100 * row.amount:.0f} % | {row.export} | {100 * row.macs_share:.1f} | {copied} "
            f"| {row.torch_ms:.1f} ({row.torch_ratio:.2f}) | {row.onnx_ms:.1f} ({row.onnx_ratio:.2f}) |"
        )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = pd.read_csv(args.out) if args.out.exists() else pd.DataFrame({"model": []})
    for name in args.models:
        if name in set(done.model):
            continue
        rows = pd.DataFrame(measure(name, args.rounds)).assign(
            threads=1,
            torch=version("torch"),
            onnxruntime=version("onnxruntime"),
            hardware=f"{platform.machine()} CPU, shared",
            command=shlex.join(["python", "studies/unconstrained.py", *sys.argv[1:]]),
        )
        done = pd.concat([done, rows], ignore_index=True) if len(done) else rows
        done.to_csv(args.out, index=False)
        shown = ["model", "amount", "agreement", "export", "channels", "gathers", "views", "torch_ratio", "onnx_ratio"]
        print(rows[shown].to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
