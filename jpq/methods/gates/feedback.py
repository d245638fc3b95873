"""DPF gate: masks the smallest units in the forward pass and gives the dense weights the whole gradient.

T. Lin, S. Stich, L. Barba, D. Dmitriev, M. Jaggi, "Dynamic Model Pruning with Feedback", ICLR 2020, arXiv:2006.07253.

| paper | here | value |
|---|---|---|
| mask from one threshold on all tensors, every p = 16 iterations | `after_step` | `EVERY` |
| s_t = s_f (1 - (1 - t / T)^3) | `sparsity` | from 0 |
| T: iteration of the second learning-rate drop (225 of 300 epochs) | `FREEZE` | 3/4 of the search |
| g at m * w, applied to dense w | `straight_through` (see `compression/masking.py`) | |

Filters, blocks and other units of several weights rank by their norm over the root of their size.

We differ: the mask freezes by the position in the search, whatever the learning rate is there. The last layer is pruned
like all others (--skip leaves it dense; the public codes disagree).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from jpq.methods.gates.base import Gate, Holds, squared_norms
from jpq.methods.gates.fixed_count import FixedCount, best_of_all
from jpq.methods.structures.base import Structure
from jpq.types import Units, Weight

EVERY, FREEZE = 16, 0.75  # steps between decisions; position in the search from which the mask stays


class Feedback(FixedCount):
    """Gate that keeps the largest units of all layers together, with a new decision every 16 steps."""

    needs_weights: ClassVar[bool] = True
    enforces_quota: ClassVar[Holds] = "always"
    straight_through: ClassVar[bool] = True
    kept: Units
    steps: Tensor

    def __init__(self, rows: int, n: int, density: float = 0.5):
        super().__init__(rows, n, density)
        self.register_buffer("kept", torch.ones(rows, n))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.frozen: Tensor
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self.pool: list[Feedback] = [self]
        self.scores: Units = torch.ones(rows, n)
        self.started = False

    @torch.no_grad()
    def observe_weights(self, weights: Sequence[tuple[Weight, Structure]]) -> None:
        """Score each unit by the mean square of its weights; with a quota the first mask stands from the start."""
        self.scores = squared_norms(weights) / self.sizes.clamp_min(1)
        if self.quota is not None and not self.started:
            self.kept.copy_(self.top(self.scores, self.density))
        self.started = True

    def link(self, gates: Sequence[Gate]) -> None:
        """Collect the gates that this one is ranked with."""
        if self.pooled:
            self.pool = [g for g in gates if isinstance(g, Feedback) and g.pooled]

    def least(self) -> Units:
        """Mask that the present weights would leave at the end; training may move it between layers."""
        if not self.pooled or not all(g.started for g in self.pool):
            return super().least()
        masks = best_of_all([g.scores for g in self.pool], [g.sizes for g in self.pool], self.density)
        return masks[next(i for i, g in enumerate(self.pool) if g is self)]

    def sparsity(self, progress: float) -> float:
        """Share of the weights that is dropped at this point of the search, by the cubic schedule."""
        return (1 - self.density) * (1 - (1 - min(1.0, progress / FREEZE)) ** 3)

    def relaxed(self) -> Units:
        """Present mask, `[rows, n]` of 0 and 1."""
        return self.kept

    def keep(self) -> Units:
        """Present mask, `[rows, n]` of 0 and 1."""
        return self.kept

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Decide anew every 16 steps until the mask freezes; the first gate of a pool decides for all of it."""
        if self.pool[0] is not self or bool(self.frozen):
            return
        self.steps += 1
        if int(self.steps) % EVERY and progress < FREEZE:
            return
        density = 1 - self.sparsity(progress)
        if self.pooled:
            masks = best_of_all([g.scores for g in self.pool], [g.sizes for g in self.pool], density)
        else:
            masks = [self.top(self.scores, density)]
        for gate, mask in zip(self.pool, masks, strict=True):
            gate.kept.copy_(mask)
            gate.frozen.fill_(progress >= FREEZE)
