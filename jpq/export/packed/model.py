"""A rebuilt model as one packed file: integers at their widths, masks, one scale and one bias for each output channel.

A normalisation that reads a layer, and that nothing else reads, is folded into the layer's scale and bias first; the
integers stay as they are (a negative factor turns their signs). What is left (norms with no layer to fold into, layers
that stay in floating point, ranges of activations) is stored as it is: `costs.size` does not count it.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jpq.export.packed.file import Packed, header_bytes, load_packed, packed_bytes, save_packed
from jpq.export.verify import EXACT, difference
from jpq.methods.quantizers import (
    act_quantizer,
    quantize_results,
    replace_everywhere,
    result_quantizer,
    weight_quantizer,
)
from jpq.methods.quantizers.uniform_integer import levels
from jpq.methods.structures import WeightLayout, parse
from jpq.plan import Plan
from jpq.tracing.forward import call_model, hook_modules
from jpq.types import JpqError

NAME = "model.packed"

Pair = tuple[str, str]  # (layer, the norm that reads it)

_OWN = ("weight", "bias", "mask", "weight_quant", "input_quant")


@dataclass(frozen=True)
class PackedSize:
    """Bytes of a packed file."""

    total: int
    header: int  # names, shapes, checksums
    layers: int  # what `costs.size` counts: integers, masks, scales, biases; each stream in whole bytes
    others: int  # norms that could not be folded, layers in floating point, ranges of activations


@torch.no_grad()
def pack(small: nn.Module, plan: Plan, example: Any, path: Path) -> PackedSize:
    """Write a rebuilt model to `path`; `example` is a batch that it runs on, to find which norms can be folded.

    Raises JpqError where the file cannot be written.
    """
    flat = fold_batchnorms(small, example).cpu()
    layers: dict[str, Packed] = {}
    own: dict[str, Tensor] = {}
    once = {name for name, _ in (*flat.named_parameters(), *flat.named_buffers())}  # not what is shared again
    others = {name: tensor for name, tensor in flat.state_dict().items() if name in once}
    for name, layer in _quantized(flat).items():
        grid, transposed = weight_quantizer(layer), bool(getattr(layer, "transposed", False))
        scale = grid.scale().detach()
        top = float(levels(grid.width(), True))
        integers = (layer.weight / scale).round().clamp(-top, top).to(torch.int16)
        structure, kept = None, None
        if name in plan.masks:
            structure = parse(plan.structures[name], WeightLayout(transposed, getattr(layer, "groups", 1)))
            kept = plan.masks[name].units()
        layers[name] = Packed(integers, round(float(grid.width())), True, structure, kept)
        outputs = layer.weight.shape[1] * layer.groups if transposed else len(layer.weight)
        own[f"{name}.scale"] = scale.flatten().expand(outputs).float()
        own[f"{name}.bias"] = torch.zeros(outputs) if layer.bias is None else layer.bias.float()
        for key in [k for k in others if k.startswith(f"{name}.") and k[len(name) + 1 :].split(".")[0] in _OWN]:
            del others[key]
        others[f"{name}.range"] = act_quantizer(layer).threshold.float()
    save_packed(path, layers, {**own, **others})
    total, header, counted = path.stat().st_size, header_bytes(path), packed_bytes(layers, own)
    return PackedSize(total, header, counted, total - header - counted)


@torch.no_grad()
def unpack(small: nn.Module, path: Path) -> nn.Module:
    """A copy of a rebuilt model with what is packed in `path`: the same integers, folded norms gone.

    Args:
        small: as `jpq.export.rebuild.build` makes it from the plan; its weights do not matter.

    Raises JpqError for a file that is damaged, or that belongs to another model.
    """
    small = copy.deepcopy(small)
    layers, tensors = load_packed(path)
    found = _quantized(small)
    if layers.keys() != found.keys():
        odd = sorted(layers.keys() ^ found.keys())
        raise JpqError(f"{path} holds another model: layers {', '.join(odd[:3])} are not in both.")
    for name, layer in found.items():
        grid, weight = weight_quantizer(layer), layers[name].weight
        if weight.shape != layer.weight.shape:
            sizes = f"{tuple(weight.shape)}, not {tuple(layer.weight.shape)}"
            raise JpqError(f"{path} holds another model: '{name}' is {sizes}.")
        scale = tensors.pop(f"{name}.scale")
        scale = scale[0] if grid.log_threshold.dim() == 0 else scale.reshape(grid.log_threshold.shape)
        layer.weight.copy_(weight * scale)
        grid.log_threshold.copy_((scale.double() * levels(grid.width(), True)).log())
        act_quantizer(layer).log_threshold.copy_(tensors.pop(f"{name}.range").double().log())
        layer.bias = nn.Parameter(tensors.pop(f"{name}.bias").to(layer.weight))
    for name, module in list(small.named_modules()):
        known = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        if known and f"{name}.running_mean" not in tensors:  # it was folded
            replace_everywhere(small, module, _nothing(module))
    places = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    for name, tensor in tensors.items():  # one by one: load_state_dict lets brevitas make the quantizers anew
        if name not in places or places[name].shape != tensor.shape:
            raise JpqError(f"{path} holds another model: '{name}' has no place in this one.")
        places[name].copy_(tensor)
    return small.eval()


def fold_batchnorms(small: nn.Module, example: Any) -> nn.Module:
    """A copy that computes the same, with norms folded into the layers that they read wherever that is possible."""
    small = copy.deepcopy(small).eval()
    pairs = _pairs(small, example)
    flat = _fold(small, pairs)
    if pairs and difference(small, flat, example) > EXACT:  # something else reads a layer: find out which
        flat = _fold(small, [p for p in pairs if difference(small, _fold(small, [p]), example) <= EXACT])
    return flat


def _quantized(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "weight_quant")}


@torch.no_grad()
def _pairs(model: nn.Module, example: Any) -> list[Pair]:
    """Layers and the norms that read exactly what they make, each called once."""
    made: dict[int, str] = {}
    keep: list[Tensor] = []  # so that no address is used twice
    calls: Counter[str] = Counter()
    outputs: dict[str, int] = {}
    pairs: list[Pair] = []
    modules: dict[str, nn.Module] = {}

    def pair(name: str, module: Any, x: Any, out: Any) -> None:
        calls[name] += 1
        if name in outputs:
            made[id(out)] = name
            keep.append(out)
        elif id(x) in made and module.running_mean is not None and module.num_features == outputs[made[id(x)]]:
            pairs.append((made[id(x)], name))

    for name, m in model.named_modules():
        if hasattr(m, "weight_quant") and weight_quantizer(m).log_threshold.dim() > 0:
            outputs[name], modules[name] = len(m.weight), m
        elif isinstance(m, nn.modules.batchnorm._BatchNorm):
            modules[name] = m
    with hook_modules(modules, pair):
        call_model(model, example)
    return [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1]


@torch.no_grad()
def _fold(model: nn.Module, pairs: list[Pair]) -> nn.Module:
    """A copy in which each pair is one layer."""
    model = copy.deepcopy(model)
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
        grid.log_threshold.add_(factor.abs().log().reshape(shape))
        layer.bias = nn.Parameter(bias)
        replace_everywhere(model, norm, _nothing(norm))
    return model


def _nothing(norm: nn.Module) -> nn.Module:
    """What stays of a norm that was folded: the rounding of its result, where it has that."""
    left, grid = nn.Identity(), result_quantizer(norm)
    if grid is not None:
        quantize_results(left, grid)
    return left
