"""Seconds of a sensitivity table, and of the solver that decides from it, one CPU thread.

    python studies/sensitivity_speed.py                                      # both, ResNet20 alone
    python studies/sensitivity_speed.py --models resnet18 densenet201 --parts solver [--rounds 3]

Seconds of the processor (so that a machine that others use, too, tells the same), medians over rounds in one process:

- table: one pass over 512 samples by layers that mask and round their weight in every pass, as brevitas's do, and by
  those that keep it and convolve in channels-last order, in turn; and how many such passes the whole table takes (only
  the part behind a change runs again), which gives the seconds of the table;
- solver: bits and units at 1 and 0.5 % of the BOPs from tables whose divergences are drawn at random, one a round.

Writes results/sensitivity_speed.csv and results/solver_times.csv. Networks have random weights, which change no time.
Shared x86-64 cores, November 2026.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torchvision
from support.result_rows import RESULTS, append_row, provenance
from torch import Tensor, nn

import jpq
from jpq.allocation import Probe, SensitivityTable, Solver, estimate_cost, mix_pairs
from jpq.costs import parse_targets
from jpq.methods.gates import Frozen
from jpq.methods.quantizers import Fixed
from jpq.tasks import CLASSIFICATION, build_model
from jpq.tracing import Layer

SIZES = {"resnet20": 32, "resnet18": 224, "densenet201": 224}  # network -> pixels of a side
BITS = (2, 8)
SAMPLES = 512
BATCH = 64
BUDGETS = ("1%", "0.5%")
EIGHTHS = range(1, 9)


def eight_bits(layer: Layer) -> tuple[Fixed, Fixed]:
    """8 bits for weights and activations."""
    return Fixed(8), Fixed(8)


def attached(name: str, x: Tensor) -> jpq.CompressedModel:
    """A network with random weights, and a gate at every site."""
    model: nn.Module = build_model(name, 10, 3) if name == "resnet20" else getattr(torchvision.models, name)()
    network = jpq.trace(model.eval(), x[:2])
    return jpq.attach(model, network, jpq.channels(network), Frozen.all, eight_bits, [x], "measured")


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    """Processor seconds of some work, the median over rounds."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def table_row(name: str, samples: int, rounds: int) -> dict[str, object]:
    """The seconds of passes, in turn, and of the table that they give."""
    torch.manual_seed(0)
    size = SIZES[name]
    plain = list(torch.randn(samples, 3, size, size).split(BATCH))
    net = attached(name, plain[0])
    orders = {site.name: list(range(site.n)) for site in net.sites if not site.is_mask}
    probes = [Probe(net, [mix_pairs(x) for x in plain], plain, CLASSIFICATION.divergence, orders) for _ in range(2)]
    probes[1].direct.restore()
    for probe in probes:
        probe.measure()
    seconds = [[median_seconds(probe.measure, 1) for probe in probes] for _ in range(rounds)]
    now, before = (statistics.median(column) for column in zip(*seconds, strict=True))
    cost = estimate_cost(probes[0], BITS, BITS)
    passes = cost.seconds["single"] / cost.pass_seconds
    return {
        "model": name,
        "pixels": size,
        "samples": samples,
        "entries": cost.changes,
        "passes": round(passes, 1),
        "pass_before": round(before, 4),
        "pass_now": round(now, 4),
        "ratio": round(statistics.median(b / a for a, b in seconds), 3),
        "table_now": round(passes * now, 1),
    }


def drawn_table(net: jpq.CompressedModel, seed: int) -> SensitivityTable:
    """A table of falling divergences that are drawn at random: tensors and sites differ by factors of a thousand."""
    draw = np.random.default_rng(seed)
    image = {layer.name for layer in net.network.layers if layer.reads_input}
    sides: tuple[Literal["w"], Literal["a"]] = ("w", "a")
    bits: dict[tuple[str, Literal["w", "a"]], dict[int, float]] = {}
    for name in net.plan().layers:
        for side in sides:
            if side == "w" or name not in image:
                scale, base = 10 ** draw.uniform(-4, -1), draw.uniform(2.5, 4.5)
                bits[name, side] = {b: float(scale * base ** (2 - b)) for b in range(BITS[0], BITS[1] + 1)}
    units: dict[str, dict[int, float]] = {}
    orders: dict[str, tuple[int, ...]] = {}
    for site in net.sites:
        scale = 10 ** draw.uniform(-2, 0.5)
        counts = {min(net.counts(site), key=lambda k, e=eighths, n=site.n: abs(k - e * n / 8)) for eighths in EIGHTHS}
        units[site.name] = {k: float(scale * (1 - k / site.n) ** 2) for k in sorted(counts)}
        orders[site.name] = tuple(draw.permutation(site.n).tolist())
    return SensitivityTable(bits, units, orders, "single", "-", "-", 2)


def solver_rows(name: str, rounds: int) -> list[dict[str, object]]:
    """The seconds of the solver at each budget."""
    torch.manual_seed(0)
    net = attached(name, torch.randn(2, 3, SIZES[name], SIZES[name]))
    tables = [drawn_table(net, seed) for seed in range(rounds)]
    return [solver_row(net, tables, name, budget) for budget in BUDGETS]


def solver_row(
    net: jpq.CompressedModel, tables: Sequence[SensitivityTable], name: str, budget: str
) -> dict[str, object]:
    """The seconds of the solver at one budget, with units free and with bits alone."""
    targets = parse_targets({"bops": budget, "macs": None, "size": None}, net.exact_usage())
    seconds: Mapping[bool, list[float]] = {True: [], False: []}
    for table in tables:
        for free, times in seconds.items():

            def solve(table: SensitivityTable = table, free: bool = free) -> None:
                solver = Solver(net, table, targets, free_units=free)
                solver.fill(solver.solve().plan)

            times.append(median_seconds(solve, 1))
    return {
        "model": name,
        "layers": len(net.plan().layers),
        "sites": len(net.sites),
        "target": budget,
        "seconds": round(statistics.median(seconds[True]), 3),
        "slowest": round(max(seconds[True]), 3),
        "seconds_bits_alone": round(statistics.median(seconds[False]), 3),
    }


def main() -> None:
    """Time what the flags name; append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=["resnet20"])
    parser.add_argument("--parts", nargs="+", choices=["table", "solver"], default=["table", "solver"])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    command = shlex.join(["python", "studies/sensitivity_speed.py", *sys.argv[1:]])
    for name in args.models:
        if "solver" in args.parts:
            for row in solver_rows(name, args.rounds):
                print(row, flush=True)
                append_row(RESULTS / "solver_times.csv", row | provenance(command, args.rounds, ("torch", "scipy")))
        if "table" in args.parts:
            row = table_row(name, args.samples, args.rounds)
            print(row, flush=True)
            append_row(RESULTS / "sensitivity_speed.csv", row | provenance(command, args.rounds))


if __name__ == "__main__":
    main()
