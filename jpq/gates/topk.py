"""Exactly k: the decision shared by all gates that rank units.

Rounding of a density: k = floor(density * n + 1/2), halves up, so that 0.5 of 5 units keeps 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from jpq.types import JpqError, Units

SMALL = 16  # rows up to this long are ranked by comparing all pairs, which is faster than sorting


@torch.no_grad()
def topk_rows(scores: Units, k: int | Tensor, valid: Tensor | None = None) -> Units:
    """1 for the k largest of each row and 0 for the rest, `[rows, n]` in the scores' dtype.

    Args:
        scores: `[rows, n]`; ties go to the lower index; NaN ranks with minus infinity.
        k: how many, the same in every row or `[rows]` whole numbers; a row with fewer real units keeps all of them.
        valid: bool `[rows, n]`, False for padding, which is never kept.

    Raises JpqError where k is below 0 or above n.
    """
    rows, n = scores.shape
    wanted = torch.as_tensor(k, device=scores.device)
    if wanted.numel() and (int(wanted.min()) < 0 or int(wanted.max()) > n):
        raise JpqError(f"Cannot keep {k if isinstance(k, int) else 'k'} of {n} units: k is from 0 to {n}.")
    wanted = wanted.expand(rows)
    s = torch.where(scores.isnan(), -math.inf, scores)
    real = torch.ones_like(s, dtype=torch.bool) if valid is None else valid.to(s.device)
    if valid is not None:
        s = s.masked_fill(~real, -math.inf)
        wanted = wanted.minimum(real.sum(1))
    if n <= SMALL:
        return (_ranks(s, real) < wanted[:, None]).logical_and_(real).to(scores.dtype)
    most = int(wanted.max()) if rows else 0
    if not most:
        return torch.zeros_like(scores)
    if int(wanted.min()) == most:  # one selection for all rows, which need not be sorted
        least = s.topk(most, 1, sorted=False).values.amin(1, keepdim=True)
    else:
        least = s.topk(most, 1).values.gather(1, (wanted[:, None] - 1).clamp_min(0))
    above = s > least
    tied = (s == least) & real
    room = (wanted - above.sum(1))[:, None]
    if bool((tied.sum(1, keepdim=True) > room).any()):
        tied &= tied.cumsum(1) <= room
    return (above | tied).to(scores.dtype)


def _ranks(s: Units, real: Tensor) -> Tensor:
    """How many units of its row come before each one."""
    rank = torch.zeros_like(s, dtype=torch.int16)
    for j in range(s.shape[1]):
        here = s[:, j : j + 1]
        rank[:, :j] += (here > s[:, :j]) & real[:, j : j + 1]
        rank[:, j + 1 :] += (here >= s[:, j + 1 :]) & real[:, j : j + 1]
    return rank


def topk_sites(scores: Sequence[Units], k: int, valid: Sequence[Tensor | None] | None = None) -> list[Units]:
    """The k largest units of all sites together, by one threshold: 0 or 1 for each, shaped like the scores.

    Scores must be comparable between sites (normalise them first). Ties go to the earlier site, then the earlier unit;
    `valid` has an entry for each site, None where all units are real. A site may lose everything.

    Raises JpqError where k is below 0 or above the number of units.
    """
    if not scores:
        return []
    masks: Sequence[Tensor | None] = valid if valid is not None else [None] * len(scores)
    flat = torch.cat([s.reshape(1, -1) for s in scores], 1)
    real = [torch.ones_like(s, dtype=torch.bool) if v is None else v for s, v in zip(scores, masks, strict=True)]
    some = any(v is not None for v in masks)
    kept = topk_rows(flat, k, torch.cat([r.reshape(1, -1) for r in real], 1) if some else None)
    parts = kept[0].split([s.numel() for s in scores])
    return [p.reshape(s.shape) for p, s in zip(parts, scores, strict=True)]


def strongest_rows(kept: Units, weights: Units, k: int) -> Units:
    """What `kept` keeps in the k rows where that weighs most; the other rows keep nothing.

    Args:
        kept: 0 or 1, `[rows, n]`.
        weights: of each unit, 0 or more, `[rows, n]`; ties go to the earlier row.
        k: rows that keep something.
    """
    return kept * topk_rows((kept * weights).sum(1)[None], k)[0][:, None]


def kept_of(density: float, n: int) -> int:
    """k of n units at a density in [0, 1], rounded half up. Raises JpqError for a density outside."""
    return int(kept_of_rows(density, torch.tensor([n]))[0])


def kept_of_rows(density: float, n: Tensor) -> Tensor:
    """The same for rows of different length: `[rows]` whole numbers from `[rows]` (such as `valid.sum(1)`)."""
    if not 0 <= density <= 1:
        raise JpqError(f"A density is a share from 0 to 1, not {density}.")
    exact = (density * n.double()).mul(1e9).round().div(1e9)  # 0.29 * 50 is 14.5, whatever the last bit says
    return (exact + 0.5).floor().long()
