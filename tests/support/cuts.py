"""A net of the zoo as `trace` reads it, whole and rebuilt without some of its channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from traces import traced

from jpq.tracing.network import Network
from jpq.tracing.shrink import remove_channels
from jpq.tracing.sites import Site, channels
from jpq.tracing.trace import trace


class Cut(NamedTuple):
    network: Network
    sites: Sequence[Site]
    gone: set[int]
    again: Network  # of the model without those channels


def cut(name: str, choose: Callable[[Sequence[Site]], set[int]]) -> Cut:
    """The net without the channels that `choose` takes from its sites."""
    model, example, network = traced(f"zoo_{name}")
    sites = channels(network)
    gone = choose(sites)
    return Cut(network, sites, gone, trace(remove_channels(model.eval(), network, gone), example))
