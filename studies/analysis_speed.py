"""Seconds to read a network and to remove every second unit: jpq beside Torch-Pruning's dependency graph.

    pip install torch-pruning --no-deps
    python studies/analysis_speed.py [--models densenet201 resnet50 ...] [--rounds 5] [--threads 1]

Compared in one process, in turn, round by round, on 224 x 224 images with random weights:

- jpq: export to an ATen graph, labelling, the check on smaller copies, sites, and a rebuilt copy without every second
  unit of every site;
- Torch-Pruning (Fang et al., DepGraph, CVPR 2023, arXiv:2301.12900; a requirement of this script alone): building its
  DependencyGraph, the search for all groups, and pruning every second channel of all groups in place, through the
  classes that its documentation names for this. Its pruners and importances are not timed, nor are jpq's methods.

What the two give is not the same: jpq labels single channels, checks that the model's code runs with fewer of them and
leaves the model alone, whether it is a convolution net or not; Torch-Pruning searches groups of layers on demand. The
CSV says what each one left of the parameters and whether the pruned model runs. Writes results/analysis_speed.csv:
medians over the rounds in seconds of the processor (so that a machine that others use, too, tells the same), the
seconds that a clock on the wall showed, and the ratio Torch-Pruning / jpq per round. x86-64 CPU, one thread, November
2026, n = 3; README's table has the ratios: above 1 on densely connected networks, below on the others.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import os
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pandas as pd
import torch
import torchvision
from support.result_rows import RESULTS, provenance
from support.wrapping import time_calls
from torch import Tensor, nn

import jpq
from jpq.tracing import freeze_unshrinkable, remove_channels

PATH = RESULTS / "analysis_speed.csv"
MODELS = (
    "densenet201",
    "efficientnet_v2_l",
    "resnet50",
    "mobilenet_v3_large",
    "densenet121",
    "vit_b_16",
    "convnext_tiny",
)
Seconds = dict[str, float]


@contextmanager
def timed(seconds: Seconds, name: str) -> Iterator[None]:
    """Processor seconds spent inside, as an entry of `seconds`."""
    start = time.process_time()
    yield
    seconds[name] = time.process_time() - start


def with_jpq(model: nn.Module, x: Tensor) -> tuple[Seconds, nn.Module, int]:
    """`jpq.trace` by its stages, sites, and the smaller copy; (seconds, small model, number of sites)."""
    seconds: Seconds = {}
    with timed(seconds, "jpq_trace"), time_calls(torch.export.export, freeze_unshrinkable) as stages:
        network = jpq.trace(model, x)
    seconds["jpq_export"], seconds["jpq_check"] = stages["export"], stages["freeze_unshrinkable"]
    seconds["jpq_labels"] = seconds.pop("jpq_trace") - seconds["jpq_export"] - seconds["jpq_check"]
    with timed(seconds, "jpq_sites"):
        sites = jpq.channels(network)
    with timed(seconds, "jpq_rebuild"):
        small = remove_channels(model, network, [int(c) for s in sites for c in s.labels[1::2]])
    return seconds, small, len(sites)


def with_torch_pruning(model: nn.Module, x: Tensor) -> tuple[Seconds, nn.Module, int]:
    """Graph, all groups, and every second channel of each removed in place; (seconds, the model, number of groups)."""
    import torch_pruning

    classifier = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]  # the classes stay
    seconds: Seconds = {}
    with timed(seconds, "tp_graph"):
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x)
    with timed(seconds, "tp_groups"):
        groups = list(graph.get_all_groups(ignored_layers=[classifier]))
    with timed(seconds, "tp_prune"):
        for group in groups:
            layer, cut = group[0].dep.target.module, group[0].dep.handler
            part = graph.get_pruning_group(layer, cut, list(range(1, graph.get_out_channels(layer), 2)))
            if graph.check_pruning_group(part):
                part.prune()
    return seconds, model, len(groups)


TOOLS: dict[str, Callable[[nn.Module, Tensor], tuple[Seconds, nn.Module, int]]] = {
    "jpq": with_jpq,
    "tp": with_torch_pruning,
}
GROUPS = {"jpq": "jpq_sites_found", "tp": "tp_groups_found"}  # the column of the number of groups


def runs(model: nn.Module, x: Tensor) -> bool:
    """Whether a forward pass raises nothing."""
    try:
        with torch.no_grad():
            model(x)
    except Exception:
        return False
    return True


def measure(name: str, rounds: int) -> dict[str, Any]:
    """The row of one network."""
    dense = torchvision.models.get_model(name, weights=None).eval()
    x = torch.zeros(1, 3, 224, 224)
    row: dict[str, Any] = {"model": name, "params": _count_parameters(dense)}
    records = [_time_round(dense, x, row) for _ in range(rounds)]
    ratios = [s["tp_total"] / s["jpq_total"] for s in records]
    reading = [(s["tp_graph"] + s["tp_groups"]) / s["jpq_trace_and_sites"] for s in records]
    row |= {f"{key}_s": round(statistics.median(s[key] for s in records), 3) for key in records[0]}
    row |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    row |= {"ratio_of_seeing": statistics.median(reading)}
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def _time_round(dense: nn.Module, x: Tensor, row: dict[str, Any]) -> Seconds:
    """Seconds of each tool on a fresh copy; the first round also notes in `row` what each left of the model."""
    seconds: Seconds = {}
    for tool, prune in TOOLS.items():
        model = copy.deepcopy(dense)
        gc.collect()
        start = time.perf_counter()
        stages, small, count = prune(model, x)
        seconds |= {
            **stages,
            f"{tool}_total": sum(stages.values()),
            f"{tool}_wall": time.perf_counter() - start,
        }
        if f"{tool}_runs" not in row:
            row |= {GROUPS[tool]: count, f"{tool}_runs": runs(small, x)}
            row[f"{tool}_params_left"] = _count_parameters(small) / row["params"]
    return seconds | {"jpq_trace_and_sites": seconds["jpq_total"] - seconds["jpq_rebuild"]}


def _count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def analysis_speed_table() -> list[str]:
    """README's table: seconds by stage of reading a network and removing half of it, beside Torch-Pruning."""
    table = pd.read_csv(PATH)
    head = table.iloc[0]
    lines = [
        f"**Seconds to see a network and to remove every second unit**, 224 x 224 images, {head.hardware}, "
        f"{head.threads} thread, processor time, median of {head.n} in one process, beside Torch-Pruning "
        f"{head.torch_pruning} (group search and pruning of all groups; `python studies/analysis_speed.py`)",
        "",
        "| model | export | labels | check | sites | rebuild | jpq | Torch-Pruning | Torch-Pruning / jpq |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table.itertuples():
        stages = (row.jpq_export_s, row.jpq_labels_s, row.jpq_check_s, row.jpq_sites_s, row.jpq_rebuild_s)
        note = "" if row.tp_runs else " (its model does not run until sizes in its code are set by hand)"
        lines.append(
            f"| {row.model} | {' | '.join(f'{s:.2f}' for s in stages)} | {row.jpq_total_s:.1f} "
            f"| {row.tp_total_s:.1f}{note} | {row.ratio:.2f} ({row.ratio_min:.2f} to {row.ratio_max:.2f}) |"
        )
    return [*lines, ""]


def main() -> None:
    """Measure every network; the CSV is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if find_spec("torch_pruning") is None:
        raise SystemExit("This study compares with Torch-Pruning: pip install torch-pruning --no-deps")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    small = torchvision.models.resnet18(weights=None).eval()
    for prune in TOOLS.values():  # imports and compilation on first use are not counted
        prune(copy.deepcopy(small), torch.zeros(1, 3, 64, 64))
    command = shlex.join(["python", "studies/analysis_speed.py", *sys.argv[1:]])
    rows = []
    for name in args.models:
        about = {"load_1min": round(os.getloadavg()[0], 1), "date": time.strftime("%Y-%m-%d")}
        rows.append(measure(name, args.rounds) | about | provenance(command, args.rounds, ("torch", "torch-pruning")))
        table = pd.DataFrame(rows)
        table.to_csv(PATH, index=False)
        print(table.iloc[-1].to_string(), "\n", flush=True)


if __name__ == "__main__":
    main()
