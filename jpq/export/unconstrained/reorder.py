"""Unconstrained pruning made real: channels stored in an order that lets their readers take views instead of copies.

A channel that nobody keeps is removed. Of the others each reader selects its own; `layout` permutes what makes and
carries them (weights, biases, norms, depthwise layers, alike on every axis) so that as many selections as possible
are contiguous, and the readers' own weights to match. A tensor that is joined of several blocks (concat) can be read
in one piece only where a reader takes the end of one block, all of the next and the start of the last; readers for
which no order achieves this do not disturb the others'.
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

from jpq.export.unconstrained.channel_order import Blocks, blocks, order
from jpq.export.unconstrained.select import insert
from jpq.methods.structures import Axis
from jpq.tracing.network import Layer, Network
from jpq.tracing.shrink import Slices, apply_slices, slices
from jpq.tracing.sites import Site, dropped
from jpq.types import NONE, JpqError, Labels

Kept = Mapping[str, Sequence[bool]]  # site -> unit -> kept


@dataclass(frozen=True)
class ChannelLayout:
    """How the small model stores and reads its channels, as plain data."""

    slices: Slices  # parameter, buffer or counting attribute -> dim -> kept indices, in their new order
    selects: Mapping[str, list[int]]  # layer -> positions of its input that it reads, where these are not all
    copied: int  # channels that selections with a gap copy


def export(
    model: nn.Module, network: Network, sites: Sequence[Site], kept: Kept, *, reorder: bool = True, gather: bool = False
) -> nn.Module:
    """A smaller deep copy of the float `model`; it computes what `model` does with zeros where `kept` says so.

    Args:
        model, network: the float model and its record.
        sites: coupled (`channels`) or not (`per_consumer`); kept: what each site's units decided.
        reorder: choose the order of stored channels; otherwise it is the natural one.
        gather: copy at every selection, contiguous or not.
    """
    plan = layout(network, sites, kept, reorder)
    return insert(apply_slices(copy.deepcopy(model), plan.slices), plan.selects, gather)


def layout(network: Network, sites: Sequence[Site], kept: Kept, reorder: bool = True) -> ChannelLayout:
    """Which indices every parameter keeps, in which order, and what each reader selects.

    Raises JpqError where a parameter would have nothing left.
    """
    gone = np.array(sorted(dropped(sites, kept)), np.int64)
    closed: dict[str, list[int]] = defaultdict(list)
    axes: dict[str, Axis] = {}  # of a reader's weight: the input dim, and how many positions it has
    for site in sites:
        shut = [label for label, keeps in zip(site.labels.tolist(), kept[site.name], strict=True) if not keeps]
        for tap in site.taps:
            assert isinstance(tap.structure, Axis)
            closed[tap.layer] += shut
            axes[tap.layer] = tap.structure
    held = blocks(network)
    readers = [_reader(layer, closed[layer.name], gone) for layer in network.layers]
    readers = [reader for reader in readers if (reader.alive != reader.kept).any()]
    for reader in readers:
        if not reader.kept.any():
            raise JpqError(f"Layer '{reader.layer.name}' would read nothing. Keep at least one of its inputs.")
    rank = _choose(held, readers, gone) if reorder else held.natural()
    kept_slices = slices(network, gone.tolist(), lambda labels: held.places(labels, rank))
    selects = {}
    for reader in readers:
        axis = axes[reader.layer.name]
        at = held.places(reader.layer.inputs[: len(axis.index)], rank)  # of one group, where there are several
        kept_slices.setdefault(reader.layer.weight, {})[axis.dim] = at[reader.kept[at]].tolist()
        selects[reader.layer.name] = reader.positions(held, rank).tolist()
    return ChannelLayout(kept_slices, selects, sum(r.copied(held, rank) for r in readers))


@dataclass(frozen=True, eq=False)
class _Reader:
    """A layer that does not read everything that is left of its input."""

    layer: Layer
    alive: np.ndarray = field(repr=False)  # positions of its dense input that the network keeps
    kept: np.ndarray = field(repr=False)  # positions that this layer keeps

    def positions(self, held: Blocks, rank: Labels) -> Labels:
        """Where, in its new input, the channels are that it reads."""
        at = held.places(self.layer.inputs, rank)
        return np.flatnonzero(self.kept[at][self.alive[at]])

    def copied(self, held: Blocks, rank: Labels) -> int:
        """Channels that it must copy."""
        found = self.positions(held, rank)
        return 0 if found[-1] - found[0] + 1 == len(found) else len(found)

    def demands(self, held: Blocks) -> dict[int, tuple[str, frozenset[int]]]:
        """What each block must do for this reader to take a view: hold its classes side by side, first or last.

        Empty where no order can: a block between the first and the last that it reads from is not read whole, or one
        block would have to end in two ways.
        """
        runs = [(b, slice(s, s + n)) for s, n, b in held.runs(self.layer.inputs) if self.alive[s : s + n].any()]
        read = [k for k, (_, at) in enumerate(runs) if self.kept[at].any()]
        runs = runs[read[0] : read[-1] + 1]
        out: dict[int, tuple[str, frozenset[int]]] = {}
        for k, (block, at) in enumerate(runs):
            if (self.alive[at] == self.kept[at]).all():
                continue
            if block == NONE or 0 < k < len(runs) - 1:
                return {}
            backward = held.at[int(self.layer.inputs[at][0])][1] != 0
            side = "side by side" if len(runs) == 1 else "last" if (k == 0) != backward else "first"
            demand = side, frozenset(self.layer.inputs[at][self.kept[at]].tolist())
            if out.setdefault(block, demand) != demand:
                return {}
        return out


def _reader(layer: Layer, closed: Sequence[int], gone: Labels) -> _Reader:
    alive = ~np.isin(layer.inputs, gone)
    return _Reader(layer, alive, alive & ~np.isin(layer.inputs, np.array(closed, np.int64)))


def _choose(held: Blocks, readers: Sequence[_Reader], gone: Labels) -> Labels:
    """The new place of every class within its block, block after block; never more copies than the natural order."""
    rank, lost = held.natural(), set(gone.tolist())
    wants: dict[int, list[tuple[_Reader, str, frozenset[int]]]] = defaultdict(list)
    for reader in readers:
        for block, (side, classes) in reader.demands(held).items():
            wants[block].append((reader, side, classes))
    for block, asked in wants.items():
        best, alive = None, [c for c in held.members[block] if c not in lost]
        for found in _candidates(alive, [(side, classes) for _, side, classes in asked]):
            trial = rank.copy()
            trial[found] = np.arange(len(found))
            place = {c: k for k, c in enumerate(found)}
            unmet = sum(len(classes) for _, side, classes in asked if not _met(side, classes, place))
            cost = sum(reader.copied(held, trial) for reader, _, _ in asked), unmet
            if best is None or cost < best[0]:
                best = cost, trial
        assert best is not None
        rank = best[1]
    return rank


def _met(side: str, classes: frozenset[int], place: Mapping[int, int]) -> bool:
    at = [place[c] for c in classes]
    ends = {"first": min(at) == 0, "last": max(at) == len(place) - 1}
    return max(at) - min(at) + 1 == len(at) and ends.get(side, True)


def _candidates(members: Sequence[int], asked: Sequence[tuple[str, frozenset[int]]]) -> Iterator[list[int]]:
    """Orders of one block worth trying, the natural one first."""
    yield list(members)
    best = order([classes for _, classes in asked], members)
    yield best
    yield best[::-1]
    sides = {side: [classes for s, classes in asked if s == side] for side in ("first", "side by side", "last")}
    if sides["first"] or sides["last"]:
        first = _only(sides["first"], members)
        last = [c for c in _only(sides["last"], members) if c not in first]
        middle = [c for c in order(sides["side by side"], members) if c not in {*first, *last}]
        yield [*first, *middle, *last[::-1]]


def _only(sets: Sequence[frozenset[int]], members: Sequence[int]) -> list[int]:
    """The classes of these sets alone, in their best order."""
    wanted = frozenset[int]().union(*sets)
    return order(sets, [c for c in members if c in wanted])
