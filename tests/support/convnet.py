"""The convnet of `jpq.tasks.models` on images of 8 x 8: traced once in a test session, and with its units ranked."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from jpq.allocation.ranking.rank import rank_units
from jpq.compression.attach import attach
from jpq.compression.model import CompressedModel
from jpq.methods.gates import Ranked
from jpq.methods.quantizers import Fixed
from jpq.methods.scores import SCORES
from jpq.tasks.models import build
from jpq.tracing.network import Network
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace

EXAMPLE = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Traced(NamedTuple):
    """A float model, an example of its input, and its network."""

    model: nn.Module
    example: torch.Tensor
    network: Network


@cache
def convnet() -> Traced:
    """The convnet with weights of seed 0, built and traced once: tests must not change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build("convnet", 10, 1)
    return Traced(model, EXAMPLE, trace(model, EXAMPLE))


def ranked(seed: int = 0) -> CompressedModel:
    """A convnet of this seed with 8 bits everywhere, its channels ranked by the L1 norm of their weights."""
    torch.manual_seed(seed)
    model, network = build("convnet", 10, 1), convnet().network
    sites = channels(network)
    net = attach(model, network, sites, Ranked, lambda _: (Fixed(8), Fixed(8)), [EXAMPLE], "two-stage")
    rank_units(net, SCORES["l1"])
    return net
