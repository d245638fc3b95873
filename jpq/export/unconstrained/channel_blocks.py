"""`Blocks`: channels of a network that may change places, because they are neighbours wherever either appears.

Channels are label classes (see jpq.tracing). A block is a chain of classes: stored in another order, in every tensor
that holds it, the network computes the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jpq.tracing.network import Network
from jpq.types import NONE, Labels

Chain = tuple[int, ...]  # classes in natural order


@dataclass(frozen=True)
class Blocks:
    """Blocks of label classes; a class that is in none keeps its place."""

    members: tuple[Chain, ...]  # block -> its classes in natural order, at least two
    place_of: Mapping[int, tuple[int, int]]  # class -> (block, place in it)

    def runs(self, labels: Labels) -> Iterator[tuple[int, int, int]]:
        """(first position, length, block or NONE) of every whole block in a sequence, and of the positions between."""
        heads, sizes = _run_lengths(labels)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        k = 0
        while k < len(heads):
            block, place = self.place_of.get(int(heads[k]), (NONE, 0))
            n = len(self.members[block]) if block != NONE and place in (0, len(self.members[block]) - 1) else 1
            yield int(starts[k]), int(starts[min(k + n, len(heads))] - starts[k]), block
            k += n

    def natural_rank(self) -> Labels:
        """Class -> its place within its block, in the network's own order."""
        rank = np.zeros(1 + max(self.place_of, default=0), np.int64)
        for c, (_, place) in self.place_of.items():
            rank[c] = place
        return rank

    def places(self, labels: Labels, rank: Labels) -> Labels:
        """Old positions of a sequence's classes in their new order; `rank[c]`: new place of class c in its block."""
        positions = np.arange(len(labels))
        for start, n, block in self.runs(labels):
            if block != NONE and n > 1:
                keys = rank[labels[start : start + n]]
                backward = self.place_of[int(labels[start])][1] != 0
                positions[start : start + n] = start + np.argsort(-keys if backward else keys, kind="stable")
        return positions


def find_blocks(network: Network) -> Blocks:
    """The blocks of a network: chains of classes that are neighbours wherever either appears."""
    sequences = _class_sequences(network)
    produced = [layer.outputs for layer in network.layers] + list(network.embeddings.values())
    free = {c for labels in produced for c in labels.tolist()} - {NONE} - network.frozen.keys()
    chains = _chains(sequences, free)
    while True:
        blocks = Blocks(tuple(chains), {c: (b, k) for b, chain in enumerate(chains) for k, c in enumerate(chain)})
        broken = {b for labels in sequences for b in _broken_blocks(blocks, labels)}
        if not broken:
            return blocks
        chains = [chain for b, chain in enumerate(chains) if b not in broken]


def _class_sequences(network: Network) -> list[Labels]:
    """Every distinct sequence of classes along a dim of a parameter, a layer's input or output, or an attribute."""
    sequences = [labels for dims in network.axes.values() for labels in dims.values()]
    sequences += [labels for layer in network.layers for labels in (layer.inputs, layer.outputs)]
    sequences += [*network.attributes.values(), *network.embeddings.values()]
    return list({labels.tobytes(): labels for labels in sequences if len(labels)}.values())


def _run_lengths(labels: Labels) -> tuple[Labels, Labels]:
    """Repeats in a row as (class, number); entries without a class stay single."""
    is_start = np.concatenate([[True], (labels[1:] != labels[:-1]) | (labels[1:] == NONE)])
    starts = np.flatnonzero(is_start)
    return labels[starts], np.diff(np.append(starts, len(labels)))


def _chains(sequences: Sequence[Labels], free: Collection[int]) -> list[Chain]:
    """Chains of free classes whose every occurrence has the same neighbours."""
    order, neighbours = _constant_neighbours(sequences, free)
    chains, visited = [], set[int]()
    for c in order:
        if len(neighbours[c]) == 1 and c not in visited:  # an end of a chain: rings have none and stay as they are
            chain = [c]
            while (following := [d for d in neighbours[chain[-1]] if d not in chain[-2:-1]]) and (
                following[0] not in visited
            ):
                visited.add(chain[-1])
                chain.append(following[0])
            visited.update(chain)
            chains.append(tuple(chain))
    return chains


def _constant_neighbours(sequences: Sequence[Labels], free: Collection[int]) -> tuple[list[int], dict[int, list[int]]]:
    """(classes in order of first occurrence, class -> free classes beside it wherever either occurs)."""
    class_counts: dict[int, int] = defaultdict(int)
    pair_counts: dict[tuple[int, int], int] = defaultdict(int)
    order: dict[int, None] = {}
    for labels in sequences:
        heads, sizes = _run_lengths(labels)
        for c in heads.tolist():
            class_counts[c] += 1
        order.update(dict.fromkeys(heads.tolist()))
        same_size = sizes[1:] == sizes[:-1]
        for a, b in zip(heads[:-1][same_size].tolist(), heads[1:][same_size].tolist(), strict=True):
            pair_counts[min(a, b), max(a, b)] += 1
    neighbours: dict[int, list[int]] = defaultdict(list)
    for (a, b), n in pair_counts.items():
        if n == class_counts[a] == class_counts[b] and a in free and b in free:
            neighbours[a].append(b)
            neighbours[b].append(a)
    return list(order), neighbours


def _broken_blocks(blocks: Blocks, labels: Labels) -> Iterator[int]:
    """Blocks that a sequence does not hold whole, in order and evenly repeated."""
    heads, sizes = _run_lengths(labels)
    k = 0
    while k < len(heads):
        block, _ = blocks.place_of.get(int(heads[k]), (NONE, 0))
        chain = blocks.members[block] if block != NONE else (int(heads[k]),)
        part = tuple(heads[k : k + len(chain)].tolist())
        in_order = part in (chain, chain[::-1])
        if not in_order or len(set(sizes[k : k + len(chain)].tolist())) > 1:
            yield block
            k += 1
        else:
            k += len(chain)
