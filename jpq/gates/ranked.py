"""A place in a ranking: somebody else's score says which units go first, landing says how many."""

from __future__ import annotations

from typing import ClassVar

import torch

from jpq.gates.base import Gate
from jpq.types import Units


class Ranked(Gate):
    """Everything is kept until landing; `margins` in (0, 1] say in which order units go."""

    whole_channels: ClassVar[bool] = True
    margins: Units

    def __init__(self, rows: int, n: int):
        super().__init__(rows, n)
        self.register_buffer("margins", torch.ones(rows, n))

    def relaxed(self) -> Units:
        """The decision."""
        return self.keep()

    def margin(self) -> Units:
        """The share of units that stand no higher: the last has 1."""
        return self.margins
