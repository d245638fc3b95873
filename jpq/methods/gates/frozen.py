"""Gates whose decision training cannot change: taken at discretization (`Frozen`) or given by a mask (`FixedMask`)."""

from __future__ import annotations

from typing import ClassVar

import torch

from jpq.methods.gates.base import Gate, Holds
from jpq.methods.gates.fixed_count import FAR
from jpq.types import Units


class Frozen(Gate):
    """Gate with a final decision, 0 or 1 for each unit; every gate is replaced by one at discretization."""

    kept: Units

    def __init__(self, keep: Units):
        super().__init__(*keep.shape)
        self.register_buffer("kept", keep.detach().clone())

    def relaxed(self) -> Units:
        """Decision, `[rows, n]` of 0 and 1."""
        return self.kept

    def margin(self) -> Units:
        """Margins of +1 where kept and -1 where dropped."""
        return 2 * self.kept - 1

    @classmethod
    def all(cls, rows: int, n: int) -> Frozen:
        """A frozen gate that keeps every unit."""
        return cls(torch.ones(rows, n))


class FixedMask(Gate):
    """Gate that holds a mask given from outside (--mask); everything is kept until `take`."""

    fixed_count: ClassVar[bool] = True
    decided_outside: ClassVar[bool] = True
    least_text: ClassVar[str] = "the units that --mask keeps"
    enforces_quota: ClassVar[Holds] = "always"
    kept: Units

    def __init__(self, rows: int, n: int):
        super().__init__(rows, n)
        self.register_buffer("kept", torch.ones(rows, n))

    def take(self, keep: Units) -> None:
        """Take over a mask from outside, `[rows, n]` of 0 and 1."""
        self.kept.copy_(keep)

    def relaxed(self) -> Units:
        """Mask, `[rows, n]` of 0 and 1."""
        return self.kept

    def least(self) -> Units:
        """Mask: no budget makes it smaller."""
        return self.kept

    def margin(self) -> Units:
        """Margins of +-FAR nats, so that discretization does not change the mask."""
        return FAR * (2 * self.kept - 1)
