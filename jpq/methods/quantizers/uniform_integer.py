"""Uniform integer quantizer with fused forward and backward, for brevitas's proxies.

    x_q = s * clamp(round(x / s), low, high)      s = r / N      N = max(-low, high)

with the range r (`threshold`, learned in the log domain, per output channel for weights) and the bit-width b
(a `BitWidth`, see base.py). Zero is exact on every grid. With n = 2^(b-1) - 1 the integers are

| grid | low..high | `side` | levels at 2 bits |
|---|---|---|---|
| unsigned | 0..2^b - 1 | 0 | 0, 1, 2, 3 |
| signed, narrow range | -n..n | 0 | -1, 0, 1 |
| signed, all levels, one more below zero | -(n + 1)..n | -1 | -2, -1, 0, 1 |
| signed, all levels, one more above zero | -n..n + 1 | 1 | -1, 0, 1, 2 |

Weights use all 2^b levels, with the side of the additional one chosen per output channel by squared error when the
range is fitted (`fit_weight_grid`); r is then the end of the longer side, and one bit more halves the step. From 8 bits
on the range is narrow whatever `side` says: 128 is no int8, and the level gains nothing there. Activations, and weights
whose search rounds on a grid of its own (`Grid`), have side 0.

Once decisions are final, steps of activations are powers of two whose exponent goes on
learning (`round_step`; straight-through on the rounding of log2 s, as S. Jain et al., "Trained Quantization
Thresholds", MLSys 2020, arXiv:1903.08066). At the end all steps are fixed (`fix_step`) to numbers of few binary digits,
so that floating point and integers give the same numbers. brevitas takes the module as its injectors' `tensor_quant`,
as an instance: assigning `layer.weight` then re-creates nothing, and learned bits survive.

Gradients (straight-through on round only), e = x_q - x, "in" where s low <= x <= s high:

    d x_q / d x     = 1 in, 0 out
    d x_q / d ln r  = e in,  x_q out
    d x_q / d b     = -ln 2 * (n + 1) / N * e in,  0 out          (from s = r / N at fixed r)

    unsigned: (2^b) / N for (n + 1) / N; all levels: beyond the shorter end, ln 2 * s away from zero

Source: the learned quantizer of DJPQ (Wang et al., ECCV 2020, arXiv:2007.10463) as GETA's code gives it.
We differ: exponent t = 1 (integer kernels and QCDQ need a uniform grid); all levels; one forward and backward of a few
in-place passes, because the plain chain of differentiable operations costs more than the convolution beside it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from jpq.methods.quantizers.base import BitWidth, Grid
from jpq.methods.quantizers.dead_zone import DeadZoneGrid, LevelRange
from jpq.methods.quantizers.widths import Fixed
from jpq.types import JpqError


def levels(bits: Tensor, signed: bool) -> Tensor:
    """Largest integer of the unsigned grid and of the narrow signed one, `2^(bits - signed) - 1`."""
    return torch.exp2(bits - float(signed)) - 1.0


NARROW_FROM = 8  # bits; from here on signed grids are narrow

SIDE_BITS = 4  # bits; a range that is fitted at `NARROW_FROM` or more takes the side that suits this width

NEAR = 0.9  # octaves between a learned step and the power of two that it is rounded to, at most, at the start


def integer_range(bits: Tensor, signed: bool, side: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(low, high): smallest and largest integer of a grid, shaped like `side`; None is a narrow grid, of scalars."""
    n = levels(bits, signed)
    if not signed:
        return torch.zeros_like(n), n
    if side is None:
        return -n, n
    extra = side * (bits < NARROW_FROM)
    return 0.0 - (n + (extra < 0)), n + (extra > 0)


class _Quantize(torch.autograd.Function):
    """Quantizer of the formulas above; `threshold`, `noise` and `side` broadcast to x, `bits` is a scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        threshold: Tensor,
        bits: Tensor,
        signed: bool,
        noise: Tensor | None,
        side: Tensor | None = None,
    ) -> Tensor:
        low, high = integer_range(bits, signed, side)
        scale = threshold / torch.maximum(-low, high)
        if x.is_cpu and scale.numel() == 1:  # plain numbers take torch's fastest loops; on a GPU they would wait
            q = torch.div(x, float(scale)).round_().clamp_(float(low), float(high)).mul_(float(scale))
        else:
            q = torch.div(x, scale).round_().clamp_(low, high).mul_(scale)
        out = q if noise is None else q * noise
        ctx.save_for_backward(x, q, threshold, bits, noise, side)
        ctx.signed = signed
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        x, q, threshold, bits, noise, side = ctx.saved_tensors
        d_noise = None
        if noise is not None:
            if ctx.needs_input_grad[4]:
                d_noise = (g * q).sum_to_size(noise.shape)
            g = g * noise
        ends = _Ends(threshold, bits, ctx.signed, side)
        dx = ends.gradient_inside(g, x)
        error = (q - x).mul_(dx)
        inner = error.sum() if threshold.numel() == 1 else error.sum_to_size(threshold.shape)
        d_threshold = ends.gradient_of_range(inner, g - dx, x) if ctx.needs_input_grad[1] else None
        d_bits = ends.gradient_of_bits(inner, g, dx, x) if ctx.needs_input_grad[2] else None
        return dx, d_threshold, d_bits, None, d_noise, None


class _Ends:
    """The two ends of a grid in the backward pass, as shares of the range: `below` and `above`, at least one is 1."""

    def __init__(self, threshold: Tensor, bits: Tensor, signed: bool, side: Tensor | None):
        self.threshold, self.bits, self.signed, self.side = threshold, bits, signed, side
        low, high = integer_range(bits, signed, side)
        self.largest = torch.maximum(-low, high)
        self.below, self.above = -low / self.largest, high / self.largest
        self.longer = high + low  # 1 where the grid is longer above zero, -1 where it is longer below it

    def gradient_inside(self, g: Tensor, x: Tensor) -> Tensor:
        """g where x lies within the ends, 0 elsewhere."""
        lower, upper = self.threshold * self.below, self.threshold * self.above
        if x.is_cpu and upper.numel() == 1:
            # one fused pass: g where low < x < high; nudged so that the ends, and 0 itself, count as inside
            nudge = 1 + 3e-7  # beyond the last float32 that counts
            low = -float(lower) * nudge if self.signed else -1e-30
            return torch.ops.aten.hardtanh_backward(g, x, low, float(upper) * nudge)
        return g * ((x >= -lower) & (x <= upper))

    def gradient_of_range(self, inner: Tensor, out: Tensor, x: Tensor) -> Tensor:
        """Gradient of the range, shaped like it, from the sums of e * g inside and from g outside."""
        outer = out.mul_(torch.where(x > 0, self.above, -self.below) if self.signed else x > 0)
        outer = outer.sum() if self.threshold.numel() == 1 else outer.sum_to_size(self.threshold.shape)
        return (inner / self.threshold.reshape(inner.shape) + outer).reshape(self.threshold.shape)

    def gradient_of_bits(self, inner: Tensor, g: Tensor, dx: Tensor, x: Tensor) -> Tensor:
        """Gradient of the bit-width, a scalar."""
        n = levels(self.bits, self.signed)
        total = inner
        if self.signed and self.side is not None:
            shorter = ((g - dx) * (x * self.longer < 0)).sum_to_size(self.threshold.shape)
            moved = shorter * self.longer * (self.threshold / self.largest)
            total = (inner + moved.reshape(inner.shape)) * (n / self.largest).reshape(inner.shape)
        return (total.sum() * (-math.log(2.0)) * (n + 1.0) / n).reshape(self.bits.shape)


def round_to_grid(x: Tensor, threshold: Tensor, bits: Tensor, signed: bool, side: Tensor | None = None) -> Tensor:
    """Tensor x on the grid in plain operators, which torch.export can follow; bit for bit what `_Quantize` gives."""
    low, high = integer_range(bits, signed, side)
    scale = threshold / torch.maximum(-low, high)
    return torch.div(x, scale).round().clamp(low, high) * scale


@torch.no_grad()
def quantize_tensor(x: Tensor, threshold: Tensor, bits: float, signed: bool, side: Tensor | None = None) -> Tensor:
    """Tensor x on the uniform grid of range `threshold`, a scalar or one that broadcasts to x; no gradient.

    `side`, shaped like the range, says where all levels are used (`fit_weight_grid`); None: nowhere.
    """
    out: Tensor = _Quantize.apply(x, threshold, torch.tensor(float(bits), device=x.device), signed, None, side)
    return out


class IntegerQuantizer(nn.Module):
    """Quantizer module, brevitas's `tensor_quant`: x -> (x_q, scale, zero point, bit-width).

    Args:
        threshold: start of the range r; a scalar for activations, `[C, 1, ...]` for weights. Positive.
        width: the bit-width, learned or fixed.
        signed: whether the grid reaches below zero.
        side: int8, shaped like the range: -1 or 1 where a signed grid has one more level below or above zero, 0 where
            its range is narrow. Default, and where the width brings a grid of its own: narrow.
    """

    zero_point: Tensor
    side: Tensor  # int8, shaped like the range: -1, 0 or 1
    step: Tensor  # shaped like the range: the grid's step once it is fixed or rounded, before that 0
    power_of_two: Tensor  # bool: the step is rounded to a power of two, and its range learns (`round_step`)

    def __init__(self, threshold: Tensor, width: BitWidth, signed: bool, side: Tensor | None = None):
        super().__init__()
        self.grid: Grid | None = width.grid()  # grid of training, until `fix`; None: the uniform grid
        start = threshold.detach().clamp_min(1e-8)
        if self.grid is not None:
            start = start / self.grid.range(torch.ones_like(start), signed).detach()
        self.log_threshold = nn.Parameter(start.log())
        self.width = width
        self.signed = signed
        self.register_buffer("zero_point", torch.zeros(()), persistent=False)
        own = not signed or self.grid is not None
        sides = torch.zeros_like(start, dtype=torch.int8) if side is None or own else side.to(torch.int8)
        self.register_buffer("side", sides)
        self.register_buffer("step", torch.zeros_like(start))
        self.register_buffer("power_of_two", torch.zeros((), dtype=torch.bool))
        self.noise: Any = None  # Callable[[Tensor], Tensor | None]: noise that multiplies what the layer reads

    @property
    def threshold(self) -> Tensor:
        """Range r of the uniform grid."""
        learned = self.log_threshold.exp()
        if self.grid is not None:
            return self.grid.range(learned, self.signed)
        n = self.largest_integer()
        straight_through = torch.where(self.power_of_two, learned - learned.detach(), 0.0)
        step = self.step.clone() if self.training else self.step  # a layer that is called twice moves it in between
        return torch.where(step > 0, step * n + straight_through, learned)

    def scale(self) -> Tensor:
        """Step s of the grid."""
        return self.threshold / self.largest_integer()

    def integers(self) -> tuple[Tensor, Tensor]:
        """(low, high): smallest and largest integer of the uniform grid, shaped like the range or scalars."""
        return integer_range(self.width(), self.signed, self.side)

    def largest_integer(self) -> Tensor:
        """Largest magnitude N of the grid's integers, shaped like the range or a scalar: s = r / N."""
        low, high = self.integers()
        return torch.maximum(-low, high)

    @property
    def all_levels(self) -> bool:
        """Whether any channel uses all levels of its width, up to 7 bits."""
        return bool(self.side.any())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantized x, and the scale, zero point and bits of its grid."""
        if self.training:
            self._move_step()
        bits, threshold = self.width(), self.threshold
        noise = self.noise(x) if self.noise is not None and self.training else None
        q: Tensor
        if self.grid is not None and self.training:
            q = self.grid.quantize(x, self.log_threshold.exp(), bits, self.signed)
            q = q if noise is None else q * noise
        elif torch.compiler.is_exporting():
            q = round_to_grid(x, threshold, bits, self.signed, self.side)
        else:
            q = _Quantize.apply(x, threshold, bits, self.signed, noise, self.side if self.signed else None)
        low, high = integer_range(bits, self.signed, self.side)
        return q, threshold / torch.maximum(-low, high), self.zero_point, bits

    def use_dead_zone(self, ends: LevelRange) -> None:
        """Round on a dead-zone grid while training; `ends` gives its largest level and its zero bin's width.

        Raises JpqError where the width brings a grid of its own.
        """
        if self.grid is not None:
            raise JpqError(
                f"Widths of kind {type(self.width).__name__} and a dead zone each bring a grid to train on; choose "
                "widths that have none (learned, squashed or power_of_two)."
            )
        self.grid = DeadZoneGrid(ends)
        self.side = torch.zeros_like(self.side)

    @torch.no_grad()
    def fix(self, bits: int) -> None:
        """Switch to the uniform grid at fixed `bits`; evaluation is unchanged where that is the width already."""
        if self.grid is not None:
            self.log_threshold.copy_(self.threshold.log())
            self.grid = None
        self.width = Fixed(bits, self.width.choices).to(self.log_threshold.device)
        self.step.zero_()
        self.power_of_two.fill_(False)

    @torch.no_grad()
    def round_step(self, power: Tensor) -> None:
        """Round the step to a power of two from now on, at first to `power`; the range goes on learning.

        The step moves on in training, to the power that the learned step reaches: not earlier, lest it swing between
        the two powers around it.
        """
        n = self.largest_integer()
        distance = (torch.log2(self.scale().double()) - torch.log2(power.double())).clamp(-NEAR, NEAR)
        self.step.copy_(power)
        self.power_of_two.fill_(True)
        self.log_threshold.copy_((power.double() * distance.exp2() * n).log())

    @torch.no_grad()
    def _move_step(self) -> None:
        """Let a step that is rounded to a power of two follow the learned one by whole powers."""
        learned = self.log_threshold.double().exp() / self.largest_integer()
        powers = torch.log2(learned / self.step.double().clamp_min(1e-38)).trunc()
        factor = torch.where(self.power_of_two, powers.exp2(), 1.0).to(self.step)
        self.step = self.step * factor  # not in place: a graph may hold it

    @torch.no_grad()
    def fix_step(self, step: Tensor) -> None:
        """Round to multiples of `step` (positive, shaped like the range) from now on: the range learns no more."""
        self.step.copy_(step)
        self.power_of_two.fill_(False)
        self.log_threshold.copy_((self.step.double() * self.largest_integer()).log())

    @torch.no_grad()
    def refit(self, weight: Tensor, bits: int) -> None:
        """Fit the range of a weight's quantizer, and the side where it uses all levels, to a weight at this width."""
        threshold, side = fit_weight_grid(weight, bits, self.log_threshold.dim() > 0, self.all_levels)
        self.log_threshold.copy_(threshold.clamp_min(1e-8).log())
        self.side.copy_(side)

    @torch.no_grad()
    def flip(self, signs: Tensor) -> None:
        """Mirror the grid at zero where `signs` (shaped like the range) is negative, as for a weight times `signs`."""
        self.side = torch.where(signs < 0, -self.side, self.side)

    def __setstate__(self, state: Any) -> None:
        """Unpickle as usual; quantizers from before all levels were used are narrow."""
        super().__setstate__(state)
        if "side" not in self._buffers:
            self.register_buffer("side", torch.zeros_like(self.step, dtype=torch.int8))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load as usual; states from before steps were kept have none, those from before all levels are narrow."""
        state_dict.setdefault(f"{prefix}side", torch.zeros_like(self.side))
        state_dict.setdefault(f"{prefix}step", self.step)
        state_dict.setdefault(f"{prefix}power_of_two", self.power_of_two)
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.no_grad()
def fit_threshold(x: Tensor, bits: float, signed: bool, per_channel: bool, grid: int = 40) -> Tensor:
    """Range of a narrow or unsigned grid of least squared error: `[C, 1, ...]` per channel (dim 0), else a scalar.

    A plain search over `grid` fractions of the largest magnitude; a range of zeros gets the mean range, or 1.
    """
    flat = x.reshape(x.shape[0], -1) if per_channel else x.reshape(1, -1)
    n = float(2.0 ** (bits - signed) - 1)
    best, _ = _least_error(flat, n, -n if signed else 0.0, n, grid)
    return best.reshape([-1] + [1] * (x.dim() - 1)) if per_channel else best.reshape(())


@torch.no_grad()
def fit_weight_grid(
    weight: Tensor, bits: float, per_channel: bool, all_levels: bool, grid: int = 40
) -> tuple[Tensor, Tensor]:
    """(range, side) of a weight's signed grid with the least squared error, each as `fit_threshold` shapes the range.

    The steps that are tried are those of the narrow grid, so all levels never have a larger error than it.

    Args:
        weight: any shape; channels lie along dim 0.
        bits: width; where all levels are used, the nearest whole one.
        per_channel: whether every channel has a range and a side of its own.
        all_levels: whether all 2^bits levels are used, up to 7 bits; else the range is narrow and the side 0.
        grid: number of steps tried.
    """
    width = round(bits)
    if not all_levels or width >= NARROW_FROM:
        threshold = fit_threshold(weight, bits, True, per_channel, grid)
        if all_levels:
            return threshold, fit_weight_grid(weight, SIDE_BITS, per_channel, True, grid)[1]
        return threshold, torch.zeros_like(threshold, dtype=torch.int8)
    flat = weight.reshape(weight.shape[0], -1) if per_channel else weight.reshape(1, -1)
    n = float(2 ** (width - 1) - 1)
    below, below_error = _least_error(flat, n, -n - 1, n, grid)
    above, above_error = _least_error(flat, n, -n, n + 1, grid)
    take_above = above_error < below_error
    shape = [-1] + [1] * (weight.dim() - 1) if per_channel else []
    threshold = torch.where(take_above, above, below) * ((n + 1) / n)
    return threshold.reshape(shape), (2 * take_above.to(torch.int8) - 1).reshape(shape)


def _least_error(flat: Tensor, n: float, low: float, high: float, grid: int) -> tuple[Tensor, Tensor]:
    """(n times the step, squared error) [C, 1] of the best of `grid` steps for integers from `low` to `high`.

    Args:
        flat: [C, numbers].
        n: the largest step tried is the largest magnitude of a row over n.
    """
    top = flat.abs().amax(1, keepdim=True)
    usable = top[top > 0]
    top = torch.where(top > 0, top, usable.mean() if usable.numel() else torch.ones_like(top[:1, 0]))
    best, best_error = top.clone(), torch.full_like(top, math.inf)
    for fraction in torch.linspace(1.0, 1.0 / grid, grid).tolist():
        scale = top * fraction / n
        error = ((flat / scale).round_().clamp_(low, high).mul_(scale) - flat).square().sum(1, keepdim=True)
        better = error < best_error
        best, best_error = torch.where(better, top * fraction, best), torch.where(better, error, best_error)
    return best, best_error
