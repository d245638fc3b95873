"""PDP gate: a soft mask that is a function of the weights themselves, without learned parameters beside them.

M. Cho, S. Adya, D. Naik, "PDP: Parameter-free Differentiable Pruning is All You Need", NeurIPS 2023, arXiv:2305.11203.

| paper | here | shape |
|---|---|---|
| t: halfway between the last kept and the first dropped magnitude | `threshold()` is its square | [rows, 1] |
| m(w) = sigmoid((w^2 - t^2) / tau) | `relaxed()` | [rows, n] |
| r_l: per-layer share from one global quantile, then fixed | `link` | scalar |
| ramp eps = 0.015 per epoch from epoch s = 16 of 100 | `RAMP`: the full ratio at 2/3 of the search | |

A unit of several weights (a channel, a block) has the L2 norm of its weights for |w|: a channel that of the weights
that read it, where the paper takes the filter that makes it. A quota (2:4) holds from the start, without the ramp.

We differ: tau = t^2 / 8 in every row (the ratio that tau = 1e-4 has for a layer of standard deviation 0.02 at 85 %), so
that softness does not depend on how a layer is scaled or how many weights a unit has; `tau` sets a number instead. The
ramp begins at once, since the search starts from a trained network. The gradient does not run through t: it would move
two weights of each layer for no reason (public code lets it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from jpq.methods.gates.base import Gate, squared_norms
from jpq.methods.gates.fixed_count import FixedCount, best_of_all
from jpq.methods.structures.base import Structure
from jpq.types import Units, Weight

RAMP = 0.67  # share of the search after which the final density is reached

SOFT = 8.0  # ratio t^2 / tau


class SoftThreshold(FixedCount):
    """Gate that keeps the largest units and fades the rest out."""

    needs_weights: ClassVar[bool] = True
    now: Tensor
    final: Tensor

    def __init__(self, rows: int, n: int, density: float = 0.5, tau: float | None = None):
        super().__init__(rows, n, density)
        self.tau = tau
        # shares that are kept, at this point of the search and in the end; float32 could round a count down
        self.register_buffer("now", torch.tensor(1.0, dtype=torch.float64))
        self.register_buffer("final", torch.tensor(density, dtype=torch.float64))
        self.squares: Units = torch.ones(rows, n)

    def observe_weights(self, weights: Sequence[tuple[Weight, Structure]]) -> None:
        """Take the squared norm of each unit, with its gradient."""
        self.squares = squared_norms(weights)

    def link(self, gates: Sequence[Gate]) -> None:
        """Set the final density of each layer from one global quantile of the magnitudes."""
        pool = [g for g in gates if isinstance(g, SoftThreshold) and g.pooled]
        if pool and pool[0] is self:
            sizes = [g.sizes for g in pool]
            scores = [g.squares / g.sizes.clamp_min(1) for g in pool]
            for gate, keep in zip(pool, best_of_all(scores, sizes, self.density), strict=True):
                gate.final.copy_((keep * gate.sizes).double().sum() / gate.sizes.double().sum())

    def least(self) -> Units:
        """Mask of the share that the global quantile leaves of this layer."""
        return self.top(self.sizes, float(self.final))

    def threshold(self) -> Units:
        """Squared threshold t^2 of each row, `[rows, 1]`; -1 where all units stay."""
        size = self.squares.detach().clamp_min(0).sqrt()
        if self.valid is not None:
            size = size.masked_fill(~self.valid, -1.0)
        k = self.count(float(self.now))[:, None]
        ordered = size.sort(1, descending=True).values
        last = ordered.gather(1, k - 1)
        dropped = ordered.gather(1, k.clamp_max(self.n - 1)).clamp_min(0)  # the largest of them
        t = (last + dropped) / 2
        real = (self.sizes > 0).sum(1, keepdim=True)
        return torch.where(k >= real, torch.full_like(t, -1.0), t.square())

    def relaxed(self) -> Units:
        """Soft mask sigmoid((w^2 - t^2) / tau); 1 where nothing is dropped."""
        t = self.threshold()
        tau = (t / SOFT).clamp_min(1e-12) if self.tau is None else self.tau
        return torch.where(t < 0, torch.ones_like(self.squares), torch.sigmoid((self.squares - t) / tau))

    def keep(self) -> Units:
        """Mask of the largest units of each row, where the soft mask is at least 1/2."""
        return self.top(self.squares, float(self.now))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Lower the present density; it reaches the final one at `RAMP` of the search."""
        self.now.copy_(1 - (1 - self.final) * min(1.0, progress / RAMP))
        self.squares = self.squares.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load as usual; states from before the final density was kept have none."""
        state_dict.setdefault(f"{prefix}final", self.final)
        super()._load_from_state_dict(state_dict, prefix, *args)
