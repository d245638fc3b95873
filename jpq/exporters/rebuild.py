"""The small model itself: a copy without the channels that were dropped."""

from __future__ import annotations

import copy
from collections.abc import Collection

from torch import Tensor, nn

from jpq.network.accept import unwrapped
from jpq.network.record import Network
from jpq.network.resize import apply_slices, slices

__all__ = ["apply_slices", "shrink", "slices"]


def shrink(model: nn.Module, network: Network, dropped: Collection[int]) -> nn.Module:
    """A deep copy of the float `model` without the channels whose label class is in `dropped`.

    It computes what `model` computes when every weight that reads a dropped channel is zero. Modules and parameters
    that are shared stay shared; DataParallel and torch.compile are taken off.
    """
    model = unwrapped(model)
    cut = slices(network, dropped)
    tensors = [t for t in [*model.parameters(), *model.buffers()] if type(t) in (nn.Parameter, Tensor)]
    borrowed = [t.detach() if type(t) is Tensor else nn.Parameter(t.detach(), t.requires_grad) for t in tensors]
    small = apply_slices(copy.deepcopy(model, dict(zip(map(id, tensors), borrowed, strict=True))), cut)
    for old, new in zip(tensors, borrowed, strict=True):
        if new.data_ptr() == old.data_ptr():  # not sliced: copied only now, so that wide weights never are
            new.data = new.data.clone()
    return small
