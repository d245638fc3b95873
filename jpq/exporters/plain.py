"""A rebuilt model in ATen operators alone: what torch.export can hold, and what loads where jpq is not.

Each quantizer becomes division, round, clamp, multiplication by its step; weights are stored as integers (int8 where
they fit) and multiplied by their steps when the model runs. The same numbers as in the rebuilt model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from jpq.quantizers import act_quantizer, plain_layer, replace_everywhere, result_quantizer, weight_quantizer
from jpq.quantizers.integer import Integer, levels


class Rounded(nn.Module):
    """x on the grid of `grid`."""

    step: Tensor

    def __init__(self, grid: Integer):
        super().__init__()
        self.register_buffer("step", grid.scale().detach().clone())
        self.top = float(levels(grid.width(), grid.signed))
        self.low = -self.top if grid.signed else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Rounded x."""
        return torch.div(x, self.step).round().clamp(self.low, self.top) * self.step


class Stored(nn.Module):
    """A Conv or Linear layer on a rounded input, its weight kept as integers and steps."""

    integers: Tensor
    steps: Tensor

    def __init__(self, layer: Any):
        super().__init__()
        grid = weight_quantizer(layer)
        top = float(levels(grid.width(), True))
        kind = torch.int8 if top < 2**7 else torch.int32
        steps = grid.scale().detach().clone()
        self.register_buffer("integers", torch.div(layer.weight.detach(), steps).round().clamp(-top, top).to(kind))
        self.register_buffer("steps", steps)
        self.bias = layer.bias
        self.grid = Rounded(act_quantizer(layer))
        self._layer = [plain_layer(layer)]  # in a list: it has no weights of its own

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        own = {"weight": self.integers.to(self.steps.dtype) * self.steps}
        if self.bias is not None:
            own["bias"] = self.bias
        out: Tensor = functional_call(self._layer[0], own, (self.grid(x),))
        return out


@torch.no_grad()
def plain(small: nn.Module) -> nn.Module:
    """A copy of a rebuilt model without brevitas, in evaluation mode."""
    model = copy.deepcopy(small).cpu().eval()
    for module in list(model.modules()):
        grid = result_quantizer(module)
        if grid is not None:
            module.results = Rounded(grid)
    for module in [m for m in model.modules() if hasattr(m, "weight_quant")]:
        stored = Stored(module)
        for name in ("select", "results"):
            if name in dict(module.named_children()):
                setattr(stored, name, getattr(module, name))
        stored._forward_pre_hooks, stored._forward_hooks = module._forward_pre_hooks, module._forward_hooks
        replace_everywhere(model, module, stored)
    return model.eval()
