"""How many channels of a site may stay where runtimes want them in multiples (`--channel-multiple`).

Integer kernels work on several channels at a time, and what is left over is dear: of ResNet20 with 64 % of its MACs, 8
bits, onnxruntime takes 1.4 times as long with any numbers of channels as with multiples of 8 (studies/speed.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import gcd

import numpy as np

from jpq.config import CHANNELS
from jpq.methods.compatibility import any_of
from jpq.methods.table import METHODS, Method
from jpq.tracing.network import Network
from jpq.tracing.sites import Site
from jpq.types import JpqError

MOST = 256  # that --channel-multiple may be


def channel_multiple(method: str, made: Method, asked: int | None) -> int:
    """Of how many channels sites keep multiples: `asked`, or 1.

    Raises JpqError for a number that makes no sense, and for methods that close no channels, or know how many.
    """
    if asked is None or asked == 1:
        return 1
    flag = f"--channel-multiple {asked}"
    if not 1 <= asked <= MOST:
        raise JpqError(f"{flag} is outside 1 to {MOST}; 8 and 16 suit most hardware.")
    reason = ""
    if made.gate is None:
        reason = "prunes nothing"
    elif made.structure != CHANNELS:
        reason = f"masks weights inside layers ({made.structure}) and drops no channels"
    elif made.gate.fixed_count:
        reason = "is told how many channels stay"
    elif made.sites == "per-consumer":
        reason = "keeps channels for each reader on its own"
    if reason:
        free = [n for n, m in METHODS.items() if m.gate and m.structure == CHANNELS and m.sites == "coupled"]
        raise JpqError(f"{flag}: method {method} {reason}. Choose --method {any_of(free)}.")
    return asked


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
    return max(1, int(np.count_nonzero(made[site.producers[0]] == site.labels[0])))
