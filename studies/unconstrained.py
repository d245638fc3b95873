"""Channels copied and time of unconstrained pruning: three exports with equally many channels kept by each consumer.

    python studies/unconstrained.py [--models resnet50 ...] [--rounds 15] [--out FILE.csv]

Every consumer of every site keeps the same number of channels in all three exports, the largest by L1 of its weights:

    naive        consumers keep channels of their own; natural order, and each selection is a gather
    reordered    the same channels, in the order that `export_unconstrained` chooses; contiguous ones are views
    constrained  all consumers of a site keep the same channels (mean rank over them): nothing is selected

With `agreement` a, a consumer ranks channels by a x (mean rank over consumers) + (1 - a) x (its own rank). The weights
are random, so at 0 consumers agree no more than by chance, which is the hardest case; trained ones lie somewhere above.
Times: processor time of one sample on one thread, torch in eager mode and onnxruntime, the three exports in turn, two
rounds to warm up; only for agreement 0. Ratios are medians over rounds of the ratio to the naive export in that round.
Rows that results/unconstrained.csv has already stay as they are. x86-64 CPU, November 2026, n = 15 rounds; README's
table has the copies and times.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from support.result_rows import RESULTS, provenance, read_rows
from torch import Tensor, nn

import jpq
from jpq import costs
from jpq.compression import exact_usage
from jpq.export import Session, randomize
from jpq.export.unconstrained import count_copies, export_unconstrained
from jpq.tasks import zoo
from jpq.tracing import ChannelShares, Network, Site, channels_per_consumer

PATH = RESULTS / "unconstrained.csv"
MODELS = ("densenet121", "googlenet", "efficientnet_v2_s", "resnet50")
AMOUNTS = (0.3, 0.5)  # share of its input channels that every consumer gives up
AGREEMENTS = (0.0, 0.9)
WARM_UP = 2  # rounds
Kept = dict[str, list[bool]]


def consumer_ranks(model: nn.Module, network: Network, site: Site) -> Tensor:
    """[consumers, n]: each consumer's rank of each unit in [0, 1], by L1 of its weights."""
    ranks = []
    for tap in site.taps:
        weight = model.get_parameter(network.layer(tap.layer).weight).detach()
        ranks.append(tap.structure.pool(weight.abs())[0].argsort().argsort() / max(1, site.n - 1))
    return torch.stack(ranks)


def keep_largest(scores: Tensor, amount: float) -> list[bool]:
    """Keep all but `amount` of the units, at least one."""
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[: max(1, round((1 - amount) * len(scores)))]] = True
    return kept.tolist()


def decide(model: nn.Module, network: Network, amount: float, agreement: float) -> tuple[Kept, Kept]:
    """(units that coupled sites keep, units that every consumer keeps)."""
    coupled: Kept = {}
    uncoupled: Kept = {}
    names = {(s.taps[0].layer, s.labels.tobytes()): s.name for s in channels_per_consumer(network) if len(s.taps) == 1}
    for site in jpq.channels(network):
        ranks = consumer_ranks(model, network, site)
        mean = ranks.mean(0)
        coupled[site.name] = keep_largest(mean, amount)
        for tap, rank in zip(site.taps, ranks, strict=True):
            name = names.get((tap.layer, site.labels.tobytes()), site.name)
            mixed = agreement * mean + (1 - agreement) * rank
            uncoupled[name] = coupled[site.name] if name == site.name else keep_largest(mixed, amount)
    return coupled, uncoupled


def count_macs(network: Network, sites: Sequence[Site], kept: Kept) -> int:
    """Multiply-accumulates of one sample."""
    return int(costs.macs(exact_usage(network, ChannelShares(network, sites), jpq.Plan("", {}, kept))))


def time_in_turn(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Median, 10th and 90th percentile in ms of processor time, and the median ratio to the first call."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(WARM_UP + rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if k >= WARM_UP:
                seconds[name].append(time.process_time() - start)
    reference = np.array(next(iter(seconds.values())))
    return {
        name: {
            "ms": round(1000 * float(np.median(t)), 2),
            "ms_p10": round(1000 * float(np.percentile(t, 10)), 2),
            "ms_p90": round(1000 * float(np.percentile(t, 90)), 2),
            "ratio": round(float(np.median(np.array(t) / reference)), 3),
        }
        for name, t in seconds.items()
    }


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """All rows of one network."""
    torch.manual_seed(0)
    model = zoo.build_torchvision(name, 1000).eval()
    x = torch.randn(1, *zoo.usual_shape(name))
    network = jpq.trace(model, x)
    model = randomize(model, x).float()  # else some outputs hardly depend on the image, and differences say nothing
    rows = []
    for amount in AMOUNTS:
        for agreement in AGREEMENTS:
            settings = {"model": name, "amount": amount, "agreement": agreement}
            rows += [settings | row for row in _export_rows(model, network, x, amount, agreement, rounds)]
    return rows


def _export_rows(
    model: nn.Module, network: Network, x: Tensor, amount: float, agreement: float, rounds: int
) -> list[dict[str, Any]]:
    """A row for each of the three exports; timed where consumers agree by chance only."""
    coupled, uncoupled = decide(model, network, amount, agreement)
    coupled_sites, uncoupled_sites = jpq.channels(network), channels_per_consumer(network)
    export = partial(export_unconstrained, model, network)
    exports = {
        "naive": export(uncoupled_sites, uncoupled, reorder=False, gather=True).eval(),
        "reordered": export(uncoupled_sites, uncoupled).eval(),
        "constrained": export(coupled_sites, coupled).eval(),
    }
    macs = dict.fromkeys(("naive", "reordered"), count_macs(network, uncoupled_sites, uncoupled))
    macs["constrained"] = count_macs(network, coupled_sites, coupled)
    dense = sum(layer.macs for layer in network.layers)
    with torch.no_grad():
        reference = exports["naive"](x)
        difference = float((reference - exports["reordered"](x)).norm() / reference.norm())
    times = time_exports(exports, x, rounds) if agreement == 0 else {}
    return [
        {
            "export": name,
            "macs_share": round(macs[name] / dense, 4),
            **count_copies(small, x).to_dict(),
            "difference_to_naive": float(f"{difference:.2g}") if name == "reordered" else None,
            **times.get(name, {}),
        }
        for name, small in exports.items()
    ]


def time_exports(exports: Mapping[str, nn.Module], x: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """Times of every export in torch and in onnxruntime, and the relative difference of their outputs."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        sessions = {}
        for name, small in exports.items():
            path = Path(folder) / f"{name}.onnx"
            jpq.export_onnx(small, x, path)
            sessions[name] = Session(path, threads=1)
        eager = time_in_turn({name: partial(small, x) for name, small in exports.items()}, rounds)
        onnx = time_in_turn({name: partial(session, x) for name, session in sessions.items()}, rounds)
        gaps = {n: float((small(x) - sessions[n](x)).norm() / small(x).norm()) for n, small in exports.items()}
    return {
        name: {
            **{f"torch_{k}": v for k, v in eager[name].items()},
            **{f"onnx_{k}": v for k, v in onnx[name].items()},
            "torch_vs_onnx": float(f"{gaps[name]:.2g}"),
            "rounds": rounds,
        }
        for name in exports
    }


def unconstrained_table() -> list[str]:
    """README's table, for consumers that agree by chance."""
    rows = pd.read_csv(PATH)
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
    """Measure the networks that have no rows yet; the CSV is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = shlex.join(["python", "studies/unconstrained.py", *sys.argv[1:]])
    table = read_rows(args.out, ["model"])
    for name in args.models:
        if name in set(table.model):
            continue
        about = provenance(command, args.rounds, ("torch", "onnxruntime"))
        rows = pd.DataFrame(measure(name, args.rounds)).assign(**about)
        table = pd.concat([table, rows], ignore_index=True) if len(table) else rows
        table.to_csv(args.out, index=False)
        shown = ["model", "amount", "agreement", "export", "channels", "gathers", "views", "torch_ratio", "onnx_ratio"]
        print(rows[shown].to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
