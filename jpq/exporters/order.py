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

from collections.abc import Collection, Iterable, Sequence

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
