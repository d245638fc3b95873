"""Coverage of a network by pruning: the prunable share of its MACs, and why the other channels are frozen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from jpq.tracing.channel_shares import ChannelShares
from jpq.tracing.network import Network
from jpq.tracing.sites import Site
from jpq.types import NONE

UNREAD = "read by no layer with weights"


@dataclass(frozen=True)
class FrozenChannels:
    """The channels that must stay for one reason."""

    reason: str
    channels: int  # number of label classes
    producers: tuple[str, ...]  # layers and embeddings that make them, in order of execution


def prunable_share(network: Network, sites: Sequence[Site]) -> Fraction:
    """Share of the dense MACs in layers and products of whose channels at least one belongs to a site."""
    free = np.unique(np.concatenate([np.empty(0, np.int64), *(site.labels for site in sites)]))
    reached = sum(
        layer.macs for layer in network.layers if np.isin(np.concatenate([layer.inputs, layer.outputs]), free).any()
    )
    reached += sum(product.macs for product in network.products if any(np.isin(d, free).any() for d in product.dims))
    return Fraction(reached, max(1, network.macs))


def halved_share(network: Network, sites: Sequence[Site]) -> Fraction:
    """Share of the dense MACs that is saved when every second unit of every site goes (the first always stays)."""
    kept = {site.name: [unit % 2 == 0 for unit in range(site.n)] for site in sites}
    shares = ChannelShares(network, sites)
    work, every = shares.exact_work(kept), zip(network.layers, *shares.exact_shares(kept), strict=True)
    left = sum(
        layer.macs * Fraction(*i) * Fraction(*o) * positions
        for (layer, i, o), positions in zip(every, work.positions, strict=True)
    )
    left += sum(product.macs * share for product, share in zip(network.products, work.products, strict=True))
    return 1 - Fraction(left) / max(1, network.macs)


def frozen_channels(network: Network, sites: Sequence[Site]) -> tuple[FrozenChannels, ...]:
    """The channels that layers and embeddings make and that belong to no site, by reason, the most first."""
    free = {int(c) for site in sites for c in site.labels}
    classes: dict[str, set[int]] = defaultdict(set)
    producers: dict[str, dict[str, None]] = defaultdict(dict)
    sources = [(layer.name, layer.outputs) for layer in network.layers] + list(network.embeddings.items())
    for name, labels in sources:
        for c in np.unique(labels).tolist():
            if c != NONE and c not in free:
                reason = network.frozen.get(c, UNREAD)
                classes[reason].add(c)
                producers[reason][name] = None
    rows = [FrozenChannels(reason, len(members), tuple(producers[reason])) for reason, members in classes.items()]
    return tuple(sorted(rows, key=lambda row: -row.channels))
