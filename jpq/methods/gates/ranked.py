"""Ranked gate: the units' order comes from a score, the number that stays from a schedule or from discretization."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from jpq.methods.gates.base import Gate
from jpq.types import Units


class Ranked(Gate):
    """Gate that keeps the units above a threshold in a ranking; its decision is hard at any time.

    `margins` is the share of the ranked units that stand no higher, in (0, 1], minus a threshold. The threshold is 0,
    which keeps all units, until a schedule closes units (`jpq.allocation.ranking.scheduled_pruning`); discretization
    moves it either way.
    """

    channels_only: ClassVar[bool] = True
    ranks_units: ClassVar[bool] = True
    margins: Units
    decisions: Tensor  # how many decisions of the schedule have been taken

    def __init__(self, rows: int, n: int):
        super().__init__(rows, n)
        self.register_buffer("margins", torch.ones(rows, n))
        self.register_buffer("decisions", torch.zeros((), dtype=torch.long))

    def relaxed(self) -> Units:
        """Decision, `[rows, n]` of 0 and 1."""
        return self.keep()

    def margin(self) -> Units:
        """Place of each unit in the ranking above the threshold."""
        return self.margins
