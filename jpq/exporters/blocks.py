"""Which channels may change places: runs of label classes that every tensor holds as a whole, in one order.

Wherever a class of a block appears, on an axis of a parameter or on a side of a layer, the whole block does, forward
or backward, each class the same number of times in a row. Ops whose labels are known map such runs to such runs
(arithmetic, concat, flatten, flip, chunks, groups), so one permutation within the block, mirrored where the block
runs backward, changes no result. Everything else keeps its place: classes that are frozen, classes that no layer
makes (the axes of a table), and classes that some tensor holds in another order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jpq.network.record import Network
from jpq.types import NONE, Labels


@dataclass(frozen=True)
class Blocks:
    """Blocks of label classes; a class that is in none keeps its place."""

    members: tuple[tuple[int, ...], ...]  # block -> its classes in natural order, at least two
    at: Mapping[int, tuple[int, int]]  # class -> (block, place in it)

    def runs(self, labels: Labels) -> Iterator[tuple[int, int, int]]:
        """(first position, length, block or NONE) of every whole block in a sequence, and of what lies between."""
        heads, sizes = _compressed(labels)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        k = 0
        while k < len(heads):
            block, place = self.at.get(int(heads[k]), (NONE, 0))
            n = len(self.members[block]) if block != NONE and place in (0, len(self.members[block]) - 1) else 1
            yield int(starts[k]), int(starts[min(k + n, len(heads))] - starts[k]), block
            k += n

    def natural(self) -> Labels:
        """Class -> its place within its block, as the network has it."""
        rank = np.zeros(1 + max(self.at, default=0), np.int64)
        for c, (_, place) in self.at.items():
            rank[c] = place
        return rank

    def places(self, labels: Labels, rank: Labels) -> Labels:
        """Old positions in their new order; `rank[c]` is the new place of class c within its block."""
        out = np.arange(len(labels))
        for start, n, block in self.runs(labels):
            if block != NONE and n > 1:
                keys = rank[labels[start : start + n]]
                backward = self.at[int(labels[start])][1] != 0
                out[start : start + n] = start + np.argsort(-keys if backward else keys, kind="stable")
        return out


def blocks(network: Network) -> Blocks:
    """The blocks of a network: chains of classes that are neighbours wherever either appears."""
    sequences = _sequences(network)
    made = [layer.outputs for layer in network.layers] + list(network.embeddings.values())
    free = {c for labels in made for c in labels.tolist()} - {NONE} - network.frozen.keys()
    chains = _chains(sequences, free)
    while True:
        found = _numbered(chains)
        broken = {b for labels in sequences for b in _broken(found, labels)}
        if not broken:
            return found
        chains = [chain for b, chain in enumerate(chains) if b not in broken]


def _numbered(chains: Sequence[tuple[int, ...]]) -> Blocks:
    return Blocks(tuple(chains), {c: (b, k) for b, chain in enumerate(chains) for k, c in enumerate(chain)})


def _sequences(network: Network) -> list[Labels]:
    """Every distinct sequence of classes that something in the network holds."""
    held = [labels for dims in network.axes.values() for labels in dims.values()]
    held += [labels for layer in network.layers for labels in (layer.inputs, layer.outputs)]
    held += [*network.attributes.values(), *network.embeddings.values()]
    return list({labels.tobytes(): labels for labels in held if len(labels)}.values())


def _compressed(labels: Labels) -> tuple[Labels, Labels]:
    """Repeats in a row as (class, how often); entries without a class stay single."""
    new = np.concatenate([[True], (labels[1:] != labels[:-1]) | (labels[1:] == NONE)])
    starts = np.flatnonzero(new)
    return labels[starts], np.diff(np.append(starts, len(labels)))


def _chains(sequences: Sequence[Labels], free: Collection[int]) -> list[tuple[int, ...]]:
    """Free classes in a row whose every occurrence has the same neighbour."""
    counts: dict[int, int] = defaultdict(int)
    pairs: dict[tuple[int, int], int] = defaultdict(int)
    order: dict[int, None] = {}
    for labels in sequences:
        heads, sizes = _compressed(labels)
        for c in heads.tolist():
            counts[c] += 1
        order.update(dict.fromkeys(heads.tolist()))
        even = sizes[1:] == sizes[:-1]
        for a, b in zip(heads[:-1][even].tolist(), heads[1:][even].tolist(), strict=True):
            pairs[min(a, b), max(a, b)] += 1
    beside: dict[int, list[int]] = defaultdict(list)
    for (a, b), n in pairs.items():
        if n == counts[a] == counts[b] and a in free and b in free:
            beside[a].append(b)
            beside[b].append(a)
    chains, seen = [], set[int]()
    for c in order:
        if len(beside[c]) == 1 and c not in seen:  # an end of a chain: rings have none and stay as they are
            chain = [c]
            while (after := [d for d in beside[chain[-1]] if d not in chain[-2:-1]]) and after[0] not in seen:
                seen.add(chain[-1])
                chain.append(after[0])
            seen.update(chain)
            chains.append(tuple(chain))
    return chains


def _broken(found: Blocks, labels: Labels) -> Iterator[int]:
    """Blocks that a sequence does not hold whole, in order and evenly repeated."""
    heads, sizes = _compressed(labels)
    k = 0
    while k < len(heads):
        block, _ = found.at.get(int(heads[k]), (NONE, 0))
        chain = found.members[block] if block != NONE else (int(heads[k]),)
        part = tuple(heads[k : k + len(chain)].tolist())
        whole = part == chain or part == chain[::-1]
        if not whole or len(set(sizes[k : k + len(chain)].tolist())) > 1:
            yield block
            k += 1
        else:
            k += len(chain)
