"""A convolution whose filters read different input channels, as dense branches: one for each set of channels.

The end of dynamic structure pruning (arXiv:2303.09736): filters with the same mask form a branch, a dense convolution
on the channels that it reads; the outputs are joined and put back in order. It computes what the masked layer does.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jpq.methods.quantizers import (
    Fixed,
    IntegerQuantizer,
    act_quantizer,
    quantize_layer,
    replace_everywhere,
    weight_quantizer,
)
from jpq.types import JpqError

_PLAIN: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class Branches(nn.Module):
    """Dense convolutions on subsets of the input channels, side by side.

    Args:
        branches: (convolution, input channels that it reads, filters that it makes).
        bias: of the filters that read nothing, `[outputs]`; None where there are none.
        outputs: how many filters in all.
    """

    order: Tensor

    def __init__(self, branches: Sequence[tuple[nn.Module, list[int], list[int]]], bias: Tensor | None, outputs: int):
        super().__init__()
        self.convs: Any = nn.ModuleList(conv for conv, _, _ in branches)
        for i, (_, reads, _) in enumerate(branches):
            self.register_buffer(f"reads{i}", torch.tensor(reads))
        made = [o for _, _, makes in branches for o in makes]
        rest = [o for o in range(outputs) if o not in set(made)]
        place = {o: i for i, o in enumerate(made + rest)}
        self.register_buffer("order", torch.tensor([place[o] for o in range(outputs)]))
        self.constant = None if bias is None else nn.Parameter(bias[rest].detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of all filters in their order."""
        parts = [conv(x.index_select(1, getattr(self, f"reads{i}"))) for i, conv in enumerate(self.convs)]
        if self.constant is not None:
            shape = [len(x), -1, *[1] * (x.dim() - 2)]
            constant = self.constant.expand(len(x), -1).reshape(shape)
            parts.append(constant.expand(-1, -1, *parts[0].shape[2:]))
        return torch.cat(parts, 1).index_select(1, self.order)


def branched(small: nn.Module) -> nn.Module:
    """A copy of a rebuilt model whose convolutions with whole kernels masked are dense branches instead.

    Left as they are: layers without a mask, and those whose branches would be more than half their filters (masks that
    no group shares). Raises JpqError where no layer can be cut.
    """
    small = copy.deepcopy(small)
    cut = 0
    for name, layer in list(small.named_modules()):
        mask = getattr(layer, "mask", None)
        if mask is None or mask.dim() not in _PLAIN or layer.groups != 1 or layer.transposed:
            continue
        kernels = mask.flatten(2)
        if not torch.equal(kernels.any(2), kernels.all(2)):
            continue
        new = _branches(layer, kernels.all(2))
        if new is not None:
            replace_everywhere(small, small.get_submodule(name), new)
            cut += 1
    if not cut:
        raise JpqError("No layer can be cut into branches: train with --method dsp, or another on whole kernels.")
    return small


def _branches(layer: Any, reads: Tensor) -> Branches | None:
    """The layer's branches; None where they are too many, or where nothing is dropped."""
    sets: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for o, row in enumerate(reads):
        sets[tuple(row.nonzero()[:, 0].tolist())].append(o)
    empty = sets.pop((), [])
    if not sets or 2 * len(sets) > len(reads) or bool(reads.all()):
        return None
    parts = [(_branch(layer, list(channels), makes), list(channels), makes) for channels, makes in sets.items()]
    bias = None
    if empty:
        bias = layer.bias if layer.bias is not None else layer.weight.new_zeros(len(reads))
    return Branches(parts, bias, len(reads)).to(layer.weight.device)


@torch.no_grad()
def _branch(layer: Any, channels: list[int], makes: list[int]) -> nn.Module:
    """A dense convolution of some filters on some channels, on the same grids."""
    weight = layer.weight[makes][:, channels]
    conv: Any = _PLAIN[weight.dim()](
        len(channels),
        len(makes),
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
    )
    conv.weight = nn.Parameter(weight.clone())
    if layer.bias is not None:
        conv.bias = nn.Parameter(layer.bias[makes].clone())
    if not hasattr(layer, "weight_quant"):
        return conv.train(layer.training)
    w, a = weight_quantizer(layer), act_quantizer(layer)
    ranges = w.log_threshold[makes] if w.log_threshold.dim() else w.log_threshold
    new_w = IntegerQuantizer(ranges.exp(), Fixed(round(float(w.width()))), True).to(weight)
    new_a = IntegerQuantizer(a.log_threshold.exp(), Fixed(round(float(a.width()))), a.signed).to(weight)
    new_w.log_threshold.copy_(ranges)  # exp and log do not cancel to the last bit
    new_a.log_threshold.copy_(a.log_threshold)
    return quantize_layer(conv, new_w, new_a).train(layer.training)
