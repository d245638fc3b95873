"""How many channels of a site may stay where runtimes want them in multiples (`--channel-multiple`).

Integer kernels work on several channels at a time, and what is left over is dear: of ResNet20 with 64 % of its MACs, 8
bits, onnxruntime takes 1.4 times as long with any numbers of channels as with multiples of 8 (studies/speed.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import gcd

import numpy as np

from jpq.network.record import Network
from jpq.network.sites import Site

MOST = 256  # that --channel-multiple may be


def counts(network: Network, site: Site, multiple: int) -> tuple[int, ...]:
    """Ascending numbers of units that the site may keep: those that make a multiple of channels, and all of them.

    A unit that stands for several channels of the layer that makes it (a head of attention) counts as so many.
    """
    step = multiple // gcd(multiple, _channels(network, site))
    return (*range(step, site.n, step), site.n)


def nearest(counts: Sequence[int], above: int) -> int:
    """Of ascending counts the one that so many units round to; ties go to the larger."""
    i = min(bisect_left(counts, above), len(counts) - 1)
    return counts[i - 1] if i and above < turn(counts[i - 1], counts[i]) else counts[i]


def turn(small: int, large: int) -> int:
    """The fewest units that round to the larger of two counts."""
    return (small + large + 1) // 2


def _channels(network: Network, site: Site) -> int:
    """Of one unit, in the layer (or embedding) that makes it; 1 for a mask, which removes none."""
    if site.is_mask:
        return 1
    made = {layer.name: layer.outputs for layer in network.layers} | dict(network.embeddings)
    return max(1, int(np.count_nonzero(made[site.makers[0]] == site.labels[0])))
