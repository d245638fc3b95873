"""Which part of each layer's channels is alive: a linear map from units to layers, soft or exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from jpq.network.sites import Site
from jpq.network.trace import Network
from jpq.types import Labels


class Shares:
    """The count of alive channels on both sides of every layer.

    Channels whose class belongs to no site always count as kept. A depthwise layer's input share is 1: its cost is
    linear in its channels, which its outputs already count.
    """

    def __init__(self, network: Network, sites: Sequence[Site]):
        self.names = [s.name for s in sites]
        self.places = {int(label): (s, u) for s, site in enumerate(sites) for u, label in enumerate(site.labels)}
        offsets = [0]
        for site in sites:
            offsets.append(offsets[-1] + site.n)
        self.sides: list[tuple[int, int, Counter[tuple[int, int]]]] = []  # (all, fixed, {(site, unit): positions})
        for layer in network.layers:
            depthwise = layer.groups > 1 and layer.groups == len(layer.inputs)
            self.sides.append((1, 1, Counter()) if depthwise else self._side(layer.inputs))
            self.sides.append(self._side(layer.outputs))
        entries = [
            (row, offsets[s] + u, c) for row, (_, _, held) in enumerate(self.sides) for (s, u), c in held.items()
        ]
        rows, units, counts = zip(*entries, strict=True) if entries else ((), (), ())
        self._rows, self._units = torch.tensor(rows, dtype=torch.long), torch.tensor(units, dtype=torch.long)
        self._counts = torch.tensor(counts, dtype=torch.get_default_dtype())
        self._fixed = torch.tensor([float(fixed) for _, fixed, _ in self.sides])
        self._all = torch.tensor([float(n) for n, _, _ in self.sides])

    def _side(self, labels: Labels) -> tuple[int, int, Counter[tuple[int, int]]]:
        held = Counter(self.places[label] for label in labels.tolist() if label in self.places)
        return len(labels), len(labels) - sum(held.values()), held

    def soft(self, alive: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(input shares, output shares) of every layer from `[1, n]` units per site, differentiable."""
        device = alive[0].device if alive else torch.device("cpu")
        flat = torch.cat([a.flatten() for a in alive]) if alive else torch.zeros(0)
        if self._rows.device != device:
            self._rows, self._units, self._counts, self._fixed, self._all = (
                t.to(device) for t in (self._rows, self._units, self._counts, self._fixed, self._all)
            )
        kept = self._fixed.to(flat).index_add(0, self._rows, flat[self._units] * self._counts.to(flat))
        shares = (kept / self._all.to(flat)).unbind()
        return shares[0::2], shares[1::2]

    def exact(self, kept: Mapping[str, Sequence[bool]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(kept, all) channel counts of every layer, for inputs and for outputs."""
        counts = [
            (fixed + sum(c for (s, u), c in held.items() if kept[self.names[s]][u]), n) for n, fixed, held in self.sides
        ]
        return counts[0::2], counts[1::2]
