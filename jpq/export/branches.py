"""Dense branches of a convolution with learned filter groups: one convolution for each set of input channels.

The last step of dynamic structure pruning (arXiv:2303.09736): filters with the same mask form a branch, a dense
convolution on the channels that it reads; the outputs are joined and put back in order. The masked layer and its
branches compute the same.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jpq.methods.quantizers import (
    Fixed,
    IntegerQuantizer,
    act_quantizer,
    is_quantized,
    quantize_layer,
    replace_and_keep_rounding,
    weight_quantizer,
)
from jpq.types import JpqError

_CONVOLUTIONS: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}  # by dims of the weight


class Branches(nn.Module):
    """Dense convolutions on subsets of the input channels, side by side; their outputs in the order of the filters.

    Args:
        branches: (convolution, input channels that it reads, filters that it computes).
        bias: [outputs], of which the filters that read nothing take theirs; None where there are no such filters.
        outputs: number of all filters.
    """

    order: Tensor

    def __init__(self, branches: Sequence[tuple[nn.Module, list[int], list[int]]], bias: Tensor | None, outputs: int):
        super().__init__()
        self.convs: Any = nn.ModuleList(conv for conv, _, _ in branches)
        for i, (_, reads, _) in enumerate(branches):
            self.register_buffer(f"reads{i}", torch.tensor(reads))
        computed = [o for _, _, filters in branches for o in filters]
        constant = [o for o in range(outputs) if o not in set(computed)]
        place = {o: i for i, o in enumerate(computed + constant)}
        self.register_buffer("order", torch.tensor([place[o] for o in range(outputs)]))
        self.constant = None if bias is None else nn.Parameter(bias[constant].detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of all filters in their order."""
        parts = [conv(x.index_select(1, getattr(self, f"reads{i}"))) for i, conv in enumerate(self.convs)]
        if self.constant is not None:
            shape = [len(x), -1, *[1] * (x.dim() - 2)]
            constant = self.constant.expand(len(x), -1).reshape(shape)
            parts.append(constant.expand(-1, -1, *parts[0].shape[2:]))
        return torch.cat(parts, 1).index_select(1, self.order)


def split_into_branches(small: nn.Module) -> nn.Module:
    """A copy of a rebuilt model in which convolutions with whole kernels masked are replaced by dense branches.

    Layers without a mask stay, and layers that would get more branches than half their filters (few filters share a
    mask). Raises JpqError where no layer can be split.
    """
    small = copy.deepcopy(small)
    split_count = 0
    layer: Any
    for layer in list(small.modules()):
        mask = getattr(layer, "mask", None)
        if mask is None or mask.dim() not in _CONVOLUTIONS or layer.groups != 1 or layer.transposed:
            continue
        kernels = mask.flatten(2)
        if not torch.equal(kernels.any(2), kernels.all(2)):
            continue
        branches = _branches(layer, kernels.all(2))
        if branches is not None:
            replace_and_keep_rounding(small, layer, branches)
            split_count += 1
    if not split_count:
        raise JpqError("No layer can be cut into branches: train with --method dsp, or another on whole kernels.")
    return small


def restore_branches(small: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    """Replace a layer of a rebuilt model by branches of the form that a state dict holds, in place.

    Raises ValueError, KeyError or IndexError where the state dict holds no branches of that layer.
    """
    layer, order = small.get_submodule(name), state[f"{name}.order"].tolist()
    if sorted(order) != list(range(len(order))):
        raise ValueError(f"branches of '{name}' without an order")
    filters = sorted(range(len(order)), key=order.__getitem__)
    parts: list[tuple[nn.Module, list[int], list[int]]] = []
    start = 0
    while f"{name}.reads{len(parts)}" in state:
        reads = state[f"{name}.reads{len(parts)}"].tolist()
        computed = filters[start : start + len(state[f"{name}.convs.{len(parts)}.weight"])]
        parts.append((_branch(layer, reads, computed), reads, computed))
        start += len(computed)
    bias = torch.zeros(len(order)).to(layer.weight) if f"{name}.constant" in state else None  # type: ignore[arg-type]
    replace_and_keep_rounding(small, layer, Branches(parts, bias, len(order)))


def _branches(layer: Any, reads: Tensor) -> Branches | None:
    """The layer's branches; None where they are too many, or where nothing is dropped.

    `reads`: [filters, input channels], True where a filter reads a channel.
    """
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)  # input channels -> filters that read them
    for o, row in enumerate(reads):
        groups[tuple(row.nonzero()[:, 0].tolist())].append(o)
    empty = groups.pop((), [])
    if not groups or 2 * len(groups) > len(reads) or bool(reads.all()):
        return None
    parts = [(_branch(layer, list(channels), filters), list(channels), filters) for channels, filters in groups.items()]
    bias = None
    if empty:
        bias = layer.bias if layer.bias is not None else layer.weight.new_zeros(len(reads))
    return Branches(parts, bias, len(reads)).to(layer.weight.device)


@torch.no_grad()
def _branch(layer: Any, channels: list[int], filters: list[int]) -> nn.Module:
    """A dense convolution of some filters on some channels, on the same grids."""
    weight = layer.weight[filters][:, channels]
    conv: Any = _CONVOLUTIONS[weight.dim()](
        len(channels),
        len(filters),
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
    )
    conv.weight = nn.Parameter(weight.clone())
    if layer.bias is not None:
        conv.bias = nn.Parameter(layer.bias[filters].clone())
    if not is_quantized(layer):
        return conv.train(layer.training)
    weight_grid, act_grid = weight_quantizer(layer), act_quantizer(layer)
    ranges = weight_grid.log_threshold[filters] if weight_grid.log_threshold.dim() else weight_grid.log_threshold
    new_weight_grid = IntegerQuantizer(ranges.exp(), Fixed(round(float(weight_grid.width()))), True).to(weight)
    new_act_grid = IntegerQuantizer(
        act_grid.log_threshold.exp(), Fixed(round(float(act_grid.width()))), act_grid.signed
    ).to(weight)
    new_weight_grid.log_threshold.copy_(ranges)  # exp and log do not cancel to the last bit
    new_act_grid.log_threshold.copy_(act_grid.log_threshold)
    new_weight_grid.side.copy_(weight_grid.side[filters] if weight_grid.side.dim() else weight_grid.side)
    new_weight_grid.step.copy_(weight_grid.step[filters] if weight_grid.step.dim() else weight_grid.step)
    new_act_grid.step.copy_(act_grid.step)
    new_act_grid.power_of_two.copy_(act_grid.power_of_two)
    return quantize_layer(conv, new_weight_grid, new_act_grid).train(layer.training)
