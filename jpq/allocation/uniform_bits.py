"""The same bits everywhere: plain quantization-aware training, the honest baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jpq.compression.model import CompressedModel
from jpq.compression.usage import exact_usage
from jpq.costs import COSTS, bops
from jpq.costs.target import Target, all_met, used_share
from jpq.plan import LayerPlan, Plan
from jpq.tracing.channel_shares import ChannelShares
from jpq.tracing.network import Network
from jpq.types import JpqError

Kept = Mapping[str, tuple[bool, ...]]  # channel site -> unit -> whether it stays

HEADROOM = 1.25
Bounds = tuple[int, int]


def everywhere(net: CompressedModel, w: int, a: int, kept: Kept | None = None) -> Plan:
    """One width for all weights and one for all activations; the image keeps its own. `kept`: default, every unit."""
    now = net.plan()
    image = {layer.name for layer in net.network.layers if layer.reads_input}
    layers = {n: replace(x, w_bits=w, a_bits=x.a_bits if n in image else a) for n, x in now.layers.items()}
    every = {site: (True,) * len(units) for site, units in now.kept.items()}
    return replace(now, layers=layers, kept=every if kept is None else dict(kept))


def uniform(
    net: CompressedModel,
    targets: Sequence[Target],
    w_bits: Sequence[int],
    a_bits: Sequence[int],
    kept: Kept | None = None,
) -> Plan:
    """The dearest balanced pair (weight bits, activation bits, at most 1 apart) that meets every target.

    Nothing is pruned, unless `kept` says which units stay. Of pairs that cost the same the more balanced is taken; an
    unbalanced one (W2A5) only where no balanced one fits. The image keeps its width.
    Raises JpqError, naming the smallest possible cost, if no pair does.
    """
    fits: list[tuple[bool, float, int, Plan]] = []
    for w in w_bits:
        for a in a_bits:
            plan = everywhere(net, w, a, kept)
            uses = net.exact_usage(plan)
            if all_met(targets, uses):
                fits.append((abs(w - a) <= 1, float(bops(uses)), -abs(w - a), plan))
            least = min(targets, key=lambda g: -used_share(g, uses)) if targets else None
            if (w, a) == (w_bits[0], a_bits[0]) and least is not None and used_share(least, uses) > 1:
                raise JpqError(
                    f"{least.flag} {least.text} ({least.format_cost(least.limit)}) cannot be met by uniform bits; "
                    f"smallest possible: {least.format_cost(used_share(least, uses) * least.limit)}, at {w} and {a} "
                    "bits. Choose a method that prunes too."
                )
    return max(fits, key=lambda fit: fit[:3])[3]


def start_bits(
    network: Network,
    targets: Sequence[Target],
    w_bits: Bounds,
    a_bits: Bounds,
    image_bits: int,
    left: Mapping[str, float] | None = None,
    headroom: float = HEADROOM,
) -> tuple[float, float]:
    """(weight, activation) widths, real numbers, at which the network costs `headroom` times its tightest target.

    `left`: cost -> the share of it that stays whatever is learned (masks of a given density). At least one bit above
    the smallest width (so that there is a way down), at most the largest. With a target for latency alone: the largest.
    """
    shares = ChannelShares(network, ())
    stays = left or {}
    targets = [g for g in targets if g.cost != "latency"]  # what runs as int8 gains no time from fewer bits
    if not targets:
        return float(w_bits[1]), float(a_bits[1])

    def excess(bits: float) -> float:
        return max(stays.get(g.cost, 1.0) * _cost(network, shares, bits, image_bits, g) / g.limit for g in targets)

    low, high = 1.0, 16.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < headroom else (low, middle)
    w, a = (min(max(low, bounds[0] + 1.0), float(bounds[1])) for bounds in (w_bits, a_bits))
    return w, a


def _cost(network: Network, shares: ChannelShares, bits: float, image_bits: int, goal: Target) -> float:
    fake = {x.name: LayerPlan(bits, image_bits if x.reads_input else bits, False) for x in network.layers}  # type: ignore[arg-type]
    return float(COSTS[goal.cost](exact_usage(network, shares, Plan("", fake, {}))))
