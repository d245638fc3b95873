"""Conversion of float layers to brevitas layers that hold our quantizers.

The injectors name only what brevitas needs to run and export a proxy; the quantizer itself is handed over as an
instance, so there is one owner of ranges and bits.
"""

from __future__ import annotations

from typing import Any

import brevitas.nn as qnn
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from torch import nn

from jpq.methods.quantizers.proxies import NoActGrid, NoBiasGrid, act_injector, no_grid_proxy, weight_injector
from jpq.methods.quantizers.uniform_integer import IntegerQuantizer
from jpq.types import JpqError

_CONVS: dict[type[nn.Module], Any] = {
    nn.Conv1d: qnn.QuantConv1d,
    nn.Conv2d: qnn.QuantConv2d,
    nn.Conv3d: qnn.QuantConv3d,
    nn.ConvTranspose1d: qnn.QuantConvTranspose1d,
    nn.ConvTranspose2d: qnn.QuantConvTranspose2d,
    nn.ConvTranspose3d: qnn.QuantConvTranspose3d,
}


def can_quantize(layer: nn.Module) -> bool:
    """Whether `quantize_layer` knows this kind of layer (the exact class: subclasses may compute something else)."""
    return type(layer) is nn.Linear or type(layer) in _CONVS


def quantize_layer(layer: nn.Module, weight: IntegerQuantizer, act: IntegerQuantizer) -> nn.Module:
    """Brevitas layer that computes `layer` on quantized input and weight; it takes over the layer's parameters.

    Raises JpqError for a layer of another class.
    """
    grids = {
        "weight_quant": weight_injector(weight),
        "input_quant": act_injector(act, act.signed),
        "output_quant": NoActGrid,
        "bias_quant": NoBiasGrid,
    }
    if type(layer) is nn.Linear:
        new: Any = qnn.QuantLinear(
            layer.in_features, layer.out_features, layer.bias is not None, **grids, device="meta"
        )
    elif type(layer) in _CONVS:
        new = _CONVS[type(layer)](**_conv_arguments(layer), **grids, device="meta")
    else:
        raise JpqError(f"A {type(layer).__name__} cannot be quantized; exclude its layer or use Conv or Linear layers.")
    new.weight, new.bias = layer.weight, layer.bias
    new.weight_quant.skip_create_quant_tensor = True  # plain tensors between layers: the grid travels in the module
    new.input_quant.skip_create_quant_tensor = True
    return new.train(layer.training)


def plain_layer(layer: Any) -> nn.Module:
    """Float layer of the same sizes as a brevitas layer, without its quantizers and weights."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    kind: Any = next(plain for plain, quantized in _CONVS.items() if type(layer) is quantized)
    new: nn.Module = kind(**_conv_arguments(layer), device="meta")
    return new


def _conv_arguments(layer: Any) -> dict[str, Any]:
    """Constructor arguments of a convolution like `layer`, quantized or not, without device and quantizers."""
    arguments = {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": layer.kernel_size,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
        "bias": layer.bias is not None,
        "padding_mode": layer.padding_mode,
    }
    return {**arguments, "output_padding": layer.output_padding} if layer.transposed else arguments


def quantize_results(module: nn.Module, grid: IntegerQuantizer) -> None:
    """Round a module's result to `grid`, which becomes its child `results`."""
    results: Any = qnn.QuantIdentity(act_quant=act_injector(grid, grid.signed))
    results.input_quant = no_grid_proxy(results)
    results.act_quant.skip_create_quant_tensor = True
    module.results = results.train(module.training)
    module.register_forward_hook(_rounded)


def _rounded(module: Any, _: Any, out: Any) -> Any:
    return module.results(out)


def result_quantizer(module: Any) -> IntegerQuantizer | None:
    """Quantizer of a module's result; None where it has none."""
    results: Any = getattr(module, "results", None)
    return results.act_quant.fused_activation_quant_proxy.tensor_quant if type(results) is qnn.QuantIdentity else None


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` under every name that `old` has in `model`: a shared module stays shared."""
    for alias in [name for name, module in model.named_modules(remove_duplicate=False) if module is old]:
        owner, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(owner), leaf, new)


def replace_and_keep_rounding(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` under every name that `old` has in `model`, with its result rounded as that of `old` is."""
    grid = result_quantizer(old)
    if grid is not None:
        quantize_results(new, grid)
    replace_everywhere(model, old, new)


def is_quantized(layer: nn.Module) -> bool:
    """Whether a module is a brevitas layer: a part of a user's own may be called `weight_quant` as well."""
    return isinstance(layer, QuantWeightBiasInputOutputLayer)


def weight_quantizer(layer: Any) -> IntegerQuantizer:
    """Weight quantizer of a brevitas layer."""
    return layer.weight_quant.tensor_quant


def act_quantizer(layer: Any) -> IntegerQuantizer:
    """Input quantizer of a brevitas layer."""
    return layer.input_quant.fused_activation_quant_proxy.tensor_quant
