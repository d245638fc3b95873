"""Channel labels and their classes: a union-find over single channels, vectorised with numpy."""

from __future__ import annotations

import numpy as np

from jpq.types import NONE, Labels


def unique_labels(labels: Labels) -> list[int]:
    """Each distinct label (or class) once, smallest first, NONE included.

    Sorting is faster here than the hashing of np.unique, as labels come in runs of numbers.
    """
    ordered = np.sort(labels)
    return ordered[np.diff(ordered, prepend=ordered[:1] - 1) != 0].tolist()


class ChannelClasses:
    """The classes of channels that are kept or removed together, and which of those classes must stay.

    `fresh` hands out labels, `union` ties them index by index, `freeze` notes a reason, `find` gives the class of
    each label: the smallest label in it.
    """

    def __init__(self) -> None:
        self._parent: Labels = np.empty(0, np.int64)
        self._size = 0
        self._pending: list[tuple[Labels, Labels]] = []
        self._frozen: list[tuple[Labels, str]] = []

    def fresh(self, n: int) -> Labels:
        """`[n]` new labels, each a class of its own."""
        start, self._size = self._size, self._size + n
        return np.arange(start, self._size, dtype=np.int64)

    def union(self, a: Labels, b: Labels, reason: str) -> None:
        """Tie a[i] and b[i] into one class; a label that meets NONE is frozen for `reason`."""
        both = (a != NONE) & (b != NONE)
        self._pending.append((a[both], b[both]))
        self.freeze(np.where(both, NONE, np.maximum(a, b)), reason)

    def freeze(self, labels: Labels | None, reason: str) -> None:
        """Keep these channels, for `reason`; the first reason that a class gets is the one reported."""
        if labels is not None and (known := labels[labels != NONE]).size:
            self._frozen.append((known, reason))

    def find(self, labels: Labels) -> Labels:
        """The class of each label; NONE stays NONE."""
        self._flush()
        classes = self._parent[np.where(labels == NONE, 0, labels)] if self._size else labels
        return np.where(labels == NONE, NONE, classes)

    def frozen(self) -> dict[int, str]:
        """Frozen class -> its first reason."""
        reasons: dict[int, str] = {}
        for labels, reason in self._frozen:
            for root in unique_labels(self.find(labels)):
                reasons.setdefault(root, reason)
        return reasons

    def _flush(self) -> None:
        """Apply pending unions: hook the larger root under the smaller and jump pointers until nothing changes."""
        parent = np.concatenate([self._parent, np.arange(len(self._parent), self._size, dtype=np.int64)])
        if self._pending:
            a = np.concatenate([pair[0] for pair in self._pending])
            b = np.concatenate([pair[1] for pair in self._pending])
            self._pending = []
            while (unequal := parent[a] != parent[b]).any():
                a, b = parent[a[unequal]], parent[b[unequal]]
                np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
                while (grandparent := parent[parent]).tobytes() != parent.tobytes():
                    parent = grandparent
        self._parent = parent
