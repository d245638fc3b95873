"""Order of stored channels in which several consumers, each with a kept set of its own, read contiguous runs.

A node is a consumer i with the set N_i of channels that it keeps; consumers whose sets overlap are joined by an edge.
Nodes laid out one behind the other read without a copy exactly where they form an induced path: neighbours overlap,
others do not.

    score of a path = sum of |N_i| - sum over its edges of |N_i & N_j|        (the distinct channels that it lays out)
    best(s, used)   = |N_s| + max(0, max over c next to s, not used, of best(c, used + s + all next to s) - |N_s & N_c|)

The best path is taken again and again until every consumer is on one; a set inside another is laid out within it.
Nothing is copied for two consumers, for disjoint sets and for nested ones.
Source: Wan et al., UPSCALE: Unconstrained Channel Pruning, ICML 2023, arXiv:2307.08771.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

Set = frozenset[int]

MAX_SEARCH_STEPS = 5_000  # for one path; a graph that needs more gets a path that is good, not best


def order_channels(sets: Sequence[Collection[int]], channels: Sequence[int]) -> list[int]:
    """Order `channels` so that consumers of `sets` (subsets of them) copy few; never worse than the given order.

    Channels that no consumer keeps come last. Ties go to the consumer with the lowest number.
    """
    place = {c: k for k, c in enumerate(channels)}
    laid_out = [channels[k] for k in _lay_out([Set(place[c] for c in s) for s in sets if len(s)])]
    placed = set(laid_out)
    order = laid_out + [c for c in channels if c not in placed]
    return order if count_copied(sets, order) <= count_copied(sets, channels) else list(channels)


def count_copied(sets: Iterable[Collection[int]], channels: Sequence[int]) -> int:
    """Number of channels that consumers of `sets` copy from `channels` in this order: all of a set with a gap."""
    place = {c: k for k, c in enumerate(channels)}
    return sum(len(s) for s in sets if len(s) and not is_contiguous([place[c] for c in s]))


def is_contiguous(places: Collection[int]) -> bool:
    """Whether distinct places leave no gap."""
    return len(places) == 0 or max(places) - min(places) + 1 == len(places)


def _lay_out(sets: Sequence[Set]) -> list[int]:
    """The channels of all sets, path after path."""
    parents = [_parent(i, sets) for i in range(len(sets))]
    roots = [i for i, p in enumerate(parents) if p is None]
    nested = {r: _lay_out([sets[i] for i in range(len(sets)) if i != r and _root(i, parents) == r]) for r in roots}
    order: dict[int, None] = {}
    for path in _cover([sets[r] for r in roots]):
        nodes = [roots[k] for k in path]
        for k, node in enumerate(nodes):
            before = sets[nodes[k - 1]] if k else Set()
            after = sets[nodes[k + 1]] if k + 1 < len(nodes) else Set()
            channels = list(dict.fromkeys([*nested[node], *sorted(sets[node])]))
            for part in (before, sets[node] - before - after, after):
                order.update(dict.fromkeys(c for c in channels if c in part))
    return list(order)


def _parent(i: int, sets: Sequence[Set]) -> int | None:
    """The smallest set that contains set i: of equal sets the first is the parent of the others."""
    containers = [p for p, s in enumerate(sets) if sets[i] < s or (sets[i] == s and p < i)]
    containers = [p for p in containers if not any(sets[q] == sets[p] and q < p for q in containers)]
    return min(containers, key=lambda p: (len(sets[p]), p), default=None)


def _root(i: int, parents: Sequence[int | None]) -> int:
    """The outermost set that contains set i."""
    while (parent := parents[i]) is not None:
        i = parent
    return i


def _cover(sets: Sequence[Set]) -> list[list[int]]:
    """Disjoint paths over all nodes, the best first."""
    neighbours = [Set(j for j, t in enumerate(sets) if j != i and s & t) for i, s in enumerate(sets)]
    used, paths = Set(), []
    while len(used) < len(sets):
        search = _PathSearch(sets, neighbours)
        candidates = [search.best(s, used) for s in range(len(sets)) if s not in used]
        _, path = max(candidates, key=lambda candidate: candidate[0])  # the first of equals
        paths.append(path)
        used |= Set(path)
    return paths


class _PathSearch:
    """Search for best paths in one graph, within a number of steps."""

    def __init__(self, sets: Sequence[Set], neighbours: Sequence[Set]):
        self.sets, self.neighbours, self.steps_left = sets, neighbours, MAX_SEARCH_STEPS

    def best(self, start: int, used: Set) -> tuple[int, list[int]]:
        """(score, nodes) of the best path from `start` that contains no used node."""
        self.steps_left -= 1
        gain, rest = 0, list[int]()
        if self.steps_left > 0:
            for c in sorted(self.neighbours[start] - used):
                score, path = self.best(c, used | {start} | self.neighbours[start])
                score -= len(self.sets[start] & self.sets[c])
                if score > gain:
                    gain, rest = score, path
        return len(self.sets[start]) + gain, [start, *rest]
