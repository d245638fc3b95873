"""Where each reader may keep channels of its own: unconstrained pruning.

A channel leaves the layers that make it only when none of its readers keeps it; until then a reader that does not
want it selects the others from the tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from jpq.network.record import Network
from jpq.network.sites import Site, channels


def per_consumer(network: Network, skip: Collection[str] = ()) -> tuple[Site, ...]:
    """Uncoupled channel sites: the coupled ones of `channels`, one for each layer that reads them.

    A site stays coupled where one of its readers is not `wrappable`: nothing can select that reader's channels.
    One unit kept per site leaves no layer without input and none without output.
    """
    wrappable = {layer.name for layer in network.layers if layer.wrappable}
    out = []
    for site in channels(network, skip):
        if len(site.taps) == 1 or not wrappable.issuperset(tap.layer for tap in site.taps):
            out.append(site)
            continue
        for tap in site.taps:
            out.append(Site(f"{site.name} for {tap.layer}", site.rows, site.n, (tap,), site.labels, site.makers))
    return tuple(out)


def dropped(sites: Sequence[Site], kept: Mapping[str, Sequence[bool]]) -> set[int]:
    """The label classes that no site keeps: they leave the network."""
    votes: dict[int, bool] = defaultdict(bool)
    for site in sites:
        for label, keeps in zip(site.labels.tolist(), kept[site.name], strict=True):
            votes[label] |= bool(keeps)
    return {label for label, keeps in votes.items() if not keeps}
