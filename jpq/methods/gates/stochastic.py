"""SPP gate: masks every unit at random, with a probability that moves with the unit's rank until it is 0 or 1.

H. Wang, Q. Zhang, Y. Wang, H. Hu, "Structured Probabilistic Pruning for Convolutional Neural Network Acceleration",
BMVC 2018, arXiv:1709.06994.

| paper | here | value or shape |
|---|---|---|
| p, pruning probability | `p` | [rows, n], starts at 0 |
| Bernoulli(1 - p) once per group and iteration | `relaxed()`, kept in `z` until the step is over | [rows, n] |
| A, u; Delta(r) | `RISE`, `TURN`; `probability_change` | 0.05, 0.25; [rows, n] |
| rank r, by L1 norm, averaged over the updates | `rank`, `importance` | [rows, n] |
| K, groups still to be pruned, anew at each update | `left` | [rows] |
| an update every t iterations | UPDATES of them in the first SPAN of the search | |
| surviving weights times 1 - p when a layer is finished | `_finish` | |

A weight that is masked in an iteration keeps its value: `after_step` puts it back, whatever momentum and decay did
(what the optimizer remembers of it still decays). Means of ranks divide by the number of updates, not of iterations;
K is counted anew at each, so that no more groups ever rise than are still to go.

We differ: norms are those of the float weights; k = floor(density n + 1/2) units stay; evaluation sees every unit times
1 - p, which is exact once p is 0 or 1, and what is still undecided at the end of the span is cut there. Weights of
units that are out are masked for good instead of zeroed. First, last and depthwise layers are pruned like all others
(--skip leaves them dense).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from jpq.methods.gates.fixed_count import FixedCount
from jpq.methods.structures.base import Structure
from jpq.types import Units, Weight

RISE, TURN = 0.05, 0.25  # A and u of the paper

UPDATES, SPAN = 250, 0.9  # updates of p, and the share of the search that holds them

ALMOST = 1 - 1e-6  # pruning probability from which p counts as 1

STEEP = 50.0  # largest exponent


class Stochastic(FixedCount):
    """Gate that keeps the units whose pruning probability p has not reached 1: exactly k of each row at the end."""

    needs_weights: ClassVar[bool] = True
    p: Units
    rank: Units
    z: Units
    updates: Tensor
    drawn: Tensor
    finished: Tensor

    def __init__(self, rows: int, n: int, density: float = 0.5):
        super().__init__(rows, n, density)
        self.register_buffer("p", torch.zeros(rows, n))
        self.register_buffer("rank", torch.zeros(rows, n))  # mean over the updates
        self.register_buffer("z", torch.ones(rows, n))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("drawn", torch.zeros((), dtype=torch.bool))
        self.register_buffer("finished", torch.zeros(rows, dtype=torch.bool))
        self.weights: list[tuple[Weight, Structure]] = []
        self.before: list[Weight] = []

    def observe_weights(self, weights: Sequence[tuple[Weight, Structure]]) -> None:
        """Remember the weights of the taps."""
        self.weights = list(weights)

    @torch.no_grad()
    def relaxed(self) -> Units:
        """Random mask of 0 and 1, drawn once per optimizer step however many forward passes that step has."""
        if not bool(self.drawn):
            self.z.copy_(torch.rand_like(self.p) >= self.p)
            self.before = [weight.detach().clone() for weight, _ in self.weights]
            self.drawn.fill_(bool(self.weights))
        return self.z.clone()

    def keep(self) -> Units:
        """Mask of the units with p < 1."""
        return ((self.p < 1) & (self.sizes > 0)).to(self.p.dtype)

    def scale(self) -> Units:
        """Mean of the masks, 1 - p."""
        return 1 - self.p

    @property
    def out(self) -> Tensor:
        """Units that are dropped for good: bool `[rows, n]`, padding among them."""
        return (self.p >= 1) | (self.sizes == 0)

    @property
    def left(self) -> Tensor:
        """Number of units of each row that are still to be dropped (K), `[rows]`."""
        return (~self.out).sum(1) - self.count(self.density).to(self.p.device)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Restore masked weights, then make the updates that are due."""
        if bool(self.drawn):
            self._put_back()
        due = int(UPDATES * min(1.0, progress / SPAN))
        while int(self.updates) < due:
            self._update()
        if due == UPDATES and not bool(self.finished.all()):
            # the likeliest to go, the least important first among equals
            scores = -self.p.double() * 2 * self.n + self._order() / max(1, self.n)
            self.p.masked_fill_((self.top(scores, self.density) == 0) & ~self.finished[:, None], 1.0)
            self._finish()
        self.drawn.fill_(False)

    @torch.no_grad()
    def importance(self) -> Units:
        """L1 norm of each unit's weights over all taps; smaller units at ragged edges are scaled to full size."""
        parts = [structure.pool(weight.detach().abs()) for weight, structure in self.weights]
        return torch.stack(parts).sum(0) * (self.sizes.amax(1, keepdim=True) / self.sizes.clamp_min(1))

    def _update(self) -> None:
        """Update ranks and probabilities, and finish rows that have nothing left to prune."""
        self.updates += 1
        if bool(self.finished.all()):
            return
        self.rank += (self._ranks(self.importance()) - self.rank) / self.updates
        left = self.left[:, None]
        moved = (self.p + probability_change(self._order(), left)).clamp(0, 1)
        moved[moved >= ALMOST] = 1.0
        self.p.copy_(torch.where(self.out | (left <= 0), self.p, moved))
        self._finish()

    def _ranks(self, scores: Units) -> Units:
        """Rank of each unit, `[rows, n]`: 0 for the least still in; ties go by number, dropped units come last."""
        return scores.masked_fill(self.out, math.inf).argsort(dim=1, stable=True).argsort(dim=1).to(self.p)

    def _order(self) -> Units:
        return self._ranks(self.rank)

    def _finish(self) -> None:
        """Finish rows with nothing left to prune: scale survivors by the mean of their masks, and set their p to 0."""
        ending = (self.left <= 0) & ~self.finished
        if not bool(ending.any()):
            return
        survivors = ending[:, None] & ~self.out
        factor = torch.where(survivors, 1 - self.p, torch.ones_like(self.p))
        for weight, structure in self.weights:
            weight.mul_(structure.expand(factor, weight.shape))
        self.p.masked_fill_(survivors, 0.0)
        self.finished |= ending

    def _put_back(self) -> None:
        for (weight, structure), before in zip(self.weights, self.before, strict=True):
            masked = (structure.expand(self.z, weight.shape) == 0).expand_as(weight)
            weight.copy_(torch.where(masked, before, weight))


def probability_change(rank: Tensor, left: Tensor) -> Tensor:
    """Increment Delta(r) of a unit's pruning probability at rank r, with `left` (K) units still to be dropped.

    A at r = 0, u A at N = -ln u / a, 0 at K, point-symmetric about (N, u A) and falling; a = (ln 2 - ln u) / K.
    In float64.
    """
    a = (math.log(2) - math.log(TURN)) / left.clamp_min(1).double()
    turn = -math.log(TURN) / a
    near = RISE * (-a * rank).exp()
    far = 2 * TURN * RISE - RISE * (-a * (2 * turn - rank)).clamp_max(STEEP).exp()
    return torch.where(rank <= turn, near, far)
