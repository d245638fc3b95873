"""Allowed numbers of kept channels at a site, where runtimes want multiples (`--channel-multiple`).

Integer kernels work on several channels at a time, and a remainder costs as much as a full group: onnxruntime runs a
ResNet20 with 64 % of its MACs at 8 bits 1.4 times as fast with multiples of 8 (studies/speed.py).
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

LARGEST_MULTIPLE = 256


def channel_multiple(name: str, method: Method, multiple: int | None) -> int:
    """The value of --channel-multiple for a method of this name; 1 where it is not given.

    Raises JpqError for a number out of range, and for methods that prune no channels or set their number in advance.
    """
    if multiple is None or multiple == 1:
        return 1
    flag = f"--channel-multiple {multiple}"
    if not 1 <= multiple <= LARGEST_MULTIPLE:
        raise JpqError(f"{flag} is outside 1 to {LARGEST_MULTIPLE}; 8 and 16 suit most hardware.")
    reason = ""
    if method.gate is None:
        reason = "prunes nothing"
    elif method.structure != CHANNELS:
        reason = f"masks weights inside layers ({method.structure}) and drops no channels"
    elif method.gate.fixed_count:
        reason = "is told how many channels stay"
    elif method.sites == "per-consumer":
        reason = "keeps channels for each reader on its own"
    if reason:
        free = [n for n, m in METHODS.items() if m.gate and m.structure == CHANNELS and m.sites == "coupled"]
        raise JpqError(f"{flag}: method {name} {reason}. Choose --method {any_of(free)}.")
    return multiple


def allowed_counts(network: Network, site: Site, multiple: int) -> tuple[int, ...]:
    """Numbers of units that a site may keep, ascending: those that make a multiple of channels, and all of them.

    A unit of several channels in the layer that produces it (a head of attention) counts as that many channels.
    """
    step = multiple // gcd(multiple, _channels_per_unit(network, site))
    return (*range(step, site.n, step), site.n)


def nearest_count(counts: Sequence[int], units: int) -> int:
    """The count nearest to a number of units, of ascending counts; ties go to the larger one."""
    i = min(bisect_left(counts, units), len(counts) - 1)
    return counts[i - 1] if i and units < rounding_point(counts[i - 1], counts[i]) else counts[i]


def rounding_point(small: int, large: int) -> int:
    """The smallest number of units that is rounded to the larger of two neighbouring counts."""
    return (small + large + 1) // 2


def _channels_per_unit(network: Network, site: Site) -> int:
    """Channels of one unit in the layer (or embedding) that produces it; 1 for a mask, which removes none."""
    if site.is_mask:
        return 1
    labels = {layer.name: layer.outputs for layer in network.layers} | dict(network.embeddings)
    return max(1, int(np.count_nonzero(labels[site.producers[0]] == site.labels[0])))
