"""The same bits everywhere: plain quantization-aware training, the honest baseline."""

from __future__ import annotations

from collections.abc import Sequence

from jpq.budget import Target, meets, spent
from jpq.costs import bops
from jpq.network.compressed import Compressed
from jpq.plan import Plan
from jpq.types import JpqError


def uniform(net: Compressed, goals: Sequence[Target], w_bits: Sequence[int], a_bits: Sequence[int]) -> Plan:
    """The dearest balanced pair (weight bits, activation bits, at most 1 apart) that meets every target.

    Nothing is pruned. Of pairs that cost the same the more balanced is taken; an unbalanced one (W2A5) only where no
    balanced one fits. Layers whose width is fixed (the image) keep it.
    Raises JpqError, naming the smallest possible cost, if no pair does.
    """
    now = net.plan()
    fixed = {name: net.quantizers(name)[1].width.choices for name in now.layers}  # type: ignore[index]
    fits: list[tuple[bool, float, int, Plan]] = []
    for w in w_bits:
        for a in a_bits:
            layers = {
                name: type(layer)(w, a if len(fixed[name]) > 1 else layer.a_bits, layer.signed)
                for name, layer in now.layers.items()
            }
            kept = {site: (True,) * len(units) for site, units in now.kept.items()}
            plan = Plan(now.method, layers, kept, now.masks)
            uses = net.exact(plan)
            if meets(goals, uses):
                fits.append((abs(w - a) <= 1, float(bops(uses)), -abs(w - a), plan))
            least = min(goals, key=lambda g: -spent(g, uses)) if goals else None
            if (w, a) == (w_bits[0], a_bits[0]) and least is not None and spent(least, uses) > 1:
                raise JpqError(
                    f"{least.flag} {least.asked} ({least.limit:,}) cannot be met by uniform bits; smallest possible: "
                    f"{int(spent(least, uses) * least.limit):,}, at {w} and {a} bits. Choose a method that prunes too."
                )
    return max(fits, key=lambda fit: fit[:3])[3]
