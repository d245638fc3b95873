"""Physical form of unconstrained pruning: channels stored in an order that lets consumers read views, not copies.

A channel that no consumer keeps is removed. Of the others each consumer selects its own; `choose_layout` permutes the
parameters that produce and carry them (weights, biases, norms, depthwise layers, alike on every axis) so that as many
selections as possible are contiguous, and the consumers' own weights to match. A tensor joined from several blocks
(concat) can be read in one piece only where a consumer reads the end of one block, all of the next and the start of the
last; consumers for which no order achieves this do not affect the order for the others.
Source: Wan et al., UPSCALE: Unconstrained Channel Pruning, ICML 2023, arXiv:2307.08771 (order and counting; the
treatment of concats is ours).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from jpq.export.unconstrained.channel_blocks import Blocks, find_blocks
from jpq.export.unconstrained.channel_order import order_channels
from jpq.export.unconstrained.select import insert_selects
from jpq.methods.structures import Axis
from jpq.tracing.network import Layer, Network
from jpq.tracing.shrink import Slices, apply_slices, compute_slices
from jpq.tracing.sites import Site, dropped_classes
from jpq.types import NONE, JpqError, Labels

Kept = Mapping[str, Sequence[bool]]  # site -> unit -> kept

Demand = tuple[str, frozenset[int]]  # ("first", "last" or "side by side" in a block; the classes that must lie so)


@dataclass(frozen=True)
class ChannelLayout:
    """Order of stored channels and selections of each consumer in the small model, as plain data."""

    slices: Slices  # parameter, buffer or counting attribute -> dim -> kept indices, in their new order
    selects: Mapping[str, list[int]]  # layer -> positions of its input that it reads, where these are not all
    copied: int  # channels that selections with a gap copy


def export_unconstrained(
    model: nn.Module, network: Network, sites: Sequence[Site], kept: Kept, *, reorder: bool = True, gather: bool = False
) -> nn.Module:
    """Build a smaller deep copy of a float model that computes the same as `model` with dropped channels at zero.

    Args:
        model: the float model.
        network: traced from it.
        sites: coupled (`channels`) or not (`channels_per_consumer`).
        kept: the decision of each site's units.
        reorder: choose the order of stored channels; otherwise it is the natural one.
        gather: copy at every selection, contiguous or not.
    """
    layout = choose_layout(network, sites, kept, reorder)
    return insert_selects(apply_slices(copy.deepcopy(model), layout.slices), layout.selects, gather)


def choose_layout(network: Network, sites: Sequence[Site], kept: Kept, reorder: bool = True) -> ChannelLayout:
    """Choose which indices every parameter keeps, in which order, and what each consumer selects.

    Raises JpqError where a parameter would have nothing left.
    """
    removed = np.array(sorted(dropped_classes(sites, kept)), np.int64)
    dropped, axes = _dropped_inputs(sites, kept)
    blocks = find_blocks(network)
    consumers = [_consumer(layer, dropped[layer.name], removed) for layer in network.layers]
    consumers = [consumer for consumer in consumers if (consumer.surviving != consumer.kept).any()]
    for consumer in consumers:
        if not consumer.kept.any():
            raise JpqError(f"Layer '{consumer.layer.name}' would read nothing. Keep at least one of its inputs.")
    rank = _choose_rank(blocks, consumers, removed) if reorder else blocks.natural_rank()
    slices = compute_slices(network, removed.tolist(), lambda labels: blocks.places(labels, rank))
    selects = {}
    for consumer in consumers:
        axis = axes[consumer.layer.name]
        places = blocks.places(consumer.layer.inputs[: len(axis.index)], rank)  # of one group, where there are several
        slices.setdefault(consumer.layer.weight, {})[axis.dim] = places[consumer.kept[places]].tolist()
        selects[consumer.layer.name] = consumer.positions(blocks, rank).tolist()
    return ChannelLayout(slices, selects, sum(consumer.copied(blocks, rank) for consumer in consumers))


def _dropped_inputs(sites: Sequence[Site], kept: Kept) -> tuple[dict[str, list[int]], dict[str, Axis]]:
    """(layer -> label classes that it does not read, layer -> the input axis of its weight)."""
    dropped: dict[str, list[int]] = defaultdict(list)
    axes: dict[str, Axis] = {}
    for site in sites:
        classes = [label for label, keeps in zip(site.labels.tolist(), kept[site.name], strict=True) if not keeps]
        for tap in site.taps:
            assert isinstance(tap.structure, Axis)
            dropped[tap.layer] += classes
            axes[tap.layer] = tap.structure
    return dropped, axes


@dataclass(frozen=True, eq=False)
class _Consumer:
    """A layer that reads only a part of the channels that are left of its input."""

    layer: Layer
    surviving: np.ndarray = field(repr=False)  # positions of its dense input that the network keeps
    kept: np.ndarray = field(repr=False)  # positions that this layer keeps

    def positions(self, blocks: Blocks, rank: Labels) -> Labels:
        """Positions, in its new input, of the channels that it reads."""
        places = blocks.places(self.layer.inputs, rank)
        return np.flatnonzero(self.kept[places][self.surviving[places]])

    def copied(self, blocks: Blocks, rank: Labels) -> int:
        """Number of channels that it must copy."""
        positions = self.positions(blocks, rank)
        return 0 if positions[-1] - positions[0] + 1 == len(positions) else len(positions)

    def demands(self, blocks: Blocks) -> dict[int, Demand]:
        """Demands on each block so that this consumer reads a view: its classes side by side, at the start or the end.

        Empty where no order can: a block between the first and the last that it reads from is not read whole, or one
        block would have to end in two ways.
        """
        runs = [(b, slice(s, s + n)) for s, n, b in blocks.runs(self.layer.inputs) if self.surviving[s : s + n].any()]
        read = [k for k, (_, span) in enumerate(runs) if self.kept[span].any()]
        runs = runs[read[0] : read[-1] + 1]
        demands: dict[int, Demand] = {}
        for k, (block, span) in enumerate(runs):
            if (self.surviving[span] == self.kept[span]).all():
                continue
            if block == NONE or 0 < k < len(runs) - 1:
                return {}
            backward = blocks.place_of[int(self.layer.inputs[span][0])][1] != 0
            side = "side by side" if len(runs) == 1 else "last" if (k == 0) != backward else "first"
            demand = side, frozenset(self.layer.inputs[span][self.kept[span]].tolist())
            if demands.setdefault(block, demand) != demand:
                return {}
        return demands


def _consumer(layer: Layer, dropped: Sequence[int], removed: Labels) -> _Consumer:
    """A layer as a consumer, from the classes that it does not read and those that the network removes."""
    surviving = ~np.isin(layer.inputs, removed)
    return _Consumer(layer, surviving, surviving & ~np.isin(layer.inputs, np.array(dropped, np.int64)))


def _choose_rank(blocks: Blocks, consumers: Sequence[_Consumer], removed: Labels) -> Labels:
    """The new place of every class within its block, block after block; never more copies than the natural order."""
    rank, removed_classes = blocks.natural_rank(), set(removed.tolist())
    demands_on: dict[int, list[tuple[_Consumer, Demand]]] = defaultdict(list)
    for consumer in consumers:
        for block, demand in consumer.demands(blocks).items():
            demands_on[block].append((consumer, demand))
    for block, demands in demands_on.items():
        best, surviving = None, [c for c in blocks.members[block] if c not in removed_classes]
        for candidate in _candidate_orders(surviving, [demand for _, demand in demands]):
            trial = rank.copy()
            trial[candidate] = np.arange(len(candidate))
            place = {c: k for k, c in enumerate(candidate)}
            unmet = sum(len(classes) for _, (side, classes) in demands if not _is_met(side, classes, place))
            cost = sum(consumer.copied(blocks, trial) for consumer, _ in demands), unmet
            if best is None or cost < best[0]:
                best = cost, trial
        assert best is not None
        rank = best[1]
    return rank


def _is_met(side: str, classes: frozenset[int], place: Mapping[int, int]) -> bool:
    """Whether classes lie side by side, and at the demanded end of their block."""
    places = [place[c] for c in classes]
    ends = {"first": min(places) == 0, "last": max(places) == len(place) - 1}
    return max(places) - min(places) + 1 == len(places) and ends.get(side, True)


def _candidate_orders(members: Sequence[int], demands: Sequence[Demand]) -> Iterator[list[int]]:
    """Orders of one block worth trying, the natural one first."""
    yield list(members)
    best = order_channels([classes for _, classes in demands], members)
    yield best
    yield best[::-1]
    sides = {side: [classes for s, classes in demands if s == side] for side in ("first", "side by side", "last")}
    if sides["first"] or sides["last"]:
        front = _order_union(sides["first"], members)
        back = [c for c in _order_union(sides["last"], members) if c not in front]
        middle = [c for c in order_channels(sides["side by side"], members) if c not in {*front, *back}]
        yield [*front, *middle, *back[::-1]]


def _order_union(sets: Sequence[frozenset[int]], members: Sequence[int]) -> list[int]:
    """The classes of these sets alone, in their best order."""
    union = frozenset[int]().union(*sets)
    return order_channels(sets, [c for c in members if c in union])
