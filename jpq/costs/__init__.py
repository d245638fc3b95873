"""What it spends."""

from jpq.costs.base import Cost, LayerUse
from jpq.costs.counts import baseline, bops, bops_structured, dense, layer_bops, macs, size, structured

COSTS: dict[str, Cost] = {"bops": bops, "bops-structured": bops_structured, "macs": macs, "size": size}

__all__ = [
    "COSTS",
    "Cost",
    "LayerUse",
    "baseline",
    "bops",
    "bops_structured",
    "dense",
    "layer_bops",
    "macs",
    "size",
    "structured",
]
