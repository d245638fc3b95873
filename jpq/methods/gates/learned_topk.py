"""SMART gate: learned importance scores, one differentiable top-k over all of them, and a falling temperature.

G. Ding, Z. Ye, Z. Zhong, G. Li, D. Shao, "SMART Pruner", arXiv:2403.19969. The operator is that of SLA2
(arXiv:2602.12675), which cites it; the gradient is worked out here.

| paper | here | shape |
|---|---|---|
| importance m | `scores` | [rows, n] |
| f = sigmoid(m / tau + lambda), sum of s f = K | `soft_topk` | [rows, n] |
| df_i/dm_j = (1/tau) (v_i [i=j] - v_i s_j v_j / sum s v), v = f (1 - f) | its backward | |
| tau: from the spread of m to a thousandth of it | `temperature` | |

Units that are one row of their site (blocks, kernels' columns, single weights) are ranked over all layers at once, with
s their number of weights; in rows of their own (2:4, k of n) each row has its own lambda.

We differ where the paper's values are unknown: m starts at the standardised root mean square of each unit's weights,
over all units; its gradient is scaled by tau, so that steps do not explode as tau falls (Adam would hide the scale but
not the noise of a sum of exploding terms).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from jpq.methods.gates.base import Gate, Holds, squared_norms
from jpq.methods.gates.fixed_count import FixedCount, best_of_all
from jpq.methods.structures.base import Structure
from jpq.types import Units, Weight

COLDEST = 1e-3  # temperature at the end over the one at the start

EDGE = 60.0  # logits at which a sigmoid is 0 or 1 in any precision


class _SoftTopK(torch.autograd.Function):
    """Soft top-k f of the formulas above, with one lambda for each row, and its exact gradient."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, sizes: Tensor, k: Tensor, tau: Tensor, scaled: bool) -> Tensor:
        x = m.double() / tau.double()
        low, high = -x.amax(1, keepdim=True) - EDGE, -x.amin(1, keepdim=True) + EDGE
        s = sizes.double()
        for _ in range(100):
            middle = (low + high) / 2
            over = (s * torch.sigmoid(x + middle)).sum(1, keepdim=True) > k[:, None]
            low, high = torch.where(over, low, middle), torch.where(over, middle, high)
            if bool((high - low).abs().amax() < 1e-12):
                break
        f = torch.sigmoid(x + (low + high) / 2)
        keeps_all = k[:, None] >= s.sum(1, keepdim=True)  # all stay: there is no lambda
        f = torch.where(keeps_all, torch.ones_like(f), f)
        ctx.save_for_backward(f, s, tau)
        ctx.scaled = scaled
        return f.to(m.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        f, s, tau = ctx.saved_tensors
        v = f * (1 - f)
        mean_gradient = (v * g.double()).sum(1, keepdim=True) / (s * v).sum(1, keepdim=True).clamp_min(1e-300)
        d = v * (g.double() - s * mean_gradient)
        return (d if ctx.scaled else d / tau.double()).to(g.dtype), None, None, None, None


def soft_topk(m: Tensor, sizes: Tensor, k: Tensor, tau: Tensor, scaled: bool = False) -> Tensor:
    """Soft top-k mask f in [0, 1] with `(sizes * f).sum(1) == k`, `[rows, n]`.

    Its gradient is exact (times tau if `scaled`).

    Args:
        m: scores, `[rows, n]`. sizes: weights of each unit, `[rows, n]`; 0 for padding.
        k: weights that stay in each row, `[rows]`. tau: temperature, a scalar tensor.
    """
    out: Tensor = _SoftTopK.apply(m, sizes, k, tau, scaled)
    return out


class LearnedTopK(FixedCount):
    """Gate that keeps the best units by scores that training learns."""

    needs_weights: ClassVar[bool] = True  # once, for the start
    enforces_quota: ClassVar[Holds] = "always"
    spread: Tensor
    progress: Tensor

    def __init__(self, rows: int, n: int, density: float = 0.5):
        super().__init__(rows, n, density)
        self.scores = nn.Parameter(torch.zeros(rows, n))
        self.register_buffer("spread", torch.ones(()))  # standard deviation of the scores at the start
        self.register_buffer("progress", torch.zeros(()))
        self.pool: list[LearnedTopK] = [self]
        self.place = 0  # index in the pool
        self.drawn: dict[int, Units] = {}  # place in the pool -> unused part of its last common solution
        self.hard_masks: tuple[list[Any], list[Units]] = (
            [],
            [],
        )  # versions of the scores, and the pool's masks at them
        self.start_sizes: Units | None = None  # root mean square of each unit's first weights

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what was computed from the present scores, whose versions start anew."""
        return {**vars(self), "drawn": {}, "hard_masks": ([], [])}

    @torch.no_grad()
    def observe_weights(self, weights: Sequence[tuple[Weight, Structure]]) -> None:
        """Remember the first weights, from which the scores start."""
        if self.start_sizes is None:
            self.start_sizes = (squared_norms(weights) / self.sizes.clamp_min(1)).sqrt()

    @torch.no_grad()
    def link(self, gates: Sequence[Gate]) -> None:
        """Start all scores comparable over the network, and pool the sites that share one lambda."""
        family = [g for g in gates if isinstance(g, LearnedTopK) and g.start_sizes is not None]
        if self.start_sizes is None or family[0] is not self:
            return
        real = torch.cat([g.start_sizes[g.sizes > 0] for g in family if g.start_sizes is not None])
        mean, spread = real.mean(), real.std(correction=0).clamp_min(1e-12)
        pool = [g for g in family if g.pooled]
        for gate in family:
            assert gate.start_sizes is not None
            gate.scores.copy_((gate.start_sizes - mean) / spread)
            gate.pool = pool if gate.pooled else [gate]
            gate.place = [g is gate for g in gate.pool].index(True)

    def temperature(self) -> Tensor:
        """Temperature tau, falling geometrically over the search."""
        return self.spread * COLDEST**self.progress

    def relaxed(self) -> Units:
        """Soft mask f of this site; the first member that asks solves it for the whole pool."""
        if not self.pooled:
            k = self.count(self.density).double()
            return soft_topk(self.scores, (self.sizes > 0).double(), k, self.temperature(), scaled=True)
        leader = self.pool[0]
        if self.place not in leader.drawn:
            m = torch.cat([g.scores.flatten() for g in self.pool])[None]
            sizes = torch.cat([g.sizes.flatten() for g in self.pool])[None].to(m.device)
            k = self.density * sizes.double().sum(1)
            parts = soft_topk(m, sizes, k, self.temperature(), scaled=True)[0].split([g.n for g in self.pool])
            leader.drawn = {place: part[None] for place, part in enumerate(parts)}
        return leader.drawn.pop(self.place)

    def least(self) -> Units:
        """Mask that the present scores leave; training may move it between layers."""
        return self.keep()

    def keep(self) -> Units:
        """Mask of the best scores, the limit of f as tau falls."""
        if not self.pooled:
            return self.top(self.scores, self.density)
        leader, versions = self.pool[0], [(g.scores._version, g.scores.device, g.scores.dtype) for g in self.pool]
        if leader.hard_masks[0] != versions:
            scores, sizes = [g.scores for g in self.pool], [g.sizes for g in self.pool]
            leader.hard_masks = versions, best_of_all(scores, sizes, self.density)
        return leader.hard_masks[1][self.place]

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Lower the temperature and forget the solution for the scores before the step."""
        self.progress.fill_(min(1.0, progress))
        self.drawn = {}
