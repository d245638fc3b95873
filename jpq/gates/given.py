"""A mask that somebody else decided (`--mask`): held while weights and bits learn, and not for landing to change."""

from __future__ import annotations

from typing import ClassVar

import torch

from jpq.gates.base import Gate, Holds
from jpq.gates.counted import FAR
from jpq.types import Units


class Given(Gate):
    """Exactly 0 or 1 for each unit, from the start; everything is kept until `take`."""

    counted: ClassVar[bool] = True
    holds_quota: ClassVar[Holds] = "always"
    kept: Units

    def __init__(self, rows: int, n: int):
        super().__init__(rows, n)
        self.register_buffer("kept", torch.ones(rows, n))

    def take(self, keep: Units) -> None:
        """Hold these units, `[rows, n]` of 0 and 1."""
        self.kept.copy_(keep)

    def relaxed(self) -> Units:
        """The mask."""
        return self.kept

    def least(self) -> Units:
        """The mask: no budget makes it smaller."""
        return self.kept

    def margin(self) -> Units:
        """Far above or below 0."""
        return FAR * (2 * self.kept - 1)
