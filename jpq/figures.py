"""What a landed network amounts to: the rows and numbers that a report is made of."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from jpq import costs
from jpq.budget import Target, spent
from jpq.costs.latency import NS
from jpq.network.compressed import Compressed
from jpq.plan import Plan
from jpq.result import LayerRow
from jpq.types import DENSE


def reached(goal: Target, uses: Sequence[costs.LayerUse]) -> dict[str, Any]:
    """How one target was met."""
    cost = int(costs.COSTS[goal.cost](uses))
    line = {"asked": goal.asked, "limit": goal.limit, "reached": cost, "used": float(spent(goal, uses))}
    return {**line, "unit": "ns"} if goal.cost == "latency" else line


def layer_rows(net: Compressed, plan: Plan, cost: str = "bops") -> tuple[LayerRow, ...]:
    """One row per layer of the landed model; bit-operations as `cost` ("bops" or "bops-structured") counts them."""
    densities = net.densities.exact(plan.masks)
    uses = net.exact(plan)
    counted = uses if cost == "bops" else costs.structured(uses)
    total = costs.bops(counted)
    inputs, outputs = net.shares.exact(plan.kept)
    rows = []
    every = zip(net.network.layers, uses, counted, inputs, outputs, strict=True)
    for layer, use, count, (i, i_all), (o, o_all) in every:
        bops = int(costs.layer_bops(count))
        kept = (i, i_all) if i_all == len(layer.inputs) else (o, o_all)  # depthwise reads what it writes
        macs = int(use.macs * use.inputs * use.outputs * use.density)
        density = float(densities[layer.name].share) if layer.name in densities else 1.0
        bits = int(use.w_bits), int(use.a_bits)
        ms = None if use.clock is None else float(costs.layer_latency(use)) / NS
        structure = plan.structures.get(layer.name, DENSE)
        share = float(bops / total)
        row = LayerRow(layer.name, layer.kind, *kept, o, o_all, *bits, macs, bops, share, density, structure, ms)
        rows.append(row)
    return tuple(rows)


def versions() -> dict[str, str]:
    """What this run was computed with."""
    names = ("jpq", "torch", "torchvision", "brevitas", "numpy", "onnx", "onnxruntime")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "cores": str(os.cpu_count()),
    }
