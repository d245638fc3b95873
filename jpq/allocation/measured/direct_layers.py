"""Layers of a probe that round and mask their weight once for all passes, and convolve images in channels-last order.

A quantized layer masks and rounds its weight anew in every pass, and asks its quantizers for grids that a measurement
does not use: in small networks that takes longer than the product itself. Here the weight of each layer is kept until
its width or its mask changes. Two-dimensional convolutions on a CPU run in channels-last order, which oneDNN computes
faster; whether the model stands that is tried, since its own code may rely on the usual order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from jpq.allocation.measured.table import Key
from jpq.compression.masking import MaskParametrization
from jpq.methods.quantizers import act_quantizer, is_quantized, weight_quantizer

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # what direct layers compute; others run as they are

CLOSE = 1e-3  # relative to the largest output; float32 sums in another order differ by far less


@dataclass(eq=False)
class DirectLayer:
    """One layer: its tensors, and the weights that it keeps."""

    module: Any  # a brevitas layer
    weight_key: Key
    input_key: Key
    masks: tuple[Tensor | None, ...] = ()  # under which the weights below were computed
    weights: dict[int | None, Tensor] = field(default_factory=dict)  # width -> weight; the float one and one other


class DirectLayers:
    """The quantized layers of a network whose forward passes are replaced, for passes without gradients.

    Args:
        model: with brevitas layers; masks of weights are `MaskParametrization`.
        keys: id of a quantizer -> the tensor that it rounds.
        width: tensor -> its present width in bits, None in floating point.
        rounded: (tensor, width, value) -> the value, rounded.
    """

    def __init__(
        self,
        model: nn.Module,
        keys: Mapping[int, Key],
        width: Callable[[Key], int | None],
        rounded: Callable[[Key, int, Tensor], Tensor],
    ):
        self.width, self.rounded = width, rounded
        self.channels_last = False
        self.layers: list[DirectLayer] = []
        for module in model.modules():
            if _is_plain(module):
                pair = id(weight_quantizer(module)), id(act_quantizer(module))
                if all(quantizer in keys for quantizer in pair):
                    layer = DirectLayer(module, keys[pair[0]], keys[pair[1]])
                    self.layers.append(layer)
                    module.__dict__["forward"] = partial(self._forward, layer)

    def restore(self) -> None:
        """Give the layers their own forward passes back, as what this class does is compared with."""
        for layer in self.layers:
            del layer.module.__dict__["forward"]

    @torch.no_grad()
    def try_channels_last(self, output: Callable[[], Tensor]) -> None:
        """Convolve in channels-last order from now on, where the model gives the same output as in the usual order.

        `output` runs the model on a few samples. Small differences are those of sums in another order.
        """
        expected = output()
        self._reorder(True)
        try:
            same = torch.allclose(output(), expected, rtol=CLOSE, atol=CLOSE * float(expected.abs().max()))
        except Exception:  # the model's own code looks at tensors as they lie in memory, as `view` does
            same = False
        if not same:
            self._reorder(False)

    def _reorder(self, channels_last: bool) -> None:
        """Set the order of weights, and forget those in the other one."""
        self.channels_last = channels_last
        for layer in self.layers:
            layer.weights = {}

    def _forward(self, layer: DirectLayer, x: Tensor) -> Tensor:
        """What the layer gives for its input."""
        module = layer.module
        if torch.is_grad_enabled():
            out: Tensor = type(module).forward(module, x)
            return out
        width = self.width(layer.input_key)
        if width is not None:
            x = self.rounded(layer.input_key, width, x)
        weight = self._weight(layer)
        if isinstance(module, nn.Linear):
            return F.linear(x, weight, module.bias)
        convolved: Tensor = module._conv_forward(x, weight, module.bias)
        return convolved

    def _weight(self, layer: DirectLayer) -> Tensor:
        """The masked and rounded weight of a layer at its present width."""
        masks = _masks(layer.module)
        if len(masks) != len(layer.masks) or any(a is not b for a, b in zip(masks, layer.masks, strict=True)):
            layer.masks, layer.weights = masks, {}
        width = self.width(layer.weight_key)
        if width not in layer.weights:
            layer.weights = {w: weight for w, weight in layer.weights.items() if w is None}
            weight = layer.module.weight.detach()
            if width is not None:
                weight = self.rounded(layer.weight_key, width, weight)
            if self.channels_last and isinstance(layer.module, nn.Conv2d) and weight.is_cpu:
                weight = weight.contiguous(memory_format=torch.channels_last)
            layer.weights[width] = weight
        return layer.weights[width]


def _is_plain(module: Any) -> bool:
    """Whether a module is a quantized layer that a plain product gives, with no parametrization but masks."""
    if not (is_quantized(module) and isinstance(module, PLAIN)):
        return False
    if getattr(module, "is_same_padded_strided", False):
        return False
    return all(isinstance(p, MaskParametrization) for p in _parametrizations(module))


def _parametrizations(module: Any) -> list[Any]:
    return list(module.parametrizations.weight) if parametrize.is_parametrized(module, "weight") else []


def _masks(module: Any) -> tuple[Tensor | None, ...]:
    """The present samples of the gates that mask a weight."""
    return tuple(draw.z for masking in _parametrizations(module) for draw, _ in masking.taps)
