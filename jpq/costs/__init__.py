"""Costs of a model (bit-operations, MACs, bytes, latency), its budget, and the controller that holds it."""

from __future__ import annotations

from jpq.costs.base import Cost, LatencyModel, LayerUse, Number
from jpq.costs.counts import baseline, bops, bops_structured, dense, layer_bops, macs, size, structured
from jpq.costs.latency import latency_ns, layer_latency
from jpq.types import DENSE

__all__ = [
    "COSTS",
    "DENSE",
    "Cost",
    "LatencyModel",
    "LayerUse",
    "Number",
    "baseline",
    "bops",
    "bops_structured",
    "dense",
    "latency_ns",
    "layer_bops",
    "layer_latency",
    "macs",
    "size",
    "structured",
]

COSTS: dict[str, Cost] = {
    "bops": bops,
    "bops-structured": bops_structured,
    "macs": macs,
    "size": size,
    "latency": latency_ns,
}
