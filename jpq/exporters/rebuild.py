"""The small model itself: a copy without the channels that were dropped."""

from __future__ import annotations

import copy
from collections.abc import Collection

from torch import nn

from jpq.network.record import Network
from jpq.network.resize import apply_slices, slices

__all__ = ["apply_slices", "shrink", "slices"]


def shrink(model: nn.Module, network: Network, dropped: Collection[int]) -> nn.Module:
    """A deep copy of the float `model` without the channels whose label class is in `dropped`.

    It computes what `model` computes when every weight that reads a dropped channel is zero. Modules and parameters
    that are shared stay shared.
    """
    return apply_slices(copy.deepcopy(model), slices(network, dropped))
