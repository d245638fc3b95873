"""A decision that has been taken: what every gate becomes at landing."""

from __future__ import annotations

import torch

from jpq.gates.base import Gate
from jpq.types import Units


class Decided(Gate):
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
    def all(cls, rows: int, n: int) -> Decided:
        """Everything kept."""
        return cls(torch.ones(rows, n))
