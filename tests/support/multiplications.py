"""MACs of a model by torch's own counter of floating-point operations, which knows neither our trace nor our rules."""

from __future__ import annotations

import copy
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jpq.tracing.forward import call_model


def _rnn(x: Any, w1: Any, w2: Any, *_: Any, **__: Any) -> int:
    """Two flops for each weight and token of an LSTM that oneDNN runs."""
    return 2 * prod(x[:-1]) * (prod(w1) + prod(w2))


def _vector(matrix: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


EXTRA = {  # ops that torch.utils.flop_counter leaves out
    torch.ops.aten.mkldnn_rnn_layer: _rnn,
    torch.ops.aten.mv: _vector,
    torch.ops.aten.dot: _vector,
    torch.ops.aten.addmv: lambda _, matrix, *__, **___: 2 * prod(matrix),
    torch.ops.aten.addbmm: lambda _, a, b, *__, **___: 2 * prod(a) * b[-1],
}


@torch.no_grad()
def counted_macs(model: nn.Module, example: Any) -> int:
    """Multiply-accumulates of the whole example: half of the flops that torch counts while the model runs."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        counter = FlopCounterMode(display=False, custom_mapping=EXTRA)
        with sdpa_kernel(SDPBackend.MATH), counter:
            call_model(copy.deepcopy(model).eval().requires_grad_(False), example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2
