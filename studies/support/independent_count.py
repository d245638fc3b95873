"""MACs by torch's own counter of floating-point operations, which knows neither jpq's trace nor its rules."""

from __future__ import annotations

import copy
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jpq.tracing import call_model


def _vector(matrix: Any, *_: Any, **__: Any) -> int:
    """Two flops for every number of a matrix that is multiplied by a vector."""
    return 2 * prod(matrix)


_LEFT_OUT = {  # ops that torch.utils.flop_counter does not know
    torch.ops.aten.mv: _vector,
    torch.ops.aten.dot: _vector,
    torch.ops.aten.addmv: lambda _, matrix, *__, **___: 2 * prod(matrix),
    torch.ops.aten.addbmm: lambda _, a, b, *__, **___: 2 * prod(a) * b[-1],
}


@torch.no_grad()
def count_macs(model: nn.Module, example: Any) -> int:
    """Multiply-accumulates of the whole example: half of the flops that torch counts while the model runs.

    Attention and recurrent layers run by their plain ops, so that the counter sees every product.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        counter = FlopCounterMode(display=False, custom_mapping=_LEFT_OUT)
        with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH), counter:
            call_model(copy.deepcopy(model).eval().requires_grad_(False), example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    flops = counter.get_total_flops()
    assert flops % 2 == 0, "a multiplication and an addition each"
    return flops // 2
