"""Uniform symmetric integer quantizer with fused forward and backward, for brevitas's proxies.

    x_q = s * clamp(round(x / s), -N or 0, N)      s = r / N      N = 2^(b - signed) - 1

with the range r (`threshold`, learned in the log domain, per output channel for weights) and the bit-width b
(a `BitWidth`, see base.py). 2-bit signed has 3 levels, 4-bit unsigned 16: weights use the narrow range, so zero is
exact and the grid symmetric. Once decisions are final, steps of activations are powers of two whose exponent goes on
learning (`round_step`; straight-through on the rounding of log2 s, as S. Jain et al., "Trained Quantization
Thresholds", MLSys 2020, arXiv:1903.08066). At the end all steps are fixed (`fix_step`) to numbers of few binary digits,
so that floating point and integers give the same numbers. brevitas takes the module as its injectors' `tensor_quant`,
as an instance: assigning `layer.weight` then re-creates nothing, and learned bits survive.

Gradients (straight-through on round only), e = x_q - x, "in" where |x| <= r (0 <= x <= r when unsigned):

    d x_q / d x     = 1 in, 0 out
    d x_q / d ln r  = e in,  +-r out
    d x_q / d b     = -ln 2 * (N + 1) / N * e in,  0 out          (from s = r / N at fixed r)

Source: the learned quantizer of DJPQ (Wang et al., ECCV 2020, arXiv:2007.10463) as GETA's code gives it.
We differ: exponent t = 1 (integer kernels and QCDQ need a uniform grid); one forward and backward of a few in-place
passes, because the plain chain of differentiable operations costs more than the convolution beside it.
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
    """Largest integer N of the grid, `2^(bits - signed) - 1`."""
    return torch.exp2(bits - float(signed)) - 1.0


NEAR = 0.9  # octaves between a learned step and the power of two that it is rounded to, at most, at the start


class _Quantize(torch.autograd.Function):
    """Quantizer of the formulas above; `threshold` and `noise` broadcast to x, `bits` is a scalar."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bits: Tensor, signed: bool, noise: Tensor | None) -> Tensor:
        n = levels(bits, signed)
        scale = threshold / n
        if x.is_cpu and threshold.numel() == 1:  # plain numbers take torch's fastest loops; on a GPU they would wait
            top, step = float(n), float(scale)
            q = torch.div(x, step).round_().clamp_(-top if signed else 0.0, top).mul_(step)
        else:
            q = torch.div(x, scale).round_().clamp_(-n if signed else torch.zeros_like(n), n).mul_(scale)
        out = q if noise is None else q * noise
        ctx.save_for_backward(x, q, threshold, bits, noise)
        ctx.signed = signed
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        x, q, threshold, bits, noise = ctx.saved_tensors
        d_noise = None
        if noise is not None:
            if ctx.needs_input_grad[4]:
                d_noise = (g * q).sum_to_size(noise.shape)
            g = g * noise
        if x.is_cpu and threshold.numel() == 1:
            top = float(threshold)
            # one fused pass: g where low < x < high; nudged so that the ends, and 0 itself, count as inside
            top *= 1 + 3e-7  # beyond the last float32 that counts
            dx = torch.ops.aten.hardtanh_backward(g, x, -top if ctx.signed else -1e-30, top)
        else:
            dx = g * ((x.abs() <= threshold) if ctx.signed else (x >= 0) & (x <= threshold))
        error = (q - x).mul_(dx)
        shape = threshold.shape
        inner = error.sum() if threshold.numel() == 1 else error.sum_to_size(shape)
        d_threshold = d_bits = None
        if ctx.needs_input_grad[1]:
            out = (g - dx).mul_(x.sign()) if ctx.signed else (g - dx).mul_(x > 0)
            outer = out.sum() if threshold.numel() == 1 else out.sum_to_size(shape)
            d_threshold = (inner / threshold.reshape(inner.shape) + outer).reshape(shape)
        if ctx.needs_input_grad[2]:
            n = levels(bits, ctx.signed)
            d_bits = (inner.sum() * (-math.log(2.0)) * (n + 1.0) / n).reshape(bits.shape)
        return dx, d_threshold, d_bits, None, d_noise


def round_to_grid(x: Tensor, threshold: Tensor, bits: Tensor, signed: bool) -> Tensor:
    """Tensor x on the grid in plain operators, which torch.export can follow; bit for bit what `_Quantize` gives."""
    n = levels(bits, signed)
    scale = threshold / n
    return torch.div(x, scale).round().clamp(-n if signed else torch.zeros_like(n), n) * scale


@torch.no_grad()
def quantize_tensor(x: Tensor, threshold: Tensor, bits: float, signed: bool) -> Tensor:
    """Tensor x on the uniform grid of range `threshold`, a scalar or one that broadcasts to x; no gradient."""
    out: Tensor = _Quantize.apply(x, threshold, torch.tensor(float(bits), device=x.device), signed, None)
    return out


class IntegerQuantizer(nn.Module):
    """Quantizer module, brevitas's `tensor_quant`: x -> (x_q, scale, zero point, bit-width).

    Args:
        threshold: start of the range r; a scalar for activations, `[C, 1, ...]` for weights. Positive.
        width: the bit-width, learned or fixed.
        signed: whether the grid reaches below zero.
    """

    zero_point: Tensor
    step: Tensor  # shaped like the range: the grid's step once it is fixed or rounded, before that 0
    power_of_two: Tensor  # bool: the step is rounded to a power of two, and its range learns (`round_step`)

    def __init__(self, threshold: Tensor, width: BitWidth, signed: bool):
        super().__init__()
        self.grid: Grid | None = width.grid()  # grid of training, until `fix`; None: the uniform grid
        start = threshold.detach().clamp_min(1e-8)
        if self.grid is not None:
            start = start / self.grid.range(torch.ones_like(start), signed).detach()
        self.log_threshold = nn.Parameter(start.log())
        self.width = width
        self.signed = signed
        self.register_buffer("zero_point", torch.zeros(()), persistent=False)
        self.register_buffer("step", torch.zeros_like(start))
        self.register_buffer("power_of_two", torch.zeros((), dtype=torch.bool))
        self.noise: Any = None  # Callable[[Tensor], Tensor | None]: noise that multiplies what the layer reads

    @property
    def threshold(self) -> Tensor:
        """Range r of the uniform grid."""
        learned = self.log_threshold.exp()
        if self.grid is not None:
            return self.grid.range(learned, self.signed)
        n = levels(self.width(), self.signed)
        straight_through = torch.where(self.power_of_two, learned - learned.detach(), 0.0)
        step = self.step.clone() if self.training else self.step  # a layer that is called twice moves it in between
        return torch.where(step > 0, step * n + straight_through, learned)

    def scale(self) -> Tensor:
        """Step s of the grid."""
        return self.threshold / levels(self.width(), self.signed)

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
            q = round_to_grid(x, threshold, bits, self.signed)
        else:
            q = _Quantize.apply(x, threshold, bits, self.signed, noise)
        return q, threshold / levels(bits, self.signed), self.zero_point, bits

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
        n = levels(self.width(), self.signed)
        distance = (torch.log2(self.scale().double()) - torch.log2(power.double())).clamp(-NEAR, NEAR)
        self.step.copy_(power)
        self.power_of_two.fill_(True)
        self.log_threshold.copy_((power.double() * distance.exp2() * n).log())

    @torch.no_grad()
    def _move_step(self) -> None:
        """Let a step that is rounded to a power of two follow the learned one by whole powers."""
        learned = self.log_threshold.double().exp() / levels(self.width(), self.signed)
        powers = torch.log2(learned / self.step.double().clamp_min(1e-38)).trunc()
        factor = torch.where(self.power_of_two, powers.exp2(), 1.0).to(self.step)
        self.step = self.step * factor  # not in place: a graph may hold it

    @torch.no_grad()
    def fix_step(self, step: Tensor) -> None:
        """Round to multiples of `step` (positive, shaped like the range) from now on: the range learns no more."""
        self.step.copy_(step)
        self.power_of_two.fill_(False)
        self.log_threshold.copy_((self.step.double() * levels(self.width(), self.signed)).log())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load as usual; states from before steps were kept have none."""
        state_dict.setdefault(f"{prefix}step", self.step)
        state_dict.setdefault(f"{prefix}power_of_two", self.power_of_two)
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.no_grad()
def fit_threshold(x: Tensor, bits: float, signed: bool, per_channel: bool, grid: int = 40) -> Tensor:
    """Range that quantizes x with the least squared error: `[C, 1, ...]` per channel (dim 0), else a scalar.

    A plain search over `grid` fractions of the largest magnitude; a range of zeros gets the mean range, or 1.
    """
    flat = x.reshape(x.shape[0], -1) if per_channel else x.reshape(1, -1)
    top = flat.abs().amax(1, keepdim=True)
    usable = top[top > 0]
    top = torch.where(top > 0, top, usable.mean() if usable.numel() else torch.ones_like(top[:1, 0]))
    n = float(2.0 ** (bits - signed) - 1)
    best, best_error = top.clone(), torch.full_like(top, math.inf)
    for fraction in torch.linspace(1.0, 1.0 / grid, grid).tolist():
        scale = top * fraction / n
        error = (
            ((flat / scale).round_().clamp_(-n if signed else 0.0, n).mul_(scale) - flat).square().sum(1, keepdim=True)
        )
        better = error < best_error
        best, best_error = torch.where(better, top * fraction, best), torch.where(better, error, best_error)
    return best.reshape([-1] + [1] * (x.dim() - 1)) if per_channel else best.reshape(())
