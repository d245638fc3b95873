"""The same bits everywhere: plain quantization-aware training, the honest baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jpq.budget import Target, meets, spent
from jpq.costs import bops
from jpq.network.compressed import Compressed
from jpq.plan import Plan
from jpq.types import JpqError

Kept = Mapping[str, tuple[bool, ...]]  # channel site -> unit -> whether it stays


def everywhere(net: Compressed, w: int, a: int, kept: Kept | None = None) -> Plan:
    """One width for all weights and one for all activations; the image keeps its own. `kept`: default, every unit."""
    now = net.plan()
    image = {layer.name for layer in net.network.layers if layer.reads_input}
    layers = {n: replace(x, w_bits=w, a_bits=x.a_bits if n in image else a) for n, x in now.layers.items()}
    every = {site: (True,) * len(units) for site, units in now.kept.items()}
    return replace(now, layers=layers, kept=every if kept is None else dict(kept))


def uniform(
    net: Compressed, goals: Sequence[Target], w_bits: Sequence[int], a_bits: Sequence[int], kept: Kept | None = None
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
            uses = net.exact(plan)
            if meets(goals, uses):
                fits.append((abs(w - a) <= 1, float(bops(uses)), -abs(w - a), plan))
            least = min(goals, key=lambda g: -spent(g, uses)) if goals else None
            if (w, a) == (w_bits[0], a_bits[0]) and least is not None and spent(least, uses) > 1:
                raise JpqError(
                    f"{least.flag} {least.asked} ({least.shown(least.limit)}) cannot be met by uniform bits; smallest "
                    f"possible: {least.shown(spent(least, uses) * least.limit)}, at {w} and {a} bits. Choose a method "
                    "that prunes too."
                )
    return max(fits, key=lambda fit: fit[:3])[3]
