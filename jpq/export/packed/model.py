"""`pack_model` and `unpack_model`: a rebuilt model as one bit-packed file, and back.

Integers are stored at their widths, masks in their smallest form, with one scale and one bias for each output channel.
A channel whose grid has its additional level above zero (2 at 2 bits) is stored mirrored, its integers and its scale
negative: the scale's sign is the one bit that says so.
BatchNorm is folded into these scales and biases first. What is left is stored as it is: layers and tables at 32 bits,
which `costs.size` counts; norms with no layer to fold into and ranges of activations, which it does not.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jpq.export.packed.batchnorm_folding import fold_batchnorms
from jpq.export.packed.file import PackedLayer, header_bytes, load_packed, packed_bytes, save_packed
from jpq.methods.quantizers import act_quantizer, is_quantized, replace_and_keep_rounding, weight_quantizer
from jpq.methods.quantizers.uniform_integer import NARROW_FROM
from jpq.methods.structures import WeightLayout, parse_structure
from jpq.plan import Plan
from jpq.types import JpqError

_LAYER_STATE = ("weight", "bias", "mask", "weight_quant", "input_quant")  # of a layer, stored in another form


@dataclass(frozen=True)
class PackedSize:
    """Bytes of a packed file."""

    total: int
    header: int  # bytes of names, shapes and checksums
    layers: int  # bytes as `costs.size` counts them: integers, masks, scales, biases, layers and tables at 32 bits
    others: int  # bytes of norms that could not be folded, buffers, ranges of activations


@torch.no_grad()
def pack_model(small: nn.Module, plan: Plan, example: Any, path: str | Path) -> PackedSize:
    """Write a rebuilt model as one packed file.

    Args:
        small: the rebuilt model.
        plan: its complete plan.
        example: a batch that it runs on, to find which norms can be folded.
        path: the file.

    Raises JpqError where the file cannot be written.
    """
    path = Path(path)
    folded = fold_batchnorms(small, example).cpu()
    layers: dict[str, PackedLayer] = {}
    scales_and_biases: dict[str, Tensor] = {}  # scales and biases
    unshared = {name for name, _ in (*folded.named_parameters(), *folded.named_buffers())}
    other_tensors = {name: tensor for name, tensor in folded.state_dict().items() if name in unshared}
    quantized, again = _quantized_layers(folded)
    for name, layer in quantized.items():
        layers[name] = _packed_layer(name, layer, plan)
        transposed = bool(getattr(layer, "transposed", False))
        outputs = layer.weight.shape[1] * layer.groups if transposed else len(layer.weight)
        scales_and_biases[f"{name}.scale"] = _signed_scale(layer).flatten().expand(outputs).float()
        scales_and_biases[f"{name}.bias"] = torch.zeros(outputs) if layer.bias is None else layer.bias.float()
        for key in [
            k for k in other_tensors if k.startswith(f"{name}.") and k[len(name) + 1 :].split(".")[0] in _LAYER_STATE
        ]:
            del other_tensors[key]
        other_tensors[f"{name}.range"] = act_quantizer(layer).threshold.float()
    for name, layer in again.items():
        for key in [k for k in other_tensors if k.startswith(f"{name}.")]:
            del other_tensors[key]
        if layer.bias is not None:
            other_tensors[f"{name}.bias"] = layer.bias.float()
    save_packed(path, layers, {**scales_and_biases, **other_tensors})
    counted = {**scales_and_biases, **_counted_tensors(folded, other_tensors)}
    total, header, promised = path.stat().st_size, header_bytes(path), packed_bytes(layers, counted)
    return PackedSize(total, header, promised, total - header - promised)


def _counted_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters among these tensors that `costs.size` counts: of two or more dims, and biases beside them."""
    parameters = {name for name, _ in model.named_parameters()} & tensors.keys()
    wide = {name for name in parameters if tensors[name].dim() > 1}
    owners = {name.rpartition(".")[0] for name in wide}
    biases = {name for name in parameters if name.endswith("bias") and name.rpartition(".")[0] in owners}
    return {name: tensors[name] for name in sorted(wide | biases)}


@torch.no_grad()
def unpack_model(small: nn.Module, path: str | Path) -> nn.Module:
    """A copy of a rebuilt model with the numbers packed in `path`: the same integers, folded norms removed.

    Args:
        small: as `jpq.export.rebuild.build_from_plan` makes it from the plan; its weights do not matter.
        path: the packed file.

    Raises JpqError for a file that is damaged, or that belongs to another model.
    """
    small, path = copy.deepcopy(small), Path(path)
    packed_layers, tensors = load_packed(path)
    layers, _ = _quantized_layers(small)
    if packed_layers.keys() != layers.keys():
        odd = sorted(packed_layers.keys() ^ layers.keys())
        raise JpqError(f"{path} holds another model: layers {', '.join(odd[:3])} are not in both.")
    for name, layer in layers.items():
        _fill_layer(name, layer, packed_layers[name].weight, tensors, path)
    for name, module in list(small.named_modules()):
        has_statistics = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        if has_statistics and f"{name}.running_mean" not in tensors:  # it was folded
            replace_and_keep_rounding(small, module, nn.Identity())
    places = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    for name, tensor in tensors.items():  # one by one: load_state_dict lets brevitas make the quantizers anew
        if name not in places or places[name].shape != tensor.shape:
            raise JpqError(f"{path} holds another model: '{name}' has no place in this one.")
        places[name].copy_(tensor)
    return small.eval()


def _quantized_layers(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Name -> quantized layer; and apart those that have the weight and quantizers of an earlier one."""
    first: dict[str, Any] = {}
    again: dict[str, Any] = {}
    weights = set[int]()
    for name, module in model.named_modules():
        if is_quantized(module):
            (again if id(module.weight) in weights else first)[name] = module
            weights.add(id(module.weight))
    return first, again


def _signed_scale(layer: Any) -> Tensor:
    """Steps of a layer's weight, shaped like its range; negative where the integers are stored mirrored."""
    grid = weight_quantizer(layer)
    low, high = grid.integers()
    scale = grid.scale().detach()
    return torch.where(high > -low, -scale, scale)


def _packed_layer(name: str, layer: Any, plan: Plan) -> PackedLayer:
    """A layer's integers, clipped to its grid, with its mask if it has one."""
    grid = weight_quantizer(layer)
    low, high = grid.integers()
    integers = (layer.weight / grid.scale().detach()).round().clamp(low, high)
    integers = torch.where(high > -low, -integers, integers).to(torch.int16)
    structure, kept = None, None
    if name in plan.masks:
        layout = WeightLayout(bool(getattr(layer, "transposed", False)), getattr(layer, "groups", 1))
        structure, kept = parse_structure(plan.structures[name], layout), plan.masks[name].units()
    return PackedLayer(integers, round(float(grid.width())), True, structure, kept)


def _fill_layer(name: str, layer: Any, integers: Tensor, tensors: dict[str, Tensor], path: Path) -> None:
    """Give a layer its stored weight, ranges and bias, which leave `tensors`."""
    grid = weight_quantizer(layer)
    if integers.shape != layer.weight.shape:
        sizes = f"{tuple(integers.shape)}, not {tuple(layer.weight.shape)}"
        raise JpqError(f"{path} holds another model: '{name}' is {sizes}.")
    scale = tensors.pop(f"{name}.scale")
    scale = scale[0] if grid.log_threshold.dim() == 0 else scale.reshape(grid.log_threshold.shape)
    layer.weight.copy_(integers * scale)
    bits = round(float(grid.width()))
    lowest = bits < NARROW_FROM and bool((integers == -(2 ** (bits - 1))).any())
    grid.side.copy_(torch.where(scale < 0, 1, -1) if lowest or bool((scale < 0).any()) else torch.zeros_like(scale))
    grid.fix_step(scale.abs())
    inputs = act_quantizer(layer)
    inputs.fix_step(tensors.pop(f"{name}.range") / inputs.largest_integer())
    layer.bias = nn.Parameter(tensors.pop(f"{name}.bias").to(layer.weight))
