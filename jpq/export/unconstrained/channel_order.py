"""In which order to store channels so that several readers, each with a set of its own, read contiguous runs.

A node is a reader i with the set N_i of channels that it keeps; readers whose sets meet are joined. Nodes laid out
one behind the other read without a copy exactly where they form an induced path: neighbours overlap, others do not.

    score of a path = sum of |N_i| - sum over its edges of |N_i & N_j|        (the distinct channels that it lays out)
    best(s, used)   = |N_s| + max(0, max over c next to s, not used, of best(c, used + s + all next to s) - |N_s & N_c|)

Take the best path again and again until every reader is on one; a set inside another is laid out within it. Nothing
is copied for two readers, for disjoint sets and for nested ones.
Source: Wan et al., UPSCALE: Unconstrained Channel Pruning, ICML 2023, arXiv:2307.08771.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jpq.tracing.network import Network
from jpq.types import NONE, Labels

Set = frozenset[int]

STEPS = 5_000  # of the search for one path; a graph that needs more gets a path that is good, not best


def order(sets: Sequence[Collection[int]], channels: Sequence[int]) -> list[int]:
    """`channels` in an order that lets readers of `sets` (subsets of them) copy little; never worse than as given.

    Channels that nobody keeps come last. Ties go to the reader with the lowest number.
    """
    place = {c: k for k, c in enumerate(channels)}
    laid = [channels[k] for k in _lay([frozenset(place[c] for c in s) for s in sets if len(s)])]
    seen = set(laid)
    found = laid + [c for c in channels if c not in seen]
    return found if copied(sets, found) <= copied(sets, channels) else list(channels)


def copied(sets: Iterable[Collection[int]], channels: Sequence[int]) -> int:
    """Channels that readers of `sets` must gather from `channels` in this order: all of a set that has a gap."""
    place = {c: k for k, c in enumerate(channels)}
    return sum(len(s) for s in sets if len(s) and not contiguous([place[c] for c in s]))


def contiguous(places: Collection[int]) -> bool:
    """Whether distinct places leave no gap."""
    return len(places) == 0 or max(places) - min(places) + 1 == len(places)


def _lay(sets: Sequence[Set]) -> list[int]:
    """The channels of all sets, path after path."""
    parents = [_parent(i, sets) for i in range(len(sets))]
    roots = [i for i, p in enumerate(parents) if p is None]
    within = {r: _lay([sets[i] for i in range(len(sets)) if i != r and _root(i, parents) == r]) for r in roots}
    out: dict[int, None] = {}
    for path in _cover([sets[r] for r in roots]):
        nodes = [roots[k] for k in path]
        for k, node in enumerate(nodes):
            before = sets[nodes[k - 1]] if k else Set()
            after = sets[nodes[k + 1]] if k + 1 < len(nodes) else Set()
            own = list(dict.fromkeys([*within[node], *sorted(sets[node])]))
            for part in (before, sets[node] - before - after, after):
                out.update(dict.fromkeys(c for c in own if c in part))
    return list(out)


def _parent(i: int, sets: Sequence[Set]) -> int | None:
    """The smallest set that holds set i: of equal sets the first is the parent of the others."""
    holders = [p for p, s in enumerate(sets) if sets[i] < s or (sets[i] == s and p < i)]
    holders = [p for p in holders if not any(sets[q] == sets[p] and q < p for q in holders)]
    return min(holders, key=lambda p: (len(sets[p]), p), default=None)


def _root(i: int, parents: Sequence[int | None]) -> int:
    while (parent := parents[i]) is not None:
        i = parent
    return i


def _cover(sets: Sequence[Set]) -> list[list[int]]:
    """Disjoint paths over all nodes, the best first."""
    beside = [Set(j for j, t in enumerate(sets) if j != i and s & t) for i, s in enumerate(sets)]
    used, paths = Set(), []
    while len(used) < len(sets):
        search = _Search(sets, beside)
        found = [search.best(s, used) for s in range(len(sets)) if s not in used]
        _, path = max(found, key=lambda f: f[0])  # the first of equals
        paths.append(path)
        used |= Set(path)
    return paths


class _Search:
    """Best paths in one graph, within a number of steps."""

    def __init__(self, sets: Sequence[Set], beside: Sequence[Set]):
        self.sets, self.beside, self.left = sets, beside, STEPS

    def best(self, start: int, used: Set) -> tuple[int, list[int]]:
        """(score, nodes) of the best path from `start` that meets no used node."""
        self.left -= 1
        gain, rest = 0, list[int]()
        if self.left > 0:
            for c in sorted(self.beside[start] - used):
                score, path = self.best(c, used | {start} | self.beside[start])
                score -= len(self.sets[start] & self.sets[c])
                if score > gain:
                    gain, rest = score, path
        return len(self.sets[start]) + gain, [start, *rest]


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
