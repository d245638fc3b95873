"""Dead-zone gate (CoDeQ): prunes single weights by a learned zero bin of the weight quantizer.

Every quantizer rounds small weights to zero, and a wider zero bin prunes more of them. Its width is learned, layer by
layer, by the same gradients as the bits: magnitude pruning with a learned threshold.

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
everywhere: `keep_probability()` smooths the count with a sigmoid of the margin, and passes its gradient to theta alone,
never to weights. Above 2^18 weights R is taken from evenly spaced ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from jpq.methods.gates.base import Gate, WeightQuantizer
from jpq.methods.structures.base import Structure
from jpq.types import JpqError, Units, Weight

START, FLOOR = 3.0, 0.02  # bounds of theta: 3 is almost no dead zone; 0 kills the whole range and the gradient

SHARE = 0.99  # quantile of the magnitudes that gives R

SOFT = 0.5  # width of the smoothed count, in nats

SAMPLE = 2**18  # weights that R is taken from at most

TINY = 1e-30


class DeadZone(Gate):
    """Gate that keeps weight i iff |w_i| > d / 2."""

    needs_weights: ClassVar[bool] = True
    elementwise_only: ClassVar[bool] = True

    def __init__(self, rows: int, n: int, start: float = START):
        super().__init__(rows, n)
        self.theta = nn.Parameter(torch.tensor(start))
        self.in_grid = False  # whether training rounds on a grid that holds the dead zone
        self.size: Tensor
        self.top: Tensor
        self.register_buffer("size", torch.ones(rows, n), persistent=False)  # |w| at the last observation
        self.register_buffer("top", torch.tensor(1.0), persistent=False)  # R

    def set_site(self, sizes: Units, quota: int | None) -> None:
        """Check that every unit is one weight, because the grid drops weights one by one; JpqError where not."""
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
        """Take the magnitudes of the weights and their 99th percentile R."""
        ((weight, structure),) = weights
        flat = weight.abs()
        self.size = structure.pool(flat)
        flat = flat.flatten()
        flat = flat[:: max(1, flat.numel() // SAMPLE)]
        self.top = flat.kthvalue(max(1, round(SHARE * flat.numel()))).values.clamp_min(TINY)

    def ends(self) -> tuple[Tensor, Tensor]:
        """Largest level R and width d of the zero bin, two scalars."""
        return self.top, 2 * self.top * (1 - self.theta.abs().tanh())

    def relaxed(self) -> Units:
        """Ones where the quantizer's grid drops weights by itself, else the decision."""
        return torch.ones_like(self.size) if self.in_grid else self.keep()

    def margin(self) -> Units:
        """Log distance of each weight from the edge of the zero bin: ln |w| - ln d/2."""
        _, d = self.ends()
        return self.size.clamp_min(TINY).log() - (d / 2).clamp_min(TINY).log()

    def keep_probability(self) -> Units:
        """Smoothed mask sigmoid(margin / SOFT)."""
        return torch.sigmoid(self.margin() / SOFT)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Keep theta where tanh has a slope and the grid has a step."""
        self.theta.copy_(self.theta.abs().clamp(FLOOR, START))
