"""Costs of a model (bit-operations, MACs, bytes, latency), its budget, and the controller that meets it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jpq.costs.base import Cost, LatencyModel, LayerUse, Number, Part
from jpq.costs.counts import (
    are_timed,
    baseline,
    bops,
    bops_structured,
    dense,
    layer_bops,
    layer_macs,
    macs,
    size,
    structured,
)
from jpq.costs.latency import latency_ns, layer_latency
from jpq.costs.latency_table import LatencyTable
from jpq.lazy import lazy_names
from jpq.types import DENSE

if TYPE_CHECKING:
    from jpq.costs.target import Controller, Target, parse_targets

__all__ = [
    "COSTS",
    "DENSE",
    "Controller",
    "Cost",
    "LatencyModel",
    "LatencyTable",
    "LayerUse",
    "Number",
    "Part",
    "Target",
    "are_timed",
    "baseline",
    "bops",
    "bops_structured",
    "dense",
    "latency_ns",
    "layer_bops",
    "layer_latency",
    "layer_macs",
    "macs",
    "parse_targets",
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

_HOMES = {"Controller": "target", "Target": "target", "parse_targets": "target"}  # which itself needs COSTS
__getattr__, _ = lazy_names(__name__, _HOMES)
