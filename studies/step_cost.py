"""Cost of one training step relative to the float model: forward, backward and optimizer, one CPU thread.

    python studies/step_cost.py [--batch 64 128] [--rounds 15]

Compared in one process, in turn, round by round: float; a bare fused autograd function for scale-round-clamp on
weights and inputs (jpq's, without gates, bits or cost); jpq with everything on (VIB gates, learned bits on weights and
activations, learned ranges, BOPs pressure), in float32 and in bfloat16; plain brevitas int8. Writes
results/step_cost.csv with medians and ratios. ResNet20, x86-64 CPU; studies/README.md has the ratios.
"""

from __future__ import annotations

import argparse
import copy
import logging
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import pandas as pd
import torch
from support.result_rows import RESULTS, provenance
from torch import nn

import jpq
from jpq.costs import Controller, parse_targets
from jpq.methods.gates import VIB, Frozen
from jpq.methods.quantizers import Fixed, Learned
from jpq.tasks import build_model
from jpq.tracing import Layer
from jpq.training import Objective, build_optimizer

PATH = RESULTS / "step_cost.csv"
Step = Callable[[], None]


def brevitas_int8(model: nn.Module) -> nn.Module:
    """Plain brevitas: int8 weights and inputs, per-tensor activations, layer by layer."""
    from brevitas.graph.quantize import layerwise_quantize

    return layerwise_quantize(copy.deepcopy(model))


def learned_widths(layer: Layer) -> tuple[Learned | Fixed, Learned | Fixed]:
    """Learned bits for weights and activations; the image stays at 8."""
    return Learned(6, 2, 8), Fixed(8) if layer.reads_input else Learned(6, 2, 8)


def eight_bits(layer: Layer) -> tuple[Fixed, Fixed]:
    """8 bits for weights and activations."""
    return Fixed(8), Fixed(8)


def search_model(
    model: nn.Module, x: torch.Tensor, precision: str = "float32"
) -> tuple[jpq.CompressedModel, Objective]:
    """The network and the loss of the search phase."""
    network = jpq.trace(model, x[:2])
    net = jpq.attach(model, network, jpq.channels(network), VIB, learned_widths, [x], "djpq")
    controller = Controller(parse_targets({"bops": "1%"}, net.exact_usage()))
    controller.begin(net.exact_usage())
    return net, Objective(gate_weight=0.02, controller=controller, precision=precision)


def bare_quantizers(model: nn.Module, x: torch.Tensor) -> jpq.CompressedModel:
    """Scale-round-clamp alone."""
    network = jpq.trace(model, x[:2])
    net = jpq.attach(model, network, (), Frozen.all, eight_bits, [x], "uniform")
    for name, p in net.named_parameters():
        p.requires_grad_("log_threshold" not in name)
    return net


def training_step(net: nn.Module, objective: Objective, x: torch.Tensor, y: torch.Tensor) -> Step:
    """One whole training step on a batch."""
    is_compressed = isinstance(net, jpq.CompressedModel)
    optim = build_optimizer(net, 1e-3, 1e-4, 0.02, 0.02) if is_compressed else torch.optim.AdamW(net.parameters())

    def step() -> None:
        net.train()
        loss = objective(net, x, y, 0.9)
        optim.zero_grad()
        loss.backward()
        optim.step()
        if is_compressed:
            net.after_step(0.9)

    return step


def steps_to_time(batch: int) -> dict[str, Step]:
    """The training steps that are compared, on one random batch."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    model = build_model("resnet20", 10, 3)
    return {
        "float": training_step(copy.deepcopy(model), Objective(), x, y),
        "bare fused quantizers": training_step(bare_quantizers(model, x), Objective(), x, y),
        "jpq: gates, learned bits, ranges, BOPs": training_step(*search_model(model, x), x, y),
        "jpq, --precision bfloat16": training_step(*search_model(model, x, "bfloat16"), x, y),
        "brevitas int8": training_step(brevitas_int8(model), Objective(), x, y),
    }


def time_steps(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, in turns, after two to warm up."""
    for step in steps.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def step_cost_table() -> list[str]:
    """README's table: the ratio of each step to the float model's."""
    table = pd.read_csv(PATH)
    lines = [
        "**One training step of ResNet20**, CPU, one thread, times the float model's in the same process (median; "
        "`python studies/step_cost.py`)",
        "",
        "| step | batch | n | ratio | smallest to largest |",
        "|---|---|---|---|---|",
    ]
    for row in table[table.step != "float"].itertuples():
        lines.append(
            f"| {row.step} | {row.batch} | {row.n} | {row.ratio_to_float:.2f} "
            f"| {row.ratio_min:.2f} to {row.ratio_max:.2f} |"
        )
    return [*lines, ""]


def main() -> None:
    """Time every step at every batch size; write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    command = shlex.join(["python", "studies/step_cost.py", *sys.argv[1:]])
    rows = []
    for batch in args.batch:
        seconds = time_steps(steps_to_time(batch), args.rounds)
        for name, times in seconds.items():
            ratios = [t / f for t, f in zip(times, seconds["float"], strict=True)]
            rows.append(
                {
                    "model": "resnet20",
                    "batch": batch,
                    "step": name,
                    "median_ms": round(1000 * statistics.median(times), 1),
                    "ratio_to_float": round(statistics.median(ratios), 3),
                    "ratio_min": round(min(ratios), 3),
                    "ratio_max": round(max(ratios), 3),
                    **provenance(command, args.rounds, ("torch", "brevitas")),
                }
            )
    table = pd.DataFrame(rows)
    table.to_csv(PATH, index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
