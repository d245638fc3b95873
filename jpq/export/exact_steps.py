"""Last step before rebuilding: norms folded, steps of weights and biases of few digits, so that all sums are exact.

A layer on integers q_a (step s_a) and q_w (step s_w, one per output channel) gives the sum of s_w s_a q_w q_a, plus its
bias b. Numbers of single precision hold 24 binary digits. With

    s_a = 2^i,    s_w = k 2^j,    b = n k 2^(i + j - t)      (k, n integers; t as large as the file's weights allow)

every product and every partial sum is an integer times k 2^(i + j - t), and exact in single precision as long as that
integer times k stays below 2^24: in any order, with fused additions or without, and in an integer kernel too, which
adds integers, multiplies by s_w s_a / s_y (exact: s_y is a power of two) and rounds half to even as all others do.

Per output channel k gets as many digits (1 to `DIGITS`) as the largest sum leaves: the largest sum of weights of one
sign times the largest input. With 4-bit weights that is all of them; with 8 bits it may be one or two, where the
weights' own resolution makes up for it. Weights are rounded anew, to the nearest point of the new grid.

Sums are those of the integers a weight has, so a grid with one more level on a side needs no rule of its own.

A BatchNorm that alone reads a layer is folded: its gain goes into the weight and its step (a negative one also mirrors
the grid, whose longer side changes), its shift is the bias b,
and the norm stays as one that adds b (mean 0, variance 1, gain 1), so that modules and state dicts keep their form.

What stays inexact: sums that are not a layer's own (averages over positions, softmax), functions (GELU, sigmoid),
norms that cannot be folded, layers whose sums exceed 2^24 at one digit.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jpq.compression.masking import original
from jpq.export.packed.batchnorm_folding import Pair, exact_pairs, find_pairs
from jpq.export.verify import EXACT, largest_difference, run_in_double
from jpq.methods.quantizers import IntegerQuantizer, act_quantizer, is_quantized, result_quantizer, weight_quantizer
from jpq.tracing.forward import eval_mode

DIGITS = 6  # binary digits of a weight's step, at most: it moves by 1.6 % at most

ENOUGH_DIGITS = 5  # below this, a finer bias is given up for digits of the step

BIAS_DIGITS = 3  # binary digits of the bias below the product of the steps, at most

EXACT_SUM = 2.0**24  # integers up to here are exact in single precision

LARGEST_STORED = 127  # of an integer in a file: narrower weights are stored shifted to the left


@torch.no_grad()
def round_weight_steps(model: nn.Module, example: Any) -> list[str]:
    """Fold norms and fix the steps and biases of all quantized layers of a model, in place.

    Returns the names of layers whose sums may need more than 24 binary digits, and are then rounded.

    Args:
        model: with final decisions, masked or rebuilt; steps of activations are powers of two already.
        example: a batch that it runs on, to find which norm reads which layer.
    """
    with eval_mode(model):
        pairs = dict(foldable_pairs(model, example))
    layers = {name: module for name, module in model.named_modules() if is_quantized(module)}
    for grid in (*map(act_quantizer, layers.values()), *map(result_quantizer, model.modules())):
        if grid is not None and bool(grid.power_of_two):
            grid.fix_step(grid.scale())
    return [
        name
        for name, layer in layers.items()
        if not _round_layer(layer, model.get_submodule(pairs[name]) if name in pairs else None)
    ]


@torch.no_grad()
def foldable_pairs(model: nn.Module, example: Any) -> list[Pair]:
    """(layer, norm) of each norm that alone reads a layer: folding it changes nothing but rounding."""
    pairs = [pair for pair in find_pairs(model, example) if _has_gains(model, *pair)]
    if not pairs:
        return []
    model = copy.deepcopy(model).double().eval()
    expected = run_in_double(model, example)
    return exact_pairs(pairs, lambda some: _is_neutral(model, some, example, expected))


def _has_gains(model: nn.Module, layer: str, norm: str) -> bool:
    """Whether no gain of a norm is 0: a channel that is constant has no step."""
    gain, _ = _gain_and_shift(model.get_submodule(layer), model.get_submodule(norm))
    return bool((gain.isfinite() & (gain != 0)).all())


def _is_neutral(model: nn.Module, pairs: list[Pair], example: Any, expected: list[Tensor]) -> bool:
    """Whether folding these norms of a model in double precision leaves its outputs as expected."""
    folded = copy.deepcopy(model)
    for layer_name, norm_name in pairs:
        layer, norm = folded.get_submodule(layer_name), folded.get_submodule(norm_name)
        gain, shift = _gain_and_shift(layer, norm)
        grid = weight_quantizer(layer)
        gain = gain.reshape(grid.log_threshold.shape)
        grid.flip(gain)
        grid.fix_step(grid.scale() * gain.abs())
        original(layer, "weight").mul_(gain)
        _set_shift(layer, norm, shift)
    return largest_difference(expected, run_in_double(folded, example)) <= EXACT


def _gain_and_shift(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Gain and shift [C], float64, that a norm applies to the products of a layer, whose own bias is in the shift."""
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    gain = gain if norm.weight is None else gain * norm.weight.double()
    shift = -norm.running_mean.double() * gain
    shift = shift if norm.bias is None else shift + norm.bias.double()
    return gain, shift if layer.bias is None else shift + layer.bias.double() * gain


def _set_shift(layer: Any, norm: Any, shift: Tensor) -> None:
    """Let a layer have no bias, and its norm do nothing but add `shift`."""
    if layer.bias is not None:
        layer.bias.zero_()
    norm.running_mean.zero_()
    norm.running_var.fill_(1.0 - norm.eps)
    if norm.weight is not None:
        norm.weight.fill_(1.0)
    if norm.bias is not None:
        norm.bias.copy_(shift)
    else:
        norm.running_mean.copy_(-shift)


def _round_layer(layer: Any, norm: Any) -> bool:
    """Fix the weight's step and the bias of one layer, whose norm (if any) is folded; whether its sums are exact."""
    grid, inputs = weight_quantizer(layer), act_quantizer(layer)
    step = grid.scale().double()
    integers = _nearest_integers(layer.weight.double(), step, grid)
    bias = None if layer.bias is None else layer.bias.double()
    if norm is not None:
        gain, bias = _gain_and_shift(layer, norm)
        gain = gain.reshape(step.shape)
        integers, step = integers * gain.sign(), step * gain.abs()
        grid.flip(gain)
    input_step = inputs.scale().double()
    room = _Room(layer, float(inputs.largest_integer()), inputs.signed, bias, input_step)
    finer = room.bias_digits(integers, step, _shift(grid)) if bias is not None else torch.zeros_like(step)
    new_step, new_integers, exact = _nearest_step(integers * step, integers, step, finer, room, grid)
    grid.fix_step(new_step)
    original(layer, "weight").copy_(new_integers * new_step)
    if bias is None:
        return exact
    unit = (new_step * input_step * (-finer).exp2()).flatten()
    bias = (bias / unit).round() * unit
    if norm is not None:
        _set_shift(layer, norm, bias)
    else:
        layer.bias.copy_(bias)
    return exact


def _nearest_integers(weight: Tensor, step: Tensor, grid: IntegerQuantizer) -> Tensor:
    """The integers of a weight on a grid of this step, clipped to its levels."""
    low, high = grid.integers()
    return (weight / step).round().clamp(low.double(), high.double())


def _shift(grid: IntegerQuantizer) -> int:
    """Number of places by which a file can shift integers of this width to the left."""
    return max(0, math.floor(math.log2(LARGEST_STORED / float(grid.largest_integer().max()))))


@dataclass(frozen=True)
class _Room:
    """The largest sums of a layer, and the binary digits that they leave for its steps."""

    layer: Any
    largest_input: float  # integer
    signed: bool  # whether inputs may be negative
    bias: Tensor | None  # float64 [C]
    input_step: Tensor

    def largest_sums(self, integers: Tensor, step: Tensor) -> Tensor:
        """Largest partial sum in units of (step of weights) x (step of inputs), shaped like `step`."""
        positive, negative = (self._sum_products(part.clamp_min(0)) for part in (integers, -integers))
        sums = (positive + negative if self.signed else torch.maximum(positive, negative)) * self.largest_input
        if not step.dim():
            return sums.max() + (0.0 if self.bias is None else self.bias.abs().max() / (step * self.input_step))
        if self.bias is not None:
            sums = sums + self.bias.abs() / (step.flatten() * self.input_step)
        return sums.reshape(step.shape)

    def _sum_products(self, integers: Tensor) -> Tensor:
        """Sums over all weights that one output reads, a number per output channel."""
        if not getattr(self.layer, "transposed", False):
            return integers.flatten(1).sum(1)
        groups = self.layer.groups
        return integers.reshape(groups, len(integers) // groups, integers.shape[1], -1).sum((1, 3)).flatten()

    def step_digits(self, sums: Tensor, finer: Tensor) -> Tensor:
        """Binary digits that are left for the step's mantissa; below 1 where even a power of two is too much."""
        return torch.floor(torch.log2(EXACT_SUM / (sums.clamp_min(1.0) * finer.exp2()))).clamp_max(DIGITS)

    def bias_digits(self, integers: Tensor, step: Tensor, most: int) -> Tensor:
        """Binary digits of the bias below the product of the steps: `most` at most, fewer where the step needs them."""
        sums, finer = self.largest_sums(integers, step), torch.zeros_like(step)
        for digits in range(1, min(BIAS_DIGITS, most) + 1):
            candidate = torch.full_like(step, float(digits))
            finer = torch.where(self.step_digits(sums, candidate) >= ENOUGH_DIGITS, candidate, finer)
        return finer


def _nearest_step(
    target: Tensor, integers: Tensor, step: Tensor, finer: Tensor, room: _Room, grid: IntegerQuantizer
) -> tuple[Tensor, Tensor, bool]:
    """(step, integers, whether all sums are exact): of the two steps of few digits around `step`, the closer grid."""
    digits = room.step_digits(room.largest_sums(integers, step), finer).clamp_min(1.0)
    last = torch.exp2(torch.floor(torch.log2(step)) - (digits - 1))  # value of the mantissa's last digit
    candidates = []
    for rounded in (torch.floor(step / last) * last, torch.ceil(step / last) * last):
        new_integers = _nearest_integers(target, rounded, grid)
        error = (new_integers * rounded - target).square()
        error = error.flatten(1).sum(1).reshape(step.shape) if step.dim() else error.sum()
        fits = room.largest_sums(new_integers, rounded) * finer.exp2() * (rounded / last) <= EXACT_SUM
        candidates.append((rounded, new_integers, error, fits))
    (below, below_integers, below_error, below_fits), (above, above_integers, above_error, above_fits) = candidates
    take_above = (above_fits & ~below_fits) | ((above_fits == below_fits) & (above_error < below_error))
    return (
        torch.where(take_above, above, below),
        torch.where(take_above, above_integers, below_integers),
        bool(torch.where(take_above, above_fits, below_fits).all()),
    )
