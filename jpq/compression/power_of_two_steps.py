"""Steps of activations become powers of two, when decisions are final and before the weights are fine-tuned.

A product with a power of two is exact. An activation on such a grid is rounded alike by a division, by a product with
the reciprocal, and by an integer kernel's combined factor: every runtime then makes the same integers of it. The
weights' steps follow after fine-tuning (jpq/export/exact_steps.py).

Of the two powers around a learned step, the one with the smaller squared error on samples of the activations is taken
at first; the range goes on learning, and the step follows it from power to power.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from jpq.compression.model import CompressedModel
from jpq.methods.quantizers import IntegerQuantizer, result_quantizer
from jpq.methods.quantizers.uniform_integer import quantize_tensor

WIDER = 0.25  # distance above a power of two, in octaves, from which the next one is taken where there are no samples


@torch.no_grad()
def round_activation_steps(net: CompressedModel, names: Collection[str] | None = None) -> None:
    """Round the steps of all inputs and rounded results of layers to powers of two; `net` is frozen.

    `names`: of the layers whose inputs alone are rounded; default: all, and results too.
    """
    for layer in net.network.layers:
        pair = net.quantizers(layer.name)
        if pair is not None and (names is None or layer.name in names):
            _round_step(pair[1], net.calibration_samples.get(layer.name))
    if names is not None:
        return
    for module in net.model.modules():
        grid = result_quantizer(module)
        if grid is not None:
            _round_step(grid, None)


def _round_step(grid: IntegerQuantizer, samples: Tensor | None) -> None:
    """Round the step of one quantizer of a scalar range."""
    exponent = torch.log2(grid.scale().double())
    below, above = exponent.floor().exp2(), exponent.ceil().exp2()
    if samples is None or not samples.numel():
        grid.round_step(torch.where(exponent - exponent.floor() > WIDER, above, below))
        return
    samples = samples.to(grid.log_threshold)
    errors = [_squared_error(grid, samples, step) for step in (below, above)]
    grid.round_step(below if errors[0] <= errors[1] else above)


def _squared_error(grid: IntegerQuantizer, samples: Tensor, step: Tensor) -> float:
    """Sum of the squared differences that rounding with a step makes."""
    bits = grid.width()
    threshold = (step * grid.largest_integer()).to(samples)
    return float((quantize_tensor(samples, threshold, float(bits), grid.signed) - samples).double().square().sum())
