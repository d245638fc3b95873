"""What a landed network amounts to: the rows and numbers that a report is made of."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from jpq import costs
from jpq.budget import Target, spent
from jpq.costs.latency import NS
from jpq.network.compressed import FLOAT_BITS, Compressed
from jpq.plan import Plan
from jpq.result import LayerRow
from jpq.types import DENSE

UNIFORM = (2, 3, 4, 8)  # bits of the baselines that a front is drawn beside


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
        rows.append(
            LayerRow(
                layer.name, layer.kind, *kept, o, o_all, *bits, macs, bops, share, density, structure, ms, use.macs
            )
        )  # fmt: skip
    return tuple(rows)


def uniform_costs(net: Compressed, uses: Sequence[costs.LayerUse]) -> dict[str, dict[str, float]]:
    """What the whole model costs at the same bits everywhere (the image keeps its own), by "W4A4" and measure."""
    found = {}
    for bits in UNIFORM:
        whole = [
            costs.dense(u) if u.w_bits == FLOAT_BITS
            else replace(costs.dense(u, bits), a_bits=u.a_bits if layer.reads_input else bits)
            for u, layer in zip(uses, net.network.layers, strict=True)
        ]  # fmt: skip
        spent = {"bops": float(costs.bops(whole)), "macs": float(costs.macs(whole)), "size": float(costs.size(whole))}
        clocks = {"latency": float(costs.latency_ns(whole))} if all(u.clock for u in uses) else {}
        found[f"W{bits}A{bits}"] = {**spent, "bops-structured": spent["bops"], **clocks}
    return found


def versions() -> dict[str, str]:
    """What this run was computed with."""
    names = ("jpq", "torch", "torchvision", "brevitas", "numpy", "onnx", "onnxruntime")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "cores": str(os.cpu_count()),
    }
