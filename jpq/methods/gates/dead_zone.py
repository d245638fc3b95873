"""Single weights by the zero bin of their quantizer: magnitude pruning with a learned threshold in each layer.

Every quantizer rounds small weights to zero. Widening that bin on purpose prunes; so the width of the bin is learned,
and what a layer gives up is decided by the same gradients that decide its bits.

J. Wenshoj, T. Chen, B. Pepin, R. Selvan, "CoDeQ: End-to-End Joint Model Compression with Dead-Zone Quantizer for
High-Sparsity and Low-Precision Networks", 2025, arXiv:2512.12981.

| paper | here | shape |
|---|---|---|
| theta_dz | `theta` | [] |
| R: 99th percentile of the layer's magnitudes, no gradient | first of `ends()` | [] |
| d = 2 R (1 - tanh |theta_dz|) | second of `ends()` | [] |
| a weight is zero iff |w| <= d / 2 | `margin()` = ln |w| - ln d/2 | [rows, n] |

In training the quantizer's grid itself holds the dead zone (`quantizers/dead_zone.py`), so z is 1 everywhere; in
evaluation z is the mask. The task's gradient reaches theta through the grid.

We differ: the budget's pressure takes the place of lambda * theta^2. It needs the density's gradient, which is 0 almost
everywhere: `alive()` smooths the count with a sigmoid of the margin, and passes its gradient to theta alone, never to
weights. Above 2^18 weights R is taken from evenly spaced ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from jpq.methods.gates.base import Gate, WeightQuantizer
from jpq.methods.structures.base import Structure
from jpq.types import JpqError, Units, Weight

START, FLOOR = 3.0, 0.02  # theta: 3 is almost no dead zone; at 0 the whole range would be dead, without gradient

SHARE = 0.99  # of magnitudes that lie within R

SOFT = 0.5  # nats that smooth the count

SAMPLE = 2**18

TINY = 1e-30


class DeadZone(Gate):
    """Keep weight i iff |w_i| > d / 2."""

    needs_weights: ClassVar[bool] = True
    elementwise_only: ClassVar[bool] = True

    def __init__(self, rows: int, n: int, start: float = START):
        super().__init__(rows, n)
        self.theta = nn.Parameter(torch.tensor(start))
        self.in_grid = False  # whether training rounds on a grid that holds the dead zone
        self.size: Tensor
        self.top: Tensor
        self.register_buffer("size", torch.ones(rows, n), persistent=False)  # |w| as last seen
        self.register_buffer("top", torch.tensor(1.0), persistent=False)  # R

    def set_site(self, sizes: Units, quota: int | None) -> None:
        """Raises JpqError where a unit is more than one weight: the grid drops each weight on its own."""
        if float(sizes.max()) > 1:
            raise JpqError(
                f"A dead zone drops single weights, and a unit here has {int(sizes.max())} of them: choose --structure "
                "elementwise or per-output, or another --method."
            )

    def attach_quantizer(self, quantizer: WeightQuantizer) -> None:
        """Let training round the weight on a grid that holds this dead zone."""
        quantizer.use_dead_zone(self.ends)
        self.in_grid = True

    @torch.no_grad()
    def observe_weights(self, weights: Sequence[tuple[Weight, Structure]]) -> None:
        """Magnitudes and their 99th percentile."""
        ((weight, structure),) = weights
        flat = weight.abs()
        self.size = structure.pool(flat)
        flat = flat.flatten()
        flat = flat[:: max(1, flat.numel() // SAMPLE)]
        self.top = flat.kthvalue(max(1, round(SHARE * flat.numel()))).values.clamp_min(TINY)

    def ends(self) -> tuple[Tensor, Tensor]:
        """(R, d): the largest level, and the width of the zero bin."""
        return self.top, 2 * self.top * (1 - self.theta.abs().tanh())

    def relaxed(self) -> Units:
        """1 where the grid drops by itself, else the decision."""
        return torch.ones_like(self.size) if self.in_grid else self.keep()

    def margin(self) -> Units:
        """ln |w| - ln d/2."""
        _, d = self.ends()
        return self.size.clamp_min(TINY).log() - (d / 2).clamp_min(TINY).log()

    def keep_probability(self) -> Units:
        """The mask, smoothed: sigmoid(margin / SOFT)."""
        return torch.sigmoid(self.margin() / SOFT)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Stay where tanh has a slope and the grid has a step."""
        self.theta.copy_(self.theta.abs().clamp(FLOOR, START))
