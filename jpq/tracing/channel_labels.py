"""Channel labels: a union-find over single channels, vectorised so that a whole network takes milliseconds."""

from __future__ import annotations

import numpy as np

from jpq.types import NONE, Labels


def distinct(labels: Labels) -> list[int]:
    """Each class once, smallest first; NONE too. Sorting beats the hashing of np.unique on runs of numbers."""
    ordered = np.sort(labels)
    return ordered[np.diff(ordered, prepend=ordered[:1] - 1) != 0].tolist()


class ChannelClasses:
    """Which channels stand or fall together, and which may not fall at all.

    `fresh` hands out labels, `union` ties them index by index, `freeze` notes a reason, `find` gives the class of
    each label: the smallest label in it.
    """

    def __init__(self) -> None:
        self._parent: Labels = np.empty(0, np.int64)
        self._size = 0
        self._pending: list[tuple[Labels, Labels]] = []
        self._frozen: list[tuple[Labels, str]] = []

    def fresh(self, n: int) -> Labels:
        """New labels, each a class of its own."""
        start, self._size = self._size, self._size + n
        return np.arange(start, self._size, dtype=np.int64)

    def union(self, a: Labels, b: Labels, reason: str) -> None:
        """Tie a[i] and b[i]; a label that meets NONE is frozen for `reason`."""
        both = (a != NONE) & (b != NONE)
        self._pending.append((a[both], b[both]))
        self.freeze(np.where(both, NONE, np.maximum(a, b)), reason)

    def freeze(self, labels: Labels | None, reason: str) -> None:
        """These channels stay, for `reason`; the first reason that a class gets is the one reported."""
        if labels is not None and (held := labels[labels != NONE]).size:
            self._frozen.append((held, reason))

    def find(self, labels: Labels) -> Labels:
        """The class of each label; NONE stays NONE."""
        self._flush()
        out = self._parent[np.where(labels == NONE, 0, labels)] if self._size else labels
        return np.where(labels == NONE, NONE, out)

    def frozen(self) -> dict[int, str]:
        """Frozen class -> its first reason."""
        out: dict[int, str] = {}
        for labels, reason in self._frozen:
            for root in distinct(self.find(labels)):
                out.setdefault(root, reason)
        return out

    def _flush(self) -> None:
        """Hook the larger root under the smaller and jump pointers until no edge joins two classes."""
        parent = np.concatenate([self._parent, np.arange(len(self._parent), self._size, dtype=np.int64)])
        if self._pending:
            a = np.concatenate([p[0] for p in self._pending])
            b = np.concatenate([p[1] for p in self._pending])
            self._pending = []
            while (apart := parent[a] != parent[b]).any():
                a, b = parent[a[apart]], parent[b[apart]]
                np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
                while (up := parent[parent]).tobytes() != parent.tobytes():
                    parent = up
        self._parent = parent
