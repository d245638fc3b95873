"""Networks of the test zoo and of READERS, each built and traced once in a test session."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import nn
from zoo import ZOO
from zoo.readers import IMAGE, READERS

from jpq.tracing.network import Network
from jpq.tracing.trace import trace

NETS = {**{name: (make, IMAGE) for name, make in READERS.items()}, **{f"zoo_{n}": pair for n, pair in ZOO.items()}}


@cache
def _traced(name: str) -> tuple[nn.Module, Network]:
    make, example = NETS[name]
    with torch.random.fork_rng(devices=[]):  # a test's own numbers must not depend on which test traced the net
        torch.manual_seed(0)
        model = make()
        return model, trace(model, example)


def traced(name: str) -> tuple[nn.Module, Any, Network]:
    """(copy of the model, example, network): the copy may be changed, the network is shared and must not be."""
    model, network = _traced(name)
    return copy.deepcopy(model), NETS[name][1], network


def traced_network(name: str) -> Network:
    """The network alone, for tests with a model of their own seed or precision; it must not be changed."""
    return _traced(name)[1]
