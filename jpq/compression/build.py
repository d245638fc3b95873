"""The parts of a method on one network: its targets, pruning groups, gates and bit-widths."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import pairwise

from jpq.compression.usage import exact_usage
from jpq.config import CHANNELS, Budget, Config
from jpq.costs.target import Target, parse_targets
from jpq.methods.gates import Frozen, Gate
from jpq.methods.quantizers import BitWidth, Fixed
from jpq.methods.table import Method
from jpq.plan import Plan
from jpq.tracing.channel_shares import ChannelShares
from jpq.tracing.network import Layer, Network
from jpq.tracing.sites import Site, channels, channels_per_consumer, masks
from jpq.types import JpqError

Bounds = tuple[int, int]


def network_targets(network: Network, budget: Budget) -> tuple[Target, ...]:
    """The targets of one budget, in units of this network.

    Raises JpqError for text that is no amount, and for more than the network costs.
    """
    dense = exact_usage(network, ChannelShares(network, ()), Plan("", {}, {}))
    texts = {
        budget.cost: budget.target_bops,
        "macs": budget.target_macs,
        "size": budget.target_size,
        "latency": budget.target_latency,
    }
    return parse_targets(texts, dense)


def budget_targets(network: Network, config: Config) -> dict[str, tuple[Target, ...]]:
    """The targets of each budget of a run, by the budget's name ("" where there is one).

    Raises JpqError where a budget is not below the one before it.
    """
    targets = {name: network_targets(network, each.budget) for name, each in config.each().items()}
    for above, below in pairwise(targets.values()):
        for more, less in zip(above, below, strict=True):
            if less.limit > more.limit or (less.text != more.text and less.limit == more.limit):
                raise JpqError(
                    f"{less.flag} lists {less.text} after {more.text}, and it is not less. List budgets "
                    "from the largest down."
                )
    return targets


def gate_factory(method: Method, density: float = 0.5) -> Callable[[int, int], Gate]:
    """A factory, (rows, n) -> gate, for the pruning groups of a method."""
    if method.gate is None:
        return Frozen.all
    gate: Callable[..., Gate] = method.gate
    return partial(gate, density=density) if method.gate.takes_density else gate


def method_sites(
    method: Method, network: Network, skip: Collection[str], mapping: Mapping[str, str] | None = None
) -> tuple[Site, ...]:
    """The pruning groups of a method: channels, coupled or per consumer, or a mask inside each layer.

    Args:
        method: its structure and kind of sites.
        skip: names of layers that are not pruned.
        mapping: layer -> structure, where layers have structures of their own.
    """
    if method.gate is None:
        return ()
    if method.structure == CHANNELS:
        return channels_per_consumer(network, skip) if method.sites == "per-consumer" else channels(network, skip)
    return masks(network, method.structure if mapping is None else mapping, skip)


def fixed_share(sites: Collection[Site], method: Method, density: float) -> dict[str, float]:
    """Cost -> share of it that stays whatever is learned, for gates that are told how many units stay; else {}."""
    if method.score and method.procedure == "search":
        return {"bops": density, "bops-structured": density}
    if method.gate is None or not method.gate.takes_density or not sites:
        return {}
    structures = [site.taps[0].structure for site in sites]
    quotas = [s.quota() for s in structures]
    share = sum(density if q is None else q / site.n for q, site in zip(quotas, sites, strict=True)) / len(sites)
    return {"bops": share, "bops-structured": share if all(s.regular for s in structures) else 1.0}


def width_factory(
    method: Method,
    w_bits: Bounds,
    a_bits: Bounds,
    image_bits: int,
    start: tuple[float, float],
    starts: Mapping[tuple[str, str], float] | None = None,
) -> Callable[[Layer], tuple[BitWidth, BitWidth]]:
    """A factory, layer -> (bit-width of its weight, of its input); the image has a fixed width.

    Args:
        method: its kind of widths.
        w_bits, a_bits: smallest and largest widths.
        image_bits: width of the model's input.
        start: initial bits of widths that are learned (weights, activations).
        starts: (layer, "w" | "a") -> initial bits of single tensors, in place of these.
    """
    single = starts or {}

    def width(bounds: Bounds, bits: float) -> BitWidth:
        low, high = bounds
        if method.width is Fixed:
            chosen_later = method.gate is None or method.procedure == "measured"
            return Fixed(high, tuple(range(low, high + 1))) if chosen_later else Fixed(high)
        return method.width(bits, low, high)

    def pair(layer: Layer) -> tuple[BitWidth, BitWidth]:
        w, a = single.get((layer.name, "w"), start[0]), single.get((layer.name, "a"), start[1])
        return width(w_bits, w), Fixed(image_bits) if layer.reads_input else width(a_bits, a)

    return pair
