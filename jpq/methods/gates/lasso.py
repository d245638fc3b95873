"""DSP gate (dynamic structure pruning): filters are assigned to groups, and each group drops input channels of its own.

J.-H. Park, Y. Kim, J. Kim, J.-Y. Choi, S. Lee, "Dynamic Structure Pruning for Compressing CNNs", AAAI 2023,
arXiv:2303.09736. Made for kernels (`structures/axis.py`): a unit is (filter, input channel), and all filters of a
group decide alike, so that `export/branches.py` can cut the layer into dense branches. Where all units are one row
(channels, blocks, single weights) there is one group, and this is the plain group lasso.

| paper | here | value or shape |
|---|---|---|
| alpha | `alpha` | [G, rows], starts at 0 |
| p = softmax over groups of alpha / tau + Gumbel noise | `_drawn` | [G, rows], tau = 0.5 |
| kappa, s(p_g), R(W, p) | `regulariser` | scalar |
| dR/dW = W * coefficient | `coefficients` | [rows, n] |
| W1, W2, W2', and < d2R/dp dW, W2' - W1 > | `_learn` | |
| eta lam_t = eta lam t / T | 2 STRENGTH x dx, x = t / T | STRENGTH in all, in any number of steps |
| hard groups, energies, running sums below beta | `_decide` | |

The Gumbel noise is not divided by tau, as in the authors' code. kappa = k (G / rows)^1.5 is the paper's; the factor
sqrt(A_in) that the code got later, and with it its table of MACs, is not used.

We differ: STRENGTH is 0.1 where the paper's values add up to about 2 in 47,000 iterations, which give the task the time
to rebuild what it needs; in a few hundred steps that much takes the network down (measured on digits). The budget is a
density of weights and beta comes from bisection to the last unit; the step on the task is the optimizer's (Adam), its
difference taken for W2 - W1, and no step takes more than half of a kernel. Whole filters and dead parts are not
searched for: channel methods do that. Layers with fewer than LEAST inputs stay; shortcut convolutions, which the
authors' code leaves dense, do not. alpha takes steps of RATE instead of 0.001, again for the shorter search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from jpq.methods.gates.base import Gate, Holds
from jpq.methods.gates.fixed_count import FixedCount
from jpq.methods.structures.base import Structure
from jpq.types import Units, Weight

GROUPS = 4

TAU = 0.5  # temperature of the soft membership

STRENGTH = 0.1  # weight of the regulariser, summed over the whole search

RATE = 0.02  # Adam's step size for alpha

SPAN = 0.6  # share of the search in which groups are learned

LEAST = 4  # inputs of the narrowest layer that is pruned

HALF = 0.5  # smallest factor by which one step shrinks a kernel

EPS = 1e-12


class Lasso(FixedCount):
    """Gate that keeps the input channels that hold most of each filter group's energy."""

    needs_weights: ClassVar[bool] = True
    enforces_quota: ClassVar[Holds] = "never"
    kept: Units
    alpha: Tensor
    first: Tensor
    second: Tensor
    steps: Tensor
    last: Tensor
    decided: Tensor

    def __init__(self, rows: int, n: int, density: float = 0.5, groups: int = GROUPS):
        super().__init__(rows, n, density)
        self.groups = min(groups, rows)
        self.register_buffer("kept", torch.ones(rows, n))
        self.register_buffer("alpha", torch.zeros(self.groups, rows))
        self.register_buffer("first", torch.zeros(self.groups, rows))  # Adam's moments
        self.register_buffer("second", torch.zeros(self.groups, rows))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros((), dtype=torch.float64))  # progress of the step before
        self.register_buffer("decided", torch.zeros((), dtype=torch.bool))
        self.pool: list[Lasso] = [self]
        self.weights: list[tuple[Weight, Structure]] = []
        self.before: list[Weight] = []

    def observe_weights(self, weights: Sequence[tuple[Weight, Structure]]) -> None:
        """Remember the weights of the taps."""
        self.weights = list(weights)

    def link(self, gates: Sequence[Gate]) -> None:
        """Collect the gates that share one threshold beta."""
        self.pool = [g for g in gates if isinstance(g, Lasso)]

    @torch.no_grad()
    def relaxed(self) -> Units:
        """Ones while groups are learned, then the mask."""
        if self.weights and not bool(self.decided):
            self.before = [weight.detach().clone() for weight, _ in self.weights]
        return self.kept

    def keep(self) -> Units:
        """Present mask, `[rows, n]` of 0 and 1."""
        return self.kept

    @property
    def members(self) -> Tensor:
        """Hard assignment of filters to groups, `[G, rows]` of 0 and 1."""
        return torch.nn.functional.one_hot(self.alpha.argmax(0), self.groups).T.to(self.alpha)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Learn the groups and shrink the weights; at the end of the span the last gate decides for all."""
        if bool(self.decided):
            return
        if self.before and self.n >= LEAST:
            self._learn(min(1.0, progress / SPAN))
        self.before = []
        self.last.fill_(progress)
        if progress >= SPAN and self.pool[-1] is self:
            self._decide()

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Number of groups that have filters."""
        return {"groups": float((self.members.sum(1) > 0).sum())}

    def _drawn(self) -> Tensor:
        uniform = torch.rand_like(self.alpha).clamp(1e-10, 1 - 1e-7)
        return torch.softmax(self.alpha / TAU - (-uniform.log()).log(), 0)

    def _learn(self, x: float) -> None:
        """Take one step of the logits and of the weights; x = t / T is the position in the span."""
        weights, before = [weight.detach() for weight, _ in self.weights], self.before
        rate = 2 * STRENGTH * x * max(0.0, x - float(self.last) / SPAN)
        kernel = float(self.sizes[0, 0]) ** 0.5

        def shrunk(ws: list[Weight], p: Tensor) -> list[Weight]:
            left = (1 - rate * coefficients(self._products(ws, ws), p, kernel)).clamp_min(HALF)
            return [w * s.expand(left, w.shape) for w, (_, s) in zip(ws, self.weights, strict=True)]

        p = self._drawn()
        w1 = shrunk(before, p)
        w2 = [w + now - then for w, now, then in zip(w1, weights, before, strict=True)]
        moved = [after - w for after, w in zip(shrunk(w2, p), w1, strict=True)]
        with torch.enable_grad():
            p = p.requires_grad_(True)
            direct = regulariser(self._products(w2, w2), p, kernel)
            mixed = (coefficients(self._products(before, before), p, kernel) * self._products(before, moved)).sum()
            (slope,) = torch.autograd.grad(direct + mixed, p)
        # through the softmax, with respect to alpha
        p = p.detach()
        self._adam(p * (slope - (p * slope).sum(0)) / TAU)
        for weight, smaller in zip(weights, shrunk(weights, self.members), strict=True):
            weight.copy_(smaller)

    def _products(self, left: Sequence[Weight], right: Sequence[Weight]) -> Units:
        """Inner product of each unit's weights in two sets of weights, over all taps: `[rows, n]`."""
        pairs = zip(left, right, self.weights, strict=True)
        return torch.stack([structure.pool(a * b) for a, b, (_, structure) in pairs]).sum(0)

    def _adam(self, grad: Tensor) -> None:
        self.steps += 1
        t = int(self.steps)
        self.first.lerp_(grad, 0.1)
        self.second.lerp_(grad.square(), 0.001)
        self.alpha -= RATE * self.first / (1 - 0.9**t) / ((self.second / (1 - 0.999**t)).sqrt() + EPS)

    def _energies(self) -> Units:
        """Share of its group's energy that each channel holds, given to all filters of the group: `[rows, n]`."""
        weights = [weight.detach() for weight, _ in self.weights]
        energy = self.members @ self._products(weights, weights)
        return self.members.T @ (energy / energy.sum(1, keepdim=True).clamp_min(EPS))

    def least(self) -> Units:
        """A mask that keeps layers with few inputs dense."""
        return super().least() if self.n >= LEAST else torch.ones_like(self.kept)

    def _decide(self) -> None:
        chosen = [g for g in self.pool if g.n >= LEAST]
        sums = [running_sums(g._energies().double()) for g in chosen]
        total_weights = sum(float(g.sizes.sum()) for g in chosen)
        low, high = 0.0, 1.0
        for _ in range(50):
            beta = (low + high) / 2
            kept = sum(float((g.sizes * (s >= beta)).sum()) for g, s in zip(chosen, sums, strict=True))
            low, high = (beta, high) if kept > self.density * total_weights else (low, beta)
        for gate, total in zip(chosen, sums, strict=True):
            gate.kept.copy_((total >= high) | (total == total.amax(1, keepdim=True)))  # a row keeps its best
        for gate in self.pool:
            gate.decided.fill_(True)


def regulariser(squares: Units, p: Tensor, kernel: float) -> Tensor:
    """Group lasso R = kappa sum_g s(p_g) sum_c norm(p_g * W[:, c]), a scalar.

    Args:
        squares: sum of squares of each kernel, `[rows, n]`.
        p: how much each filter belongs to each group, `[G, rows]`; columns sum to 1.
        kernel: side of the kernel, k.
    """
    return _kappa(p, kernel) * (_sizes(p) * _norms(squares, p)).sum()


def coefficients(squares: Units, p: Tensor, kernel: float) -> Units:
    """Factor dR/dW / W of each kernel, `[rows, n]`: kappa sum_g s(p_g) p_go^2 / norm(p_g * W[:, c]).

    0 for kernels of zeros.
    """
    share = p.square().T @ (_sizes(p) / _norms(squares, p))
    return _kappa(p, kernel) * torch.where(squares > 0, share, torch.zeros_like(share))


def running_sums(shares: Units) -> Units:
    """Sum of each unit's share and of all smaller ones of its row, `[rows, n]`; equal rows get equal sums."""
    ordered, index = shares.sort(dim=1, stable=True)
    return torch.zeros_like(shares).scatter(1, index, ordered.cumsum(1))


def _kappa(p: Tensor, kernel: float) -> float:
    return kernel * float(len(p) / p.shape[1]) ** 1.5


def _sizes(p: Tensor) -> Tensor:
    """Soft group sizes s(p_g) = (sum_o sqrt(p_go))^2, `[G, 1]`."""
    return (p + EPS).sqrt().sum(1, keepdim=True).square()


def _norms(squares: Units, p: Tensor) -> Tensor:
    """Norms of each input channel in each group, `[G, n]`."""
    return (p.square() @ squares + EPS).sqrt()
