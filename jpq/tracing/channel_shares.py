"""Kept shares of the channels of layers, products and tables, as a linear map from the units of all sites."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jpq.tracing.network import Network
from jpq.tracing.sites import Site
from jpq.types import Labels


class Shares(NamedTuple):
    """Kept shares, each in [0, 1]: a Tensor while training, a Fraction in a report."""

    positions: tuple[Any, ...]  # of each layer: share of its positions (`Layer.positions`); 1 where all always stay
    products: tuple[Any, ...]  # of each product of computed tensors: share of its work
    tables: tuple[Any, ...]  # of each table: share of its numbers


class ChannelShares:
    """The kept share of the channels on both sides of every layer, from soft or from exact decisions.

    Channels whose class belongs to no site always count as kept. A layer reads what its own sites keep; it makes
    every channel that at least one consumer keeps: with several sites on a class, P(any) = 1 - prod(1 - P(kept)).
    A depthwise layer's input share is 1: its cost is linear in its channels, which its outputs already count.
    """

    def __init__(self, network: Network, sites: Sequence[Site]):
        self.names = [site.name for site in sites]
        starts = np.cumsum([0, *(site.n for site in sites)]).tolist()  # where each site's units begin
        read_units: dict[str, dict[int, int]] = defaultdict(dict)  # layer -> class -> the unit that decides for it
        class_units: dict[int, list[int]] = defaultdict(list)  # class -> every unit that decides
        for site, start in zip(sites, starts, strict=False):
            for unit, label in enumerate(site.labels.tolist(), start):
                class_units[label].append(unit)
                for tap in site.taps:
                    read_units[tap.layer][label] = unit
        joint = list(dict.fromkeys(tuple(units) for units in class_units.values() if len(units) > 1))
        column = {units: starts[-1] + k for k, units in enumerate(joint)}  # "any of these units", behind all units
        made_units = {label: column.get(tuple(units), units[0]) for label, units in class_units.items()}
        sides: list[tuple[int, int, Counter[int]]] = []
        for layer in network.layers:
            sides.append((1, 1, Counter()) if layer.depthwise else _count_side(layer.inputs, read_units[layer.name]))
            sides.append(_count_side(layer.outputs, made_units))
        self._layers = len(network.layers)
        others = [item.positions for item in network.layers]
        others += [product.dims for product in network.products] + [table.dims for table in network.tables]
        sides += [_count_side(labels, made_units) for dims in others for labels in dims]
        self._dims = [len(dims) for dims in others]  # rows of each of these, behind the two of every layer
        self._products = len(network.products)
        entries = [(row, c, n) for row, (_, _, counts) in enumerate(sides) for c, n in counts.items()]
        self._rows, self._units, self._counts = np.array(entries, np.int64).reshape(-1, 3).T
        self._fixed, self._all = [fixed for _, fixed, _ in sides], [n for n, _, _ in sides]
        widest = max(map(len, joint), default=0)
        padded = [[*units, *[starts[-1]] * (widest - len(units))] for units in joint]
        self._joint = np.array(padded, np.int64).reshape(len(joint), widest)
        self._tensors: dict[torch.device, tuple[Tensor, ...]] = {}

    def soft_shares(self, keep_probabilities: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(input shares, output shares) of every layer from `[1, n]` keep probabilities per site, differentiable."""
        shares = self._soft_sides(keep_probabilities)[: 2 * self._layers]
        return shares[0::2], shares[1::2]

    def soft_work(self, keep_probabilities: Sequence[Tensor]) -> Shares:
        """Shares of positions, products and tables from `[1, n]` keep probabilities per site, differentiable."""
        if not any(self._dims):
            return self._joined([])
        return self._joined(self._soft_sides(keep_probabilities)[2 * self._layers :])

    def _soft_sides(self, keep_probabilities: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The kept share of every row."""
        device = keep_probabilities[0].device if keep_probabilities else torch.device("cpu")
        flat = torch.cat([a.flatten() for a in keep_probabilities]) if keep_probabilities else torch.zeros(0)
        rows, units, counts, fixed, sizes, joint = self._tensors_on(device)
        if len(joint):
            padded = torch.cat([flat, flat.new_zeros(1)])  # the last entry fills short rows: it never keeps
            flat = torch.cat([flat, 1 - (1 - padded[joint]).prod(1)])
        kept = fixed.to(flat).index_add(0, rows, flat[units] * counts.to(flat))
        return (kept / sizes.to(flat)).unbind()

    def exact_shares(self, kept: Mapping[str, Sequence[bool]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(kept, all) channel counts of every layer, for inputs and for outputs."""
        counts = self._exact_sides(kept)[: 2 * self._layers]
        return counts[0::2], counts[1::2]

    def exact_work(self, kept: Mapping[str, Sequence[bool]]) -> Shares:
        """Shares of positions, products and tables under exact decisions."""
        if not any(self._dims):
            return self._joined([])
        return self._joined([Fraction(*count) for count in self._exact_sides(kept)[2 * self._layers :]])

    def _joined(self, shares: Sequence[Any]) -> Shares:
        """The shares of all dims of one layer, product or table multiplied; 1 where it has none."""
        starts = np.cumsum([0, *self._dims]).tolist()
        joined = tuple(prod(shares[i : i + n]) if n else 1 for i, n in zip(starts, self._dims, strict=False))
        split = self._layers + self._products
        return Shares(joined[: self._layers], joined[self._layers : split], joined[split:])

    def _exact_sides(self, kept: Mapping[str, Sequence[bool]]) -> list[tuple[int, int]]:
        """(kept, all) counts of every row."""
        flat = np.array([keeps for name in self.names for keeps in kept[name]], bool)
        if len(self._joint):
            flat = np.append(flat, np.append(flat, False)[self._joint].any(1))
        sums = np.array(self._fixed, np.int64)
        np.add.at(sums, self._rows, self._counts * flat[self._units])
        return list(zip(sums.tolist(), self._all, strict=True))

    def _tensors_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Rows, units, counts, fixed and all channels of each side, and joint units, as tensors."""
        if device not in self._tensors:
            arrays = (self._rows, self._units, self._counts, self._fixed, self._all, self._joint)
            self._tensors[device] = tuple(torch.as_tensor(a, device=device) for a in arrays)
        return self._tensors[device]


def _count_side(labels: Labels, units: Mapping[int, int]) -> tuple[int, int, Counter[int]]:
    """(all channels, channels that no unit decides, {unit: number of channels}) of one side of a layer."""
    counts = Counter(units[label] for label in labels.tolist() if label in units)
    return len(labels), len(labels) - sum(counts.values()), counts
