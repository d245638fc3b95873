"""ADMM gate: a quadratic term in the loss draws the weights towards their projection onto the structure.

The projection follows the weights in turn:

    W-step: minimise task + rho/2 ||W - Z + U||^2     Z = Pi(W + U)     U <- U + W - Z

S. Boyd et al., "Distributed Optimization and Statistical Learning via ADMM", 2011; for pruning: T. Zhang et al.,
ECCV 2018, arXiv:1804.03294, and the pattern pruning of Y. Gong et al., GLSVLSI 2020, arXiv:2003.06513.

| symbol | here | value or shape |
|---|---|---|
| Pi: nearest point that keeps k units of each row | `project` | any structure; layer by layer |
| rho | `rho` | 1e-4, 1e-3, 1e-2, 1e-1: a quarter of the search each |
| Z and U updates | `updates` of them in the search | 5 for each rho |
| the mask: Pi once more, of W alone | `finish` | when the search has ended |
| connectivity: kernels dropped whole | `connected`: share of rows that keep anything | 1 in a search |

When rho rises, U (the scaled dual) is divided by the same factor: unchanged, it would undo the progress. The mask comes
from the chosen units, not from which weights are zero. Where patterns overlap no z expresses dense weights, so that
`multiplier` is None in training.

The rhos are those of trainings of hundreds of epochs, and weigh a sum of squares beside a loss that is a mean: a short
training leaves the weights far from the structure (`metrics`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from jpq.methods.gates.base import Holds
from jpq.methods.gates.fixed_count import FixedCount, kept_count, strongest_rows
from jpq.methods.structures.base import Structure
from jpq.types import Units, Weight

RHOS = (1e-4, 1e-3, 1e-2, 1e-1)

UPDATES_PER_RHO = 5  # updates of Z and U


class Admm(FixedCount):
    """Gate that is dense during the search, and at its end keeps the units of the projected weights."""

    needs_weights: ClassVar[bool] = True
    enforces_quota: ClassVar[Holds] = "always"
    kept: Units
    done: Tensor

    def __init__(self, rows: int, n: int, density: float = 0.5, rhos: Sequence[float] = RHOS, connected: float = 1.0):
        super().__init__(rows, n, density)
        self.rhos, self.updates, self.connected = tuple(rhos), UPDATES_PER_RHO * len(rhos), connected
        self.register_buffer("kept", torch.ones(rows, n))
        self.register_buffer("done", torch.zeros((), dtype=torch.long))  # updates so far
        self.observed: list[tuple[Weight, Structure]] = []

    def observe_weights(self, weights: Sequence[tuple[Weight, Structure]]) -> None:
        """Remember the weights; at the first call Z becomes their projection and U zero."""
        self.observed = list(weights)
        if not hasattr(self, "z0"):
            for i, (weight, _) in enumerate(self.observed):
                self.register_buffer(f"u{i}", torch.zeros_like(weight))
                self.register_buffer(f"z{i}", torch.zeros_like(weight))
            self.project()

    @property
    def rho(self) -> float:
        """Current weight of the quadratic penalty."""
        return self.rhos[min(int(self.done) // UPDATES_PER_RHO, len(self.rhos) - 1)]

    @torch.no_grad()
    def project(self) -> None:
        """Set Z = Pi(W + U)."""
        sums = [(weight + self.dual(i), structure) for i, (weight, structure) in enumerate(self.observed)]
        self._choose(sums)
        for i, (total, structure) in enumerate(sums):
            self.near(i).copy_(total * structure.expand(self.kept.to(total), total.shape))

    @torch.no_grad()
    def finish(self) -> None:
        """Keep the units of Pi(W), the nearest point to the weights as they are: W + U chose them up to now."""
        if self.observed:
            self._choose(self.observed)

    def _choose(self, values: Sequence[tuple[Weight, Structure]]) -> None:
        """Keep the units of largest norm in each row, and those of the strongest rows only.

        Units at ragged edges rank by their mean square: by their norm the full ones would all come first, and more
        weights than `density` would stay.
        """
        norms = torch.stack([structure.pool(value.square()) for value, structure in values]).sum(0)
        self.kept.copy_(self.top(norms / self.sizes.clamp_min(1), self.density))
        if self.connected < 1:
            self.kept.copy_(strongest_rows(self.kept, norms, max(1, kept_count(self.connected, self.rows))))

    def dual(self, i: int) -> Tensor:
        """Scaled dual variable U of one tap, shaped like its weight."""
        return self.get_buffer(f"u{i}")

    def near(self, i: int) -> Tensor:
        """Projected weights Z of one tap."""
        return self.get_buffer(f"z{i}")

    def relaxed(self) -> Units:
        """Ones: the weights stay dense."""
        return torch.ones_like(self.kept)

    def keep(self) -> Units:
        """Units of the last projection, or of `finish`: `[rows, n]` of 0 and 1."""
        return self.kept

    def multiplier(self) -> Units | None:
        """None in training, when weights stay dense; the mask in evaluation."""
        return None if self.training else self.kept

    def own_loss(self) -> Tensor:
        """Augmented Lagrangian rho/2 ||W - Z + U||^2, summed over all taps."""
        parts = [(w - self.near(i) + self.dual(i)).square().sum() for i, (w, _) in enumerate(self.observed)]
        return self.rho / 2 * torch.stack(parts).sum()

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Update Z and U, `updates` times over the search."""
        if int(progress * self.updates) <= int(self.done):
            return
        previous_rho = self.rho
        self.project()
        for i, (weight, _) in enumerate(self.observed):
            self.dual(i).add_(weight - self.near(i))
        self.done.fill_(int(progress * self.updates))
        for i in range(len(self.observed)):
            self.dual(i).mul_(previous_rho / self.rho)

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Relative distance of the weights from the structure: `residual` = ||W - Z|| / ||W||."""
        squared_distance = sum(float((w - self.near(i)).square().sum()) for i, (w, _) in enumerate(self.observed))
        return {
            "residual": (squared_distance / max(1e-30, sum(float(w.square().sum()) for w, _ in self.observed))) ** 0.5
        }
