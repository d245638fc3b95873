"""Bayesian Bits width: each doubling of the bits is a residual that a hard concrete gate lets through.

A tensor is rounded on a coarse grid, its error on a grid 2^b + 1 times as fine, and so on; gate by gate the sum doubles
its width. A gate that closes takes all finer ones with it, and what is left is plain uniform rounding.

M. van Baalen, C. Louizos, M. Nagel, R. A. Amjad, Y. Wang, T. Blankevoort, M. Welling, "Bayesian Bits: Unifying
Quantization and Pruning", NeurIPS 2020, arXiv:2005.07093.

    s_b = (x_max - x_min) / (2^b - 1)        x_min = -x_max (signed) or 0; s_2 / s_4 = 5, s_4 / s_8 = 17, ...
    x_2 = s_2 round(x / s_2)      e_4 = s_4 round((x - x_2) / s_4)      e_8 = s_8 round((x - x_2 - e_4) / s_8)
    x_q = x_2 + z_4 (e_4 + z_8 e_8)

| paper | here | shape |
|---|---|---|
| x_max | `exp(log_threshold)` of the `IntegerQuantizer` | [], or [C, 1, ...] for weights |
| phi of z_4, z_8, ... | `Gated.phi` | [gates] |
| z_b in training | `draw()`: one sample for the whole nested sum | [gates] |
| q_b = P(z_b > 0) | `open()` | [gates] |
| expected bits 2 + 2 q_4 + 4 q_4 q_8 | `forward()`'s gradient, `soft()` | [] |
| z_b = 1 at test time iff P(z_b = 0) < 0.34 | phi > `CLOSED` = -0.935 | [gates] |
| z_2, per output channel | the channel gate beside it (hard concrete) | |

Gradients, straight-through on round: dx_q/dx = 1 inside the range, dx_q/d ln x_max = x_q - x inside and x_q outside,
dx_q/dz_4 = e_4 + z_8 e_8, dx_q/dz_8 = z_4 e_8 (the range's gradient needs no residual: all steps grow with x_max).

We differ: the budget's pressure on expected bit-operations takes the place of mu * R. The range is learned in the log
domain, so it stays positive, per output channel for weights, and starts at the least squared error instead of the
extremes. phi starts where the search starts (2 or below, not 6: a search of a few hundred steps must be able to close a
gate) and stays within ln 100. BatchNorm is not folded beforehand. Evaluation is the plain grid of the reached width,
and discretization keeps exactly that. The channel gate z_2 is that of `l0`: in evaluation it scales its channel by a
number in [0, 1], which is 0 below phi = -ln 11, in place of 0 or 1 on either side of -0.935.
Granted US patents appear to cover the scheme: check before commercial use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from jpq.methods.quantizers.base import BitWidth, Grid
from jpq.types import JpqError

LADDER = (2, 4, 8, 16, 32)

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1  # hard concrete: temperature and the stretched interval

EDGE = BETA * math.log(-HIGH / LOW)  # P(z > 0) = sigmoid(phi + EDGE)

CLOSED = math.log(0.66 / 0.34) - EDGE  # -0.935: a gate with phi at or below is closed in evaluation

START, BOUND = 2.0, math.log(100.0)  # largest phi at the start; outside the bound a gate would never return

NATS = 2.0  # nats of a gate's margin that discretization counts as one bit, as it does for units


class Gated(BitWidth):
    """Width of 2, 4, 8, ... bits within [low, high]; a wider choice needs its own gate and all gates below it open."""

    own_grid: ClassVar[bool] = True

    def __init__(self, start: float, low: int, high: int):
        super().__init__()
        self.choices = tuple(b for b in LADDER if low <= b <= high)
        if not self.choices:
            raise JpqError(f"No power of two lies in {low} to {high} bits: widen --w-bits or --a-bits.")
        # the gate that the start lies behind is as open as the start asks; those below it are open, those above it shut
        odds = [(start - a) / (b - a) for a, b in zip(self.choices, self.choices[1:], strict=False)]
        phi = [math.log(min(max(p, 1e-3), 1 - 1e-3) / (1 - min(max(p, 1e-3), 1 - 1e-3))) - EDGE for p in odds]
        self.phi = nn.Parameter(torch.tensor([min(max(p, -START), START) for p in phi]))

    def grid(self) -> Grid:
        """Nested grid of this width."""
        return Nested(self)

    def draw(self) -> Tensor:
        """Random value of every gate in [0, 1], `[gates]`."""
        u = torch.rand_like(self.phi).clamp(1e-6, 1 - 1e-6)
        s = torch.sigmoid((u.logit() + self.phi) / BETA)
        return (s * (HIGH - LOW) + LOW).clamp(0.0, 1.0)

    def open(self) -> Tensor:
        """Probability P(z > 0) of every gate, `[gates]`."""
        return torch.sigmoid(self.phi + EDGE)

    def reached(self) -> Tensor:
        """Probability of this choice or a wider one, `[choices]`: products of gates, from the bottom up."""
        return torch.cat([self.phi.new_ones(1), self.open().cumprod(0)])

    def margins(self) -> list[float]:
        """Nats by which the gates of each wider choice are open, the least of them; above 0 where it is reached."""
        return [float(m) for m in (self.phi.detach() - CLOSED).cummin(0).values] if len(self.phi) else []

    def forward(self) -> Tensor:
        """Width of evaluation, with the gradient of the expected width."""
        expected = self.reached() @ self._steps()
        return self.open_width() + (expected - expected.detach())

    def open_width(self) -> Tensor:
        """Widest choice whose gates are all open, a scalar: the width of evaluation."""
        reached = (self.phi.detach() > CLOSED).to(self.phi.dtype).cumprod(0)
        return torch.cat([reached.new_ones(1), reached]) @ self._steps()

    def soft(self) -> float:
        """Expected bits."""
        return float(self.reached().detach() @ self._steps())

    def nearest(self, value: float) -> int:
        """Widest choice whose gates are all open once everything moves by `value - soft()` bits."""
        shift = value - self.soft()
        return self.choices[sum(m + NATS * shift > 0 for m in self.margins())]

    def switch(self, small: int, large: int) -> float:
        """Expected bits, moved by what the gates of `large` lack."""
        return self.soft() - self.margins()[self.choices.index(large) - 1] / NATS

    @torch.no_grad()
    def after_step(self) -> None:
        """Bound phi, so that closed gates still get a gradient."""
        self.phi.clamp_(-BOUND, BOUND)

    def _steps(self) -> Tensor:
        """Bits that each choice adds to the one below it, `[choices]`."""
        return self.phi.new_tensor([float(b - a) for a, b in zip((0, *self.choices), self.choices, strict=False)])


class Nested(Grid):
    """Grid of the nested sum while training, the uniform grid of the reached width otherwise."""

    def __init__(self, width: Gated):
        self.width = width

    def range(self, threshold: Tensor, signed: bool) -> Tensor:
        """Top of the uniform grid: x_max, or half a step below it where the grid is symmetric."""
        n = torch.exp2(self.width.open_width())
        return threshold * ((n - 2) / (n - 1)) if signed else threshold

    def quantize(self, x: Tensor, threshold: Tensor, bits: Tensor, signed: bool) -> Tensor:
        """Quantized x_q with one draw of the gates."""
        return _Nest.apply(x, threshold, self.width.draw(), self.width.choices, signed)


class _Nest(torch.autograd.Function):
    """Nested sum of the formulas above; `top` is x_max, a scalar or one that broadcasts to x; `z` is `[gates]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, top: Tensor, z: Tensor, choices: Sequence[int], signed: bool) -> Tensor:
        total = top * 2 if signed else top
        # half a step below a symmetric range lies its highest level: a quarter keeps clear of every grid's boundary
        end = top - (total / (2.0 ** choices[-1] - 1) / 4 if signed else 0)
        rest = x.clamp(-end if signed else torch.zeros_like(end), end)
        parts = []
        for bits in choices:
            step = total / (2.0**bits - 1)
            part = torch.div(rest, step).round_().mul_(step)
            rest = rest - part
            parts.append(part)
        tails = [torch.zeros(())] * len(z)  # the residual behind each gate
        tail = None
        for i in reversed(range(len(z))):
            tails[i] = parts[i + 1] if tail is None else parts[i + 1] + z[i + 1] * tail
            tail = tails[i]
        q = parts[0] if tail is None else parts[0] + z[0] * tail
        ctx.save_for_backward(x, top, z, q, *tails)
        ctx.signed = signed
        return q

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        x, top, z, q, *tails = ctx.saved_tensors
        dx = g * ((x.abs() <= top) if ctx.signed else (x >= 0) & (x <= top))
        d_top = ((g * q - dx * x).sum_to_size(top.shape)) / top
        before = torch.cat([z.new_ones(1), z.cumprod(0)])[:-1]
        d_z = torch.stack([(g * tail).sum() for tail in tails]) * before if tails else None
        return dx, d_top, d_z, None, None
