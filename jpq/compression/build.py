"""What a method is made of on one network: where it acts, its gates and widths, and plans that need no search."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import pairwise

from jpq.compression.usage import exact_usage
from jpq.config import CHANNELS, Config
from jpq.costs.target import Target, parse_targets
from jpq.methods.gates import FixedCount, Frozen, Gate, Ranked
from jpq.methods.quantizers import BitWidth, Fixed
from jpq.methods.table import Method
from jpq.plan import Plan
from jpq.tracing.channel_shares import ChannelShares
from jpq.tracing.network import Layer, Network
from jpq.tracing.sites import Site, channels, masks, per_consumer
from jpq.types import JpqError

Bounds = tuple[int, int]


def network_targets(network: Network, config: Config) -> tuple[Target, ...]:
    """The targets, in units of this network."""
    b = config.budget
    dense = exact_usage(network, ChannelShares(network, ()), Plan(config.decide.method, {}, {}))
    wanted = {b.cost: b.target_bops, "macs": b.target_macs, "size": b.target_size, "latency": b.target_latency}
    return parse_targets(wanted, dense)


def budget_targets(network: Network, config: Config) -> dict[str, tuple[Target, ...]]:
    """The targets of each budget that one run follows down, by the budget's name ("" where there is one).

    Raises JpqError where one does not lie below the one before it.
    """
    found = {name: network_targets(network, one) for name, one in config.each().items()}
    for above, below in pairwise(found.values()):
        for more, less in zip(above, below, strict=True):
            if less.limit > more.limit or (less.text != more.text and less.limit == more.limit):
                raise JpqError(
                    f"{less.flag} lists {less.text} after {more.text}, and it is not less. List budgets "
                    "from the largest down."
                )
    return found


def gate_factory(method: Method, density: float = 0.5) -> Callable[[int, int], Gate]:
    """What makes the gate of a site."""
    if method.gate is None:
        return Frozen.all
    return partial(method.gate, density=density) if issubclass(method.gate, FixedCount) else method.gate


def method_sites(
    method: Method, network: Network, skip: Collection[str], mapping: Mapping[str, str] | None = None
) -> tuple[Site, ...]:
    """Where the method acts: coupled channels, or the weights of each layer, by a mapping where each has its own."""
    if method.gate is None:
        return ()
    if method.structure == CHANNELS:
        return per_consumer(network, skip) if method.sites == "per-consumer" else channels(network, skip)
    return masks(network, method.structure if mapping is None else mapping, skip)


def fixed_share(sites: Collection[Site], method: Method, density: float) -> dict[str, float]:
    """Cost -> share of it that stays whatever is learned: of gates that are told how many units stay."""
    if method.gate is Ranked and method.searches:
        return {"bops": density, "bops-structured": density}
    if method.gate is None or not issubclass(method.gate, FixedCount) or not sites:
        return {}
    structures = [site.taps[0].structure for site in sites]
    quotas = [s.quota() for s in structures]
    share = sum(density if q is None else q / site.n for q, site in zip(quotas, sites, strict=True)) / len(sites)
    return {"bops": share, "bops-structured": share if all(s.regular for s in structures) else 1.0}


def width_factory(
    method: Method, w_bits: Bounds, a_bits: Bounds, image_bits: int, start: tuple[float, float]
) -> Callable[[Layer], tuple[BitWidth, BitWidth]]:
    """What makes the widths of a layer's weight and input: the method's, and the image's fixed one.

    `start` is where widths that learn begin (weights, activations).
    """

    def one(bounds: Bounds, bits: float) -> BitWidth:
        low, high = bounds
        if method.width is Fixed:
            return Fixed(high) if method.gate else Fixed(high, tuple(range(low, high + 1)))
        return method.width(bits, low, high)

    def pair(layer: Layer) -> tuple[BitWidth, BitWidth]:
        return one(w_bits, start[0]), Fixed(image_bits) if layer.reads_input else one(a_bits, start[1])

    return pair
