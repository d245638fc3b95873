"""BatchNorm folded into the scale and bias of the quantized layer that it reads; the layer's integers stay.

A negative factor turns the signs of the integers. Only a norm that alone reads a layer is folded, each called once.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jpq.export.verify import EXACT, largest_difference, run_in_double
from jpq.methods.quantizers import is_quantized, replace_and_keep_rounding, weight_quantizer
from jpq.tracing.forward import call_model, hook_modules

Pair = tuple[str, str]  # (layer, the norm that reads it)


def fold_batchnorms(small: nn.Module, example: Any) -> nn.Module:
    """A copy of a rebuilt model that computes the same, with norms folded into layers wherever that is possible.

    `example` is a batch that the model runs on, to find which norm reads which layer.
    """
    small = copy.deepcopy(small).eval()
    pairs = find_pairs(small, example)
    if not pairs:
        return small
    model = _with_single_precision_gains(small)
    expected = run_in_double(copy.deepcopy(model).double(), example)

    def changes_nothing(some: list[Pair]) -> bool:
        folded = _fold(copy.deepcopy(model), some).double()
        return largest_difference(expected, run_in_double(folded, example)) <= EXACT

    return _fold(small, exact_pairs(pairs, changes_nothing))


def exact_pairs(pairs: list[Pair], changes_nothing: Callable[[list[Pair]], bool]) -> list[Pair]:
    """Those of `pairs` that can be folded without a change of the outputs; other modules may read a layer, too.

    `changes_nothing` runs the model with some of them folded. Halves are tried together, so that a few that cannot be
    folded among many cost few runs.
    """

    def exact_beside(others: list[Pair], some: list[Pair]) -> list[Pair]:
        if changes_nothing([*others, *some]):
            return some
        if len(some) == 1:
            return []
        middle = len(some) // 2
        first = exact_beside(others, some[:middle])
        return first + exact_beside([*others, *first], some[middle:])

    return exact_beside([], pairs) if pairs else []


def _with_single_precision_gains(model: nn.Module) -> nn.Module:
    """A copy in which norms whose variance and eps make 1 in single precision make 1 in double precision as well.

    Such a norm only adds its bias (`exact_steps`). A gain that is 7e-9 off in double precision alone would move values
    from one side of a rounding boundary to the other, since sums of rounded steps often lie on it.
    """
    model = copy.deepcopy(model)
    for norm in model.modules():
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None:
            continue
        if bool((norm.running_var.float() + norm.eps == 1).all()):
            norm.running_var.fill_(1.0)
            norm.eps = 0.0
    return model


@torch.no_grad()
def find_pairs(model: nn.Module, example: Any) -> list[Pair]:
    """Layers and the norms that read exactly their output, each called once."""
    layer_of: dict[int, str] = {}  # address of an output -> layer
    outputs: list[Tensor] = []  # kept alive, so that no address is used twice
    calls: Counter[str] = Counter()
    channels: dict[str, int] = {}  # of each layer's output
    modules: dict[str, nn.Module] = {}
    pairs: list[Pair] = []

    def observe(name: str, module: Any, x: Any, output: Any) -> None:
        calls[name] += 1
        if name in channels:
            layer_of[id(output)] = name
            outputs.append(output)
        elif id(x) in layer_of and _fits(module, channels[layer_of[id(x)]]):
            pairs.append((layer_of[id(x)], name))

    for name, module in model.named_modules():
        if is_quantized(module) and weight_quantizer(module).log_threshold.dim() > 0:
            channels[name], modules[name] = len(module.weight), module
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            modules[name] = module
    with hook_modules(modules, observe):
        call_model(model, example)
    return [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1]


def _fits(norm: Any, channels: int) -> bool:
    """Whether a norm has fixed statistics of as many channels."""
    return norm.running_mean is not None and norm.num_features == channels


@torch.no_grad()
def _fold(model: nn.Module, pairs: list[Pair]) -> nn.Module:
    """The model itself, in which each pair is now one layer."""
    for layer_name, norm_name in pairs:
        layer: Any = model.get_submodule(layer_name)
        norm: Any = model.get_submodule(norm_name)
        factor = (norm.running_var + norm.eps).rsqrt()
        factor = factor if norm.weight is None else factor * norm.weight
        if not bool((factor != 0).all()):
            continue  # a channel that is constant has no scale
        shift = -norm.running_mean * factor if norm.bias is None else norm.bias - norm.running_mean * factor
        bias = shift if layer.bias is None else shift + layer.bias * factor
        grid = weight_quantizer(layer)
        shape = grid.log_threshold.shape
        layer.weight.mul_(factor.reshape(shape))
        grid.flip(factor.reshape(shape))
        grid.log_threshold.add_(factor.abs().log().reshape(shape))
        grid.step.mul_(factor.abs().reshape(shape))
        layer.bias = nn.Parameter(bias)
        replace_and_keep_rounding(model, norm, nn.Identity())
    return model
