"""How far pruning reaches into a network: which part of its work, and why the rest stays."""

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
    """Channels that stay, for one reason."""

    reason: str
    channels: int  # label classes
    makers: tuple[str, ...]  # layers and embeddings that make them, in order of execution


def prunable_share(network: Network, sites: Sequence[Site]) -> Fraction:
    """Share of the dense MACs in layers of whose inputs or outputs at least one channel belongs to a site."""
    free = np.unique(np.concatenate([np.empty(0, np.int64), *(s.labels for s in sites)]))
    inside = lambda labels: bool(np.isin(labels, free).any())  # noqa: E731
    touched = [layer.macs for layer in network.layers if inside(layer.inputs) or inside(layer.outputs)]
    return Fraction(sum(touched), max(1, sum(layer.macs for layer in network.layers)))


def halved_share(network: Network, sites: Sequence[Site]) -> Fraction:
    """Share of the dense MACs that go when every second unit of every site goes (the first always stays)."""
    kept = {site.name: [u % 2 == 0 for u in range(site.n)] for site in sites}
    inputs, outputs = ChannelShares(network, sites).exact(kept)
    left = sum(
        layer.macs * Fraction(*i) * Fraction(*o) for layer, i, o in zip(network.layers, inputs, outputs, strict=True)
    )
    return 1 - Fraction(left) / max(1, sum(layer.macs for layer in network.layers))


def frozen_channels(network: Network, sites: Sequence[Site]) -> tuple[FrozenChannels, ...]:
    """The channels that layers and embeddings make and that belong to no site, by reason, the most first."""
    free = {int(c) for site in sites for c in site.labels}
    found: dict[str, set[int]] = defaultdict(set)
    makers: dict[str, dict[str, None]] = defaultdict(dict)
    made = [(layer.name, layer.outputs) for layer in network.layers] + list(network.embeddings.items())
    for name, labels in made:
        for c in np.unique(labels).tolist():
            if c != NONE and c not in free:
                reason = network.frozen.get(c, UNREAD)
                found[reason].add(c)
                makers[reason][name] = None
    rows = [FrozenChannels(reason, len(classes), tuple(makers[reason])) for reason, classes in found.items()]
    return tuple(sorted(rows, key=lambda row: -row.channels))
