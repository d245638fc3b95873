"""Which part of each layer's channels is alive: a linear map from units to layers, soft or exact."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from jpq.network.sites import Site
from jpq.network.trace import Network
from jpq.types import Labels

Place = tuple[int, int]  # (site, unit)
Side = tuple[int, int, Counter[tuple[Place, ...]]]  # (all, fixed, {places of which one must keep it: positions})


class Shares:
    """The count of alive channels on both sides of every layer.

    Channels whose class belongs to no site always count as kept. A layer reads what its own sites keep; it makes
    every channel that at least one reader keeps: with several sites on a class, P(any) = 1 - prod(1 - P(kept)).
    A depthwise layer's input share is 1: its cost is linear in its channels, which its outputs already count.
    """

    def __init__(self, network: Network, sites: Sequence[Site]):
        self.names = [s.name for s in sites]
        reads: dict[str, dict[int, Place]] = defaultdict(dict)  # layer -> class -> the place that decides for it
        makes: dict[int, list[Place]] = defaultdict(list)  # class -> every place that decides
        for s, site in enumerate(sites):
            for u, label in enumerate(site.labels.tolist()):
                makes[label].append((s, u))
                for tap in site.taps:
                    reads[tap.layer][label] = (s, u)
        offsets = np.cumsum([0, *(site.n for site in sites)]).tolist()
        self._places = {(s, u): offsets[s] + u for s, site in enumerate(sites) for u in range(site.n)}
        joint = {label: tuple(at) for label, at in makes.items() if len(at) > 1}
        self._joint = {at: offsets[-1] + k for k, at in enumerate(dict.fromkeys(joint.values()))}
        every = {label: (at[0],) for label, at in makes.items()} | joint
        self.sides: list[Side] = []
        for layer in network.layers:
            own = {label: (at,) for label, at in reads[layer.name].items()}
            depthwise = layer.groups > 1 and layer.groups == len(layer.inputs)
            self.sides.append((1, 1, Counter()) if depthwise else _side(layer.inputs, own))
            self.sides.append(_side(layer.outputs, every))
        entries = [(row, self._column(at), c) for row, (_, _, held) in enumerate(self.sides) for at, c in held.items()]
        rows, units, counts = zip(*entries, strict=True) if entries else ((), (), ())
        self._rows, self._units = torch.tensor(rows, dtype=torch.long), torch.tensor(units, dtype=torch.long)
        self._counts = torch.tensor(counts, dtype=torch.get_default_dtype())
        self._fixed = torch.tensor([float(fixed) for _, fixed, _ in self.sides])
        self._all = torch.tensor([float(n) for n, _, _ in self.sides])
        widest = max(map(len, self._joint), default=0)
        voters = [[self._places[p] for p in at] + [offsets[-1]] * (widest - len(at)) for at in self._joint]
        self._voters = torch.tensor(voters, dtype=torch.long).reshape(len(voters), widest)

    def _column(self, at: tuple[Place, ...]) -> int:
        return self._places[at[0]] if len(at) == 1 else self._joint[at]

    def soft(self, alive: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(input shares, output shares) of every layer from `[1, n]` units per site, differentiable."""
        device = alive[0].device if alive else torch.device("cpu")
        flat = torch.cat([a.flatten() for a in alive]) if alive else torch.zeros(0)
        if self._rows.device != device:
            self._rows, self._units, self._counts, self._fixed, self._all, self._voters = (
                t.to(device) for t in (self._rows, self._units, self._counts, self._fixed, self._all, self._voters)
            )
        if len(self._voters):
            nobody = torch.cat([flat, flat.new_zeros(1)])  # pads readers' lists: never keeps
            flat = torch.cat([flat, 1 - (1 - nobody[self._voters]).prod(1)])
        kept = self._fixed.to(flat).index_add(0, self._rows, flat[self._units] * self._counts.to(flat))
        shares = (kept / self._all.to(flat)).unbind()
        return shares[0::2], shares[1::2]

    def exact(self, kept: Mapping[str, Sequence[bool]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(kept, all) channel counts of every layer, for inputs and for outputs."""
        counts = [
            (fixed + sum(c for at, c in held.items() if any(kept[self.names[s]][u] for s, u in at)), n)
            for n, fixed, held in self.sides
        ]
        return counts[0::2], counts[1::2]


def _side(labels: Labels, places: Mapping[int, tuple[Place, ...]]) -> Side:
    held = Counter(places[label] for label in labels.tolist() if label in places)
    return len(labels), len(labels) - sum(held.values()), held
