"""The contract of gates that keep a prescribed number of units, and exact top-k selection.

The structure's quota holds where there is one (2 of 2:4, 1 pattern of a kernel). Else `density` is the share of weights
that stay: in each row where a site has several rows (k of n inputs of each neuron). Where a site is one row (all
weights of a layer) its units compete with those of all such sites, unless a method ranks layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from jpq.methods.gates.base import Gate, Holds
from jpq.types import JpqError, Units

FAR = 30.0  # margin, in nats, of a decision that discretization must not change

SMALL = 16  # rows up to this long are ranked by comparing all pairs, which is faster than sorting


class FixedCount(Gate):
    """Gate that keeps exactly k units of each row, or of all pooled rows together."""

    fixed_count: ClassVar[bool] = True
    takes_density: ClassVar[bool] = True
    least_text: ClassVar[str] = "the units that --density leaves"
    enforces_quota: ClassVar[Holds] = "at the end"

    def __init__(self, rows: int, n: int, density: float = 0.5):
        super().__init__(rows, n)
        if not 0 < density <= 1:
            raise JpqError(f"--density {density} must lie above 0 and be at most 1: it is the share that stays.")
        self.density = density
        self.quota: int | None = None
        self.sizes: Units
        self.register_buffer("sizes", torch.ones(rows, n))

    def set_site(self, sizes: Units, quota: int | None) -> None:
        """Set unit sizes, by which units are weighed in a ranking, and the quota, which replaces the density."""
        self.sizes, self.quota = sizes.float(), quota

    @property
    def valid(self) -> Tensor | None:
        """Bool `[rows, n]`, False for padding; None where no unit is padding."""
        real = self.sizes > 0
        return None if bool(real.all()) else real

    @property
    def pooled(self) -> bool:
        """Whether the units compete with those of other sites."""
        return self.rows == 1 and self.quota is None

    def count(self, density: float) -> Tensor:
        """Number of units that stay in each row, `[rows]`: at least one, or the quota where there is one."""
        real = (self.sizes > 0).sum(1)
        if self.quota is not None:
            return real.minimum(torch.full_like(real, self.quota))
        return kept_counts(density, real).clamp_min(1)

    def least(self) -> Units:
        """A mask with as many units as stay in the end, before it is known which: here the largest of each row."""
        return self.top(self.sizes, self.density)

    def margin(self) -> Units:
        """Margins of +-FAR nats, so that discretization does not change which units stay."""
        return FAR * (2 * self.keep() - 1)

    def top(self, scores: Units, density: float) -> Units:
        """Mask of the best `count(density)` units of each row, `[rows, n]` of 0 and 1."""
        return topk_rows(scores.detach(), self.count(density), self.valid)


@torch.no_grad()
def best_of_all(scores: Sequence[Units], sizes: Sequence[Units], density: float) -> list[Units]:
    """Masks of the best units of all sites together, as many as hold `density` of all weights.

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


@torch.no_grad()
def topk_rows(scores: Units, k: int | Tensor, valid: Tensor | None = None) -> Units:
    """Mask of the k largest scores of each row, `[rows, n]` of 0 and 1 in the scores' dtype.

    Args:
        scores: `[rows, n]`; ties go to the lower index; NaN ranks with minus infinity.
        k: how many, the same in every row or `[rows]` whole numbers; a row with fewer real units keeps all of them.
        valid: bool `[rows, n]`, False for padding, which is never kept.

    Raises JpqError where k is below 0 or above n.
    """
    rows, n = scores.shape
    count = torch.as_tensor(k, device=scores.device)
    if count.numel() and (int(count.min()) < 0 or int(count.max()) > n):
        raise JpqError(f"Cannot keep {k if isinstance(k, int) else 'k'} of {n} units: k is from 0 to {n}.")
    count = count.expand(rows)
    s = torch.where(scores.isnan(), -math.inf, scores)
    real = torch.ones_like(s, dtype=torch.bool) if valid is None else valid.to(s.device)
    if valid is not None:
        s = s.masked_fill(~real, -math.inf)
        count = count.minimum(real.sum(1))
    if n <= SMALL:
        return (_ranks(s, real) < count[:, None]).logical_and_(real).to(scores.dtype)
    most = int(count.max()) if rows else 0
    if not most:
        return torch.zeros_like(scores)
    if int(count.min()) == most:  # one selection for all rows, which need not be sorted
        least = s.topk(most, 1, sorted=False).values.amin(1, keepdim=True)
    else:
        least = s.topk(most, 1).values.gather(1, (count[:, None] - 1).clamp_min(0))
    above = s > least
    tied = (s == least) & real
    room = (count - above.sum(1))[:, None]
    if bool((tied.sum(1, keepdim=True) > room).any()):
        tied &= tied.cumsum(1) <= room
    return (above | tied).to(scores.dtype)


def _ranks(s: Units, real: Tensor) -> Tensor:
    """Number of units of its row that come before each one, `[rows, n]`."""
    rank = torch.zeros_like(s, dtype=torch.int16)
    for j in range(s.shape[1]):
        here = s[:, j : j + 1]
        rank[:, :j] += (here > s[:, :j]) & real[:, j : j + 1]
        rank[:, j + 1 :] += (here >= s[:, j + 1 :]) & real[:, j : j + 1]
    return rank


def strongest_rows(kept: Units, weights: Units, k: int) -> Units:
    """The mask `kept`, restricted to the k rows in which it holds the most weight.

    Args:
        kept: 0 or 1, `[rows, n]`.
        weights: of each unit, 0 or more, `[rows, n]`; ties go to the earlier row.
        k: rows that keep something.
    """
    return kept * topk_rows((kept * weights).sum(1)[None], k)[0][:, None]


def kept_count(density: float, n: int) -> int:
    """Number of units that stay of n at a density in [0, 1], rounded half up. Raises JpqError for a density outside."""
    return int(kept_counts(density, torch.tensor([n]))[0])


def kept_counts(density: float, n: Tensor) -> Tensor:
    """Number of units that stay in rows of different length, `[rows]`, from their numbers of real units, `[rows]`."""
    if not 0 <= density <= 1:
        raise JpqError(f"A density is a share from 0 to 1, not {density}.")
    product = (density * n.double()).mul(1e9).round().div(1e9)  # 0.29 * 50 is 14.5, whatever the last bit says
    return (product + 0.5).floor().long()
