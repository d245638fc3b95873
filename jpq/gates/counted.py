"""Gates that keep a given number of units: what they share is how many, and out of which.

Where the structure says how many units of a row stay (2 of 2:4, 1 pattern of a kernel), that holds. Else `density` is
the share of weights that stay: in every row of its own where a site has several rows (k of n inputs of each neuron);
where a site is one row (all weights of a layer) its units compete with those of all such sites, unless a method ranks
layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from jpq.gates.base import Gate, Holds
from jpq.gates.topk import kept_of_rows, topk_rows
from jpq.types import JpqError, Units

FAR = 30.0  # margin, in nats, of a decision that landing must not take back


class Counted(Gate):
    """Exactly k units of each row, or of all pooled rows together."""

    counted: ClassVar[bool] = True
    holds_quota: ClassVar[Holds] = "at the end"

    def __init__(self, rows: int, n: int, density: float = 0.5):
        super().__init__(rows, n)
        if not 0 < density <= 1:
            raise JpqError(f"--density {density} must lie above 0 and be at most 1: it is the share that stays.")
        self.density = density
        self.quota: int | None = None
        self.sizes: Units
        self.register_buffer("sizes", torch.ones(rows, n))

    def bind(self, sizes: Units, quota: int | None) -> None:
        """Sizes rank units of different size by what they cost; a quota replaces the density."""
        self.sizes, self.quota = sizes.float(), quota

    @property
    def valid(self) -> Tensor | None:
        """Which units are no padding; None where all are."""
        real = self.sizes > 0
        return None if bool(real.all()) else real

    @property
    def pooled(self) -> bool:
        """Whether the units compete with those of other sites."""
        return self.rows == 1 and self.quota is None

    def count(self, density: float) -> Tensor:
        """Units that stay in each row, `[rows]`: at least one, and the quota where there is one."""
        real = (self.sizes > 0).sum(1)
        if self.quota is not None:
            return real.minimum(torch.full_like(real, self.quota))
        return kept_of_rows(density, real).clamp_min(1)

    def least(self) -> Units:
        """As many units as stay in the end, before it is known which: here, the largest of each row."""
        return self.top(self.sizes, self.density)

    def margin(self) -> Units:
        """Far above or below 0: which units stay is not for landing to change."""
        return FAR * (2 * self.keep() - 1)

    def top(self, scores: Units, density: float) -> Units:
        """1 for the best of each row, exactly `count(density)` of them."""
        return topk_rows(scores.detach(), self.count(density), self.valid)


@torch.no_grad()
def best_of_all(scores: Sequence[Units], sizes: Sequence[Units], density: float) -> list[Units]:
    """0 or 1 for each unit of each site: the best of all sites together, until `density` of all weights are kept.

    Args:
        scores: `[rows, n]` a site, comparable between sites (higher stays); ties go to the earlier site and unit.
        sizes: weights of each unit, `[rows, n]` a site; 0 for padding.

    Every site keeps at least its best unit, so a little more than `density` may stay where it is tiny.
    """
    flat = torch.cat([s.flatten() for s in scores])
    cost = torch.cat([s.flatten() for s in sizes]).double()
    order = flat.argsort(descending=True, stable=True)
    keep = torch.zeros_like(flat)
    keep[order] = (cost[order].cumsum(0) <= density * cost.sum() + 1e-6).to(flat.dtype)
    parts = [k.reshape(s.shape) for k, s in zip(keep.split([s.numel() for s in scores]), scores, strict=True)]
    for part, score, size in zip(parts, scores, sizes, strict=True):
        part.mul_(size > 0).view(-1)[score.masked_fill(size == 0, -torch.inf).argmax()] = 1
    return parts
