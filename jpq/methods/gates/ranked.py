"""A place in a ranking: somebody else's score says which units go first, a schedule or landing says how many."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from jpq.methods.gates.base import Gate
from jpq.types import Units


class Ranked(Gate):
    """Keep the units above a threshold in the ranking; hard at any time.

    `margins` is the share of the ranked units that stand no higher, in (0, 1], less the threshold: 0 until a schedule
    closes units (`jpq.allocation.ranking.scheduled_pruning`), so that all are kept; landing moves it either way.
    """

    channels_only: ClassVar[bool] = True
    ranks_units: ClassVar[bool] = True
    margins: Units
    decisions: Tensor  # how many of its schedule's decisions have been taken

    def __init__(self, rows: int, n: int):
        super().__init__(rows, n)
        self.register_buffer("margins", torch.ones(rows, n))
        self.register_buffer("decisions", torch.zeros((), dtype=torch.long))

    def relaxed(self) -> Units:
        """The decision."""
        return self.keep()

    def margin(self) -> Units:
        """Place in the ranking above the threshold."""
        return self.margins
