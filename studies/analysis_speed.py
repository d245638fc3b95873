"""How long it takes to see what can go, and to remove half of it: jpq beside Torch-Pruning's dependency graph.

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
seconds that a clock on the wall showed, and the ratio Torch-Pruning / jpq per round.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torchvision
from torch import Tensor, nn

from jpq.tracing.channel_labels import distinct
from jpq.tracing.export_graph import export_graph
from jpq.tracing.op_call import TraceState
from jpq.tracing.shrink import runs_smaller, shrink
from jpq.tracing.sites import channels
from jpq.tracing.trace import record, trace, walk

RESULTS = Path(__file__).parent / "results"
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
    start = time.process_time()
    yield
    seconds[name] = time.process_time() - start


def with_jpq(model: nn.Module, x: Tensor) -> tuple[Seconds, nn.Module, int]:
    """`jpq.trace` in its stages, sites, and the smaller copy; (seconds, small model, sites)."""
    seconds: Seconds = {}
    with timed(seconds, "jpq_export"):
        program = export_graph(model, (x,), {})
    with timed(seconds, "jpq_labels"):
        book, unknown_ops = walk(TraceState(model), program)
        network = record(book, unknown_ops, len(x))
        suspects = {c for labels in book.suspects for c in distinct(book.classes.find(labels))}
    with timed(seconds, "jpq_check"):
        network = runs_smaller(model, network, (x,), {}, suspects)
    with timed(seconds, "jpq_sites"):
        sites = channels(network)
    with timed(seconds, "jpq_rebuild"):
        small = shrink(model, network, [int(c) for s in sites for c in s.labels[1::2]])
    return seconds, small, len(sites)


def with_torch_pruning(model: nn.Module, x: Tensor) -> tuple[Seconds, nn.Module, int]:
    """Graph, all groups, and every second channel of each removed in place; (seconds, the model, groups)."""
    import torch_pruning

    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]  # the classes stay
    seconds: Seconds = {}
    with timed(seconds, "tp_graph"):
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x)
    with timed(seconds, "tp_groups"):
        groups = list(graph.get_all_groups(ignored_layers=[last]))
    with timed(seconds, "tp_prune"):
        for group in groups:
            layer, cut = group[0].dep.target.module, group[0].dep.handler
            part = graph.get_pruning_group(layer, cut, list(range(1, graph.get_out_channels(layer), 2)))
            if graph.check_pruning_group(part):
                part.prune()
    return seconds, model, len(groups)


def runs(model: nn.Module, x: Tensor) -> bool:
    try:
        with torch.no_grad():
            model(x)
    except Exception:
        return False
    return True


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One row."""
    dense = torchvision.models.get_model(name, weights=None).eval()
    x = torch.zeros(1, 3, 224, 224)
    methods: dict[str, Callable[..., tuple[Seconds, nn.Module, int]]] = {"jpq": with_jpq, "tp": with_torch_pruning}
    found: list[Seconds] = []
    row: dict[str, Any] = {"model": name, "params": sum(p.numel() for p in dense.parameters())}
    for _ in range(rounds):
        seconds: Seconds = {}
        for who, method in methods.items():
            model = copy.deepcopy(dense)
            gc.collect()
            start = time.perf_counter()
            spent, small, count = method(model, x)
            seconds |= {**spent, f"{who}_total": sum(spent.values()), f"{who}_wall": time.perf_counter() - start}
            if f"{who}_runs" not in row:
                row |= {f"{who}_{'sites' if who == 'jpq' else 'groups'}_found": count, f"{who}_runs": runs(small, x)}
                row[f"{who}_params_left"] = sum(p.numel() for p in small.parameters()) / row["params"]
        seconds["jpq_trace_and_sites"] = seconds["jpq_total"] - seconds["jpq_rebuild"]
        found.append(seconds)
    ratios = [s["tp_total"] / s["jpq_total"] for s in found]
    see = [(s["tp_graph"] + s["tp_groups"]) / s["jpq_trace_and_sites"] for s in found]
    row |= {f"{key}_s": round(statistics.median(s[key] for s in found), 3) for key in found[0]}
    row |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    row |= {"ratio_of_seeing": statistics.median(see)}
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def main() -> None:
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
    trace(small, torch.zeros(1, 3, 64, 64))  # what is imported and compiled on first use is nobody's time
    with_torch_pruning(small, torch.zeros(1, 3, 64, 64))
    rows = []
    for name in args.models:
        rows.append(
            measure(name, args.rounds)
            | {
                "n": args.rounds,
                "threads": args.threads,
                "torch": torch.__version__,
                "torch_pruning": version("torch-pruning"),
                "hardware": f"{platform.machine()} CPU",
                "load_1min": round(os.getloadavg()[0], 1),
                "date": time.strftime("%Y-%m-%d"),
            }
        )
        table = pd.DataFrame(rows)
        table.to_csv(RESULTS / "analysis_speed.csv", index=False)
        print(table.iloc[-1].to_string(), "\n", flush=True)


if __name__ == "__main__":
    main()
