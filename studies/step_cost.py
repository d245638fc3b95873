"""What one training step costs, relative to the float model: forward, backward and optimiser, one CPU thread.

    python studies/step_cost.py [--batch 64 128] [--rounds 15]

Compared in one process, in turn, round by round: float; a bare fused autograd function for scale-round-clamp on
weights and inputs (jpq's, without gates, bits or cost); jpq with everything on (VIB gates, learned bits on weights and
activations, learned ranges, BOPs pressure); plain brevitas int8. Writes results/step_cost.csv with medians and ratios.
"""

from __future__ import annotations

import argparse
import copy
import logging
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import jpq
from jpq.compression.attach import attach
from jpq.compression.model import CompressedModel
from jpq.costs.target import Controller, parse_targets
from jpq.methods.gates import VIB, Frozen
from jpq.methods.quantizers import Fixed, Learned
from jpq.training.loop import Objective, optimizer

RESULTS = Path(__file__).parent / "results"


def brevitas_int8(model: nn.Module) -> nn.Module:
    """Plain brevitas: int8 weights and inputs, per-tensor activations, layer by layer."""
    from brevitas.graph.quantize import layerwise_quantize

    return layerwise_quantize(copy.deepcopy(model))


def joint(model: nn.Module, x: torch.Tensor) -> tuple[CompressedModel, Objective]:
    """The network and loss of the search phase."""
    network = jpq.trace(model, x[:2])
    net = attach(
        model,
        network,
        jpq.channels(network),
        VIB,
        lambda layer: (Learned(6, 2, 8), Fixed(8) if layer.reads_input else Learned(6, 2, 8)),
        [x],
        "djpq",
    )
    controller = Controller(parse_targets({"bops": "1%"}, net.exact_usage()))
    controller.begin(net.exact_usage())
    return net, Objective(gate_weight=0.02, controller=controller)


def bare(model: nn.Module, x: torch.Tensor) -> CompressedModel:
    """Scale-round-clamp alone."""
    network = jpq.trace(model, x[:2])
    net = attach(model, network, (), Frozen.all, lambda layer: (Fixed(8), Fixed(8)), [x], "uniform")
    for name, p in net.named_parameters():
        p.requires_grad_("log_threshold" not in name)
    return net


def stepper(net: nn.Module, objective: Objective, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """One whole training step."""
    optim = (
        optimizer(net, 1e-3, 1e-4, 0.02, 0.02)
        if isinstance(net, CompressedModel)
        else torch.optim.AdamW(net.parameters())
    )

    def step() -> None:
        net.train()
        loss = objective(net, x, y, 0.9)
        optim.zero_grad()
        loss.backward()
        optim.step()
        if isinstance(net, CompressedModel):
            net.after_step(0.9)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for batch in args.batch:
        torch.manual_seed(0)
        x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
        model = jpq.tasks.models.build("resnet20", 10, 3)
        net, objective = joint(model, x)
        steps = {
            "float": stepper(copy.deepcopy(model), Objective(), x, y),
            "bare fused quantizers": stepper(bare(model, x), Objective(), x, y),
            "jpq: gates, learned bits, ranges, BOPs": stepper(net, objective, x, y),
            "brevitas int8": stepper(brevitas_int8(model), Objective(), x, y),
        }
        for step in steps.values():
            step()
            step()
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(args.rounds):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
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
                    "n": args.rounds,
                    "threads": 1,
                    "torch": torch.__version__,
                    "hardware": f"{platform.machine()} CPU, 1 thread",
                }
            )
    table = pd.DataFrame(rows)
    table.to_csv(RESULTS / "step_cost.csv", index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
