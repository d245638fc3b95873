"""What it spends."""

from jpq.costs.base import Cost, LayerUse
from jpq.costs.counts import baseline, bops, dense, layer_bops, macs, size

COSTS: dict[str, Cost] = {"bops": bops, "macs": macs, "size": size}

__all__ = ["COSTS", "Cost", "LayerUse", "baseline", "bops", "dense", "layer_bops", "macs", "size"]
