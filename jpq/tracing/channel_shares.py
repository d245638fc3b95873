"""Which part of each layer's channels is alive: a linear map from units to layers, soft or exact."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from jpq.tracing.network import Network
from jpq.tracing.sites import Site
from jpq.types import Labels


class ChannelShares:
    """The count of alive channels on both sides of every layer.

    Channels whose class belongs to no site always count as kept. A layer reads what its own sites keep; it makes
    every channel that at least one reader keeps: with several sites on a class, P(any) = 1 - prod(1 - P(kept)).
    A depthwise layer's input share is 1: its cost is linear in its channels, which its outputs already count.
    """

    def __init__(self, network: Network, sites: Sequence[Site]):
        self.names = [s.name for s in sites]
        columns = np.cumsum([0, *(site.n for site in sites)]).tolist()  # where each site's units begin
        reads: dict[str, dict[int, int]] = defaultdict(dict)  # layer -> class -> the unit that decides for it
        makes: dict[int, list[int]] = defaultdict(list)  # class -> every unit that decides
        for site, first in zip(sites, columns, strict=False):
            for unit, label in enumerate(site.labels.tolist(), first):
                makes[label].append(unit)
                for tap in site.taps:
                    reads[tap.layer][label] = unit
        joint = list(dict.fromkeys(tuple(units) for units in makes.values() if len(units) > 1))
        column = {units: columns[-1] + k for k, units in enumerate(joint)}  # "any of them", behind the units
        every = {label: column.get(tuple(units), units[0]) for label, units in makes.items()}
        sides: list[tuple[int, int, Counter[int]]] = []  # (all, fixed, {column: positions})
        for layer in network.layers:
            sides.append((1, 1, Counter()) if layer.depthwise else _side(layer.inputs, reads[layer.name]))
            sides.append(_side(layer.outputs, every))
        entries = [(row, c, n) for row, (_, _, held) in enumerate(sides) for c, n in held.items()]
        rows, units, counts = np.array(entries, np.int64).reshape(-1, 3).T
        widest = max(map(len, joint), default=0)
        voters = [[*units, *[columns[-1]] * (widest - len(units))] for units in joint]
        self._joint = np.array(voters, np.int64).reshape(len(joint), widest)
        self._rows, self._units, self._counts = rows, units, counts
        self._fixed, self._all = [fixed for _, fixed, _ in sides], [n for n, _, _ in sides]
        self._tensors: dict[torch.device, tuple[Tensor, ...]] = {}

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Rows, units, counts, fixed, all and voters as tensors."""
        if device not in self._tensors:
            arrays = (self._rows, self._units, self._counts, self._fixed, self._all, self._joint)
            self._tensors[device] = tuple(torch.as_tensor(a, device=device) for a in arrays)
        return self._tensors[device]

    def soft(self, alive: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(input shares, output shares) of every layer from `[1, n]` units per site, differentiable."""
        device = alive[0].device if alive else torch.device("cpu")
        flat = torch.cat([a.flatten() for a in alive]) if alive else torch.zeros(0)
        rows, units, counts, fixed, whole, joint = self._on(device)
        if len(joint):
            padded = torch.cat([flat, flat.new_zeros(1)])  # the last entry fills short rows: it never keeps
            flat = torch.cat([flat, 1 - (1 - padded[joint]).prod(1)])
        kept = fixed.to(flat).index_add(0, rows, flat[units] * counts.to(flat))
        shares = (kept / whole.to(flat)).unbind()
        return shares[0::2], shares[1::2]

    def exact(self, kept: Mapping[str, Sequence[bool]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(kept, all) channel counts of every layer, for inputs and for outputs."""
        flat = np.array([keeps for name in self.names for keeps in kept[name]], bool)
        if len(self._joint):
            flat = np.append(flat, np.append(flat, False)[self._joint].any(1))
        sums = np.array(self._fixed, np.int64)
        np.add.at(sums, self._rows, self._counts * flat[self._units])
        counts = list(zip(sums.tolist(), self._all, strict=True))
        return counts[0::2], counts[1::2]


def _side(labels: Labels, places: Mapping[int, int]) -> tuple[int, int, Counter[int]]:
    held = Counter(places[label] for label in labels.tolist() if label in places)
    return len(labels), len(labels) - sum(held.values()), held
