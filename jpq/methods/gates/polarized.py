"""GDP gate: a smoothed L0 norm on each channel, sharpened while training until every gate is nearly 0 or 1.

Y. Guo, H. Yuan, J. Tan, Z. Wang, S. Yang, J. Liu, "GDP: Stabilized Neural Network Pruning via Gates with
Differentiable Polarization", ICCV 2021, arXiv:2109.02220.

| paper | here | value or shape |
|---|---|---|
| x_i | `x`, in units of 1 / START | [1, n], starts at START |
| epsilon, falling geometrically | `eps` | START^2 * (1e-1 -> 1e-4) over the search |
| g = x^2 / (x^2 + eps) | `relaxed()`, `keep_probability()`, `scale()` | [1, n] |
| g < 1e-3 counts as 0 | `margin()` = logit g - logit CUT | CUT = 1e-3 |
| mu = lambda * d FLOPs / d g | `price`, caught in the backward pass of `keep_probability()` | [1, n] |
| proximal step x <- sign(x) max(abs(x) - lr mu, 0) | `after_step` | lr = RATE |

The cost is bilinear in the gates of neighbouring layers (`tracing/channel_shares.py`), never the square of one layer's
sum, and depthwise layers carry no gate: the one before them decides.

We differ: the budget's pressure is lambda, so mu follows the cost that was asked for. Here x takes Adam's steps, whose
length does not fall with the gradient: plain SGD at the paper's scale moves nothing in a search of a few hundred steps.
Such a step can jump over 0, where the plain penalty oscillates or diverges (lr * lambda > eps): an x that would change
its sign stops at exactly 0, and there, with g' = 0, it remains. START = 4 gives Adam's usual 0.05 the room that 0.0125
has in the paper's units. g multiplies the weights that read a channel, before they are quantized, instead of the input:
the same without quantizers, and folding it then changes nothing.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from jpq.methods.gates.base import Gate
from jpq.types import Units

START = 4.0  # x when the search begins

HOT, COLD = 1e-1 * START**2, 1e-4 * START**2  # eps when the search begins and ends

CUT = 1e-3  # a gate below counts as 0

RATE = 0.05  # step size of the proximal step

TINY = 1e-12


class Polarized(Gate):
    """Gate that keeps unit i iff g_i > 1e-3."""

    reads_gradients: ClassVar[bool] = True
    eps: Tensor
    last: Units
    price: Units

    def __init__(self, rows: int, n: int, proximal: bool = True):
        super().__init__(rows, n)
        self.x = nn.Parameter(torch.full((rows, n), START))
        self.proximal = proximal
        self.register_buffer("eps", torch.tensor(HOT))
        self.register_buffer("last", self.x.detach().clone())  # x when the step began
        self.register_buffer("price", torch.zeros(rows, n))  # gradient of the cost by g since the last step

    def relaxed(self) -> Units:
        """Smoothed step g = x^2 / (x^2 + eps), `[rows, n]`."""
        square = self.x.square()
        return square / (square + self.eps)

    def margin(self) -> Units:
        """Log distance logit g - logit CUT = ln(x^2 / eps) - logit CUT."""
        return (self.x.square() + TINY).log() - self.eps.log() - math.log(CUT / (1 - CUT))

    def keep_probability(self) -> Units:
        """Value g, whose backward pass notes the cost of each unit for the proximal step."""
        g = self.relaxed()
        if g.requires_grad:
            g.register_hook(self._charge)
        return g

    def scale(self) -> Units:
        """Value g, without gradient."""
        return self.relaxed().detach()

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Stop x at 0 where it changed its sign, take the proximal step, lower eps."""
        self.x.masked_fill_(self.x * self.last <= 0, 0.0)
        if self.proximal:
            self.x.copy_(self.x.sign() * (self.x.abs() - RATE * self.price.abs()).clamp_min(0))
        self.price.zero_()
        self.last.copy_(self.x)
        self.eps.fill_(HOT * (COLD / HOT) ** min(1.0, progress))

    def _charge(self, grad: Units) -> None:
        self.price += grad.detach()
