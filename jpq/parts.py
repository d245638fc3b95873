"""What a method is made of on one network: where it acts, its gates and widths, and plans that need no search."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import pairwise

from jpq import landing
from jpq.allocators import Judge, place, uniform
from jpq.budget import Target, meets, targets
from jpq.closing import open_share
from jpq.compose import CHANNELS
from jpq.config import Config
from jpq.gates import Counted, Decided, Gate, Ranked
from jpq.methods import METHODS, Method
from jpq.network.compressed import Compressed, exact_uses
from jpq.network.record import Layer, Network
from jpq.network.shares import Shares
from jpq.network.sites import Site, masks
from jpq.plan import Plan
from jpq.quantizers import Fixed, Width
from jpq.scores import Score
from jpq.types import JpqError

Bounds = tuple[int, int]


def asked(network: Network, config: Config) -> tuple[Target, ...]:
    """The targets, in units of this network."""
    b = config.budget
    dense = exact_uses(network, Shares(network, ()), Plan(config.decide.method, {}, {}))
    wanted = {b.cost: b.target_bops, "macs": b.target_macs, "size": b.target_size, "latency": b.target_latency}
    return targets(wanted, dense)


def budgets(network: Network, config: Config) -> dict[str, tuple[Target, ...]]:
    """The targets of each budget that one run follows down, by the budget's name ("" where there is one).

    Raises JpqError where one does not lie below the one before it.
    """
    found = {name: asked(network, one) for name, one in config.each().items()}
    for above, below in pairwise(found.values()):
        for more, less in zip(above, below, strict=True):
            if less.limit > more.limit or (less.asked != more.asked and less.limit == more.limit):
                raise JpqError(f"{less.flag} lists {less.asked} after {more.asked}, and it is not less. List budgets "
                               "from the largest down.")  # fmt: skip
    return found


def decide(
    net: Compressed, goals: Sequence[Target], w_bits: Bounds, a_bits: Bounds, score: Score, judge: Judge | None,
    allocator: str = "",
) -> Plan:  # fmt: skip
    """The plan of a method that does not search: uniform bits, or the units that a score and an allocator put first.

    Without a judge the ranking stands as it is: enough to tell targets that cannot be met.
    """
    if METHODS[net.method].gate is None:
        return uniform(net, goals, range(w_bits[0], w_bits[1] + 1), range(a_bits[0], a_bits[1] + 1))
    if judge:
        place(net, score, allocator, judge, open_share(net, lambda uses: meets(goals, uses)), goals[0])
    return landing.land(net, goals)


def gates(method: Method, density: float = 0.5) -> Callable[[int, int], Gate]:
    """What makes the gate of a site."""
    if method.gate is None:
        return Decided.all
    return partial(method.gate, density=density) if issubclass(method.gate, Counted) else method.gate


def sites_of(
    method: Method, network: Network, skip: Collection[str], mapping: Mapping[str, str] | None = None
) -> tuple[Site, ...]:
    """Where the method acts: coupled channels, or the weights of each layer, by a mapping where each has its own."""
    if method.gate is None:
        return ()
    if method.structure == CHANNELS:
        return method.sites(network, skip)
    return masks(network, method.structure if mapping is None else mapping, skip)


def share_left(sites: Collection[Site], method: Method, density: float) -> dict[str, float]:
    """Cost -> share of it that stays whatever is learned: of gates that are told how many units stay."""
    if method.gate is Ranked and method.searches:
        return {"bops": density, "bops-structured": density}
    if method.gate is None or not issubclass(method.gate, Counted) or not sites:
        return {}
    structures = [site.taps[0].structure for site in sites]
    quotas = [s.quota() for s in structures]
    share = sum(density if q is None else q / site.n for q, site in zip(quotas, sites, strict=True)) / len(sites)
    return {"bops": share, "bops-structured": share if all(s.regular for s in structures) else 1.0}


def widths(
    method: Method, w_bits: Bounds, a_bits: Bounds, image_bits: int, start: tuple[float, float]
) -> Callable[[Layer], tuple[Width, Width]]:
    """What makes the widths of a layer's weight and input: the method's, and the image's fixed one.

    `start` is where widths that learn begin (weights, activations).
    """

    def one(bounds: Bounds, bits: float) -> Width:
        low, high = bounds
        if method.width is Fixed:
            return Fixed(high) if method.gate else Fixed(high, tuple(range(low, high + 1)))
        return method.width(bits, low, high)

    def pair(layer: Layer) -> tuple[Width, Width]:
        return one(w_bits, start[0]), Fixed(image_bits) if layer.reads_input else one(a_bits, start[1])

    return pair
