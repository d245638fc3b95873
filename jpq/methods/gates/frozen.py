"""A decision that has been taken: what every gate becomes at landing."""

from __future__ import annotations

from typing import ClassVar

import torch

from jpq.methods.gates.base import Gate, Holds
from jpq.methods.gates.fixed_count import FAR
from jpq.types import Units


class Frozen(Gate):
    """Exactly 0 or 1 for each unit, unchanged by training."""

    kept: Units

    def __init__(self, keep: Units):
        super().__init__(*keep.shape)
        self.register_buffer("kept", keep.detach().clone())

    def relaxed(self) -> Units:
        """The decision."""
        return self.kept

    def margin(self) -> Units:
        """+1 where kept, -1 where dropped."""
        return 2 * self.kept - 1

    @classmethod
    def all(cls, rows: int, n: int) -> Frozen:
        """Everything kept."""
        return cls(torch.ones(rows, n))


class FixedMask(Gate):
    """Exactly 0 or 1 for each unit, from the start; everything is kept until `take`."""

    fixed_count: ClassVar[bool] = True
    decided_outside: ClassVar[bool] = True
    least_text: ClassVar[str] = "the units that --mask keeps"
    enforces_quota: ClassVar[Holds] = "always"
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
