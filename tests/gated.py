"""Small networks with gates on them, for the tests of single methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from zoo import ZOO

from jpq.gates import Gate
from jpq.network.attach import attach
from jpq.network.compressed import Compressed
from jpq.network.sites import channels
from jpq.network.trace import trace
from jpq.quantizers import Fixed


def gated(name: str, gate: type[Gate], seed: int = 0) -> tuple[nn.Module, Compressed, Any]:
    """(float model, the same with a gate at each site and 8 bits everywhere, example) of a net of the zoo."""
    torch.manual_seed(seed)
    make, example = ZOO[name]
    model = make().eval()
    network = trace(model, example)
    net = attach(model, network, channels(network), gate, lambda layer: (Fixed(8), Fixed(8)), [example], "test")
    return model, net, example
