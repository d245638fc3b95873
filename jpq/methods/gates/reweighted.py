"""Reweighted group lasso: a penalty on the squared norm of each unit that is stronger, the weaker the unit is.

The penalty presses weak units towards zero:

    loss = task + lam * sum_g a_g ||W_g||^2,   a_g = 1 / (||W_g||^2 + eps), held constant between updates

E. Candes, M. Wakin, S. Boyd, "Enhancing Sparsity by Reweighted l1 Minimization", J. Fourier Analysis 2008; on blocks:
X. Ma et al., BLK-REW, arXiv:2001.08357, and Y. Gong et al., arXiv:2111.11581.

| symbol | here | value or shape |
|---|---|---|
| W_g: the weights of a unit | `structure.pool` | any partition, so no overlapping patterns |
| a_g | `press`, new `UPDATES` times in the search | [rows, n] |
| lam, eps | `LAM`, `EPS` | 1e-4, 1e-4 |
| the layer's ratio | `density`, layer by layer | |

The weights are dense in the search; discretization makes the hard projection, by the mean square of each unit so that
ragged edges rank with the rest, and fine-tuning trains what is left. lam is made for long trainings: in ten epochs of
ResNet8 on the digits it moves the weights no nearer to the structure than none at all (`metrics`: 0.675 with either).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from jpq.methods.gates.base import squared_norms
from jpq.methods.gates.fixed_count import FixedCount
from jpq.methods.structures.base import Structure
from jpq.types import Units, Weight

UPDATES = 6  # new factors in a search: every 5 of 30 epochs

LAM, EPS = 1e-4, 1e-4


class Reweighted(FixedCount):
    """Gate that is dense during the search and then keeps the largest units of each layer."""

    needs_weights: ClassVar[bool] = True
    press: Units
    done: Tensor

    def __init__(self, rows: int, n: int, density: float = 0.5, lam: float = LAM):
        super().__init__(rows, n, density)
        self.lam = lam
        self.register_buffer("press", torch.zeros(rows, n))
        self.register_buffer("done", torch.zeros((), dtype=torch.long))  # updates so far
        self.norms: Units | None = None

    def observe_weights(self, weights: Sequence[tuple[Weight, Structure]]) -> None:
        """Take ||W_g||^2 of each unit, with its gradient."""
        starts, self.norms = self.norms is None, squared_norms(weights)
        if starts:
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Set the factors a_g from the present weights."""
        assert self.norms is not None
        self.press.copy_(1 / (self.norms.detach() + EPS))

    def relaxed(self) -> Units:
        """Ones: the weights stay dense."""
        return torch.ones_like(self.press)

    def keep(self) -> Units:
        """Mask of the units with the largest mean square in each row."""
        if self.norms is None:
            return self.least()
        return self.top(self.norms / self.sizes.clamp_min(1), self.density)

    def multiplier(self) -> Units | None:
        """None in training, when weights stay dense; the mask in evaluation."""
        return None if self.training else self.keep()

    def own_loss(self) -> Tensor | None:
        """Penalty lam * sum_g a_g ||W_g||^2."""
        return None if self.norms is None else self.lam * (self.press * self.norms).sum()

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Set new factors a_g, `UPDATES` times over the search."""
        if self.norms is None:
            return
        if int(progress * UPDATES) > int(self.done):
            self.refresh()
            self.done.fill_(int(progress * UPDATES))
        self.norms = self.norms.detach()

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Relative distance of the weights from the structure: `residual` = ||W - Pi(W)|| / ||W||."""
        if self.norms is None:
            return {}
        dropped = float((self.norms * (1 - self.keep())).sum())
        return {"residual": (dropped / max(1e-30, float(self.norms.sum()))) ** 0.5}
