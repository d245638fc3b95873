"""A rebuilt model in ATen operators alone: what torch.export can hold, and what loads where jpq is not.

Each quantizer becomes division, round, clamp, multiplication by its step; weights are stored as integers (int8 where
they fit) and multiplied by their steps when the model runs. The same numbers as in the rebuilt model.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call
from torch.utils._pytree import tree_map

from jpq.files.atomic import replace_file
from jpq.methods.quantizers import act_quantizer, plain_layer, replace_everywhere, result_quantizer, weight_quantizer
from jpq.methods.quantizers.uniform_integer import IntegerQuantizer, levels
from jpq.tracing.forward import arguments, batch_of
from jpq.types import JpqError


def export_pt2(small: nn.Module, example: Any, path: Path) -> None:
    """A rebuilt model as torch.export's archive, with a dynamic batch; it loads where jpq and brevitas are not.

    Raises JpqError where torch.export cannot read the model.
    """
    model = plain(small)
    args, kwargs = arguments(tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, example))
    size = batch_of((args, kwargs))
    free = Dim("batch", min=1)
    shapes = tree_map(
        lambda v: {0: free} if isinstance(v, Tensor) and v.dim() and len(v) == size else None, (args, kwargs)
    )
    if size == 1:  # torch.export takes a side of 1 for a constant
        args, kwargs = tree_map(lambda v: torch.cat([v, v]) if isinstance(v, Tensor) and v.dim() else v, (args, kwargs))
    try:
        program = torch.export.export(
            model, args, kwargs, dynamic_shapes=(*shapes[0], *shapes[1].values()), strict=False
        )
        replace_file(path, lambda part: _save(program, part))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise JpqError(f"torch.export cannot write this model as .pt2 ({reason}). Choose the other forms.") from error


def _save(program: Any, part: Path) -> None:
    with part.open("wb") as file:  # by name it insists on an ending
        torch.export.save(program, file)


class Rounded(nn.Module):
    """x on the grid of `grid`."""

    step: Tensor

    def __init__(self, grid: IntegerQuantizer):
        super().__init__()
        self.register_buffer("step", grid.scale().detach().clone())
        self.top = float(levels(grid.width(), grid.signed))
        self.low = -self.top if grid.signed else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Rounded x."""
        return torch.div(x, self.step).round().clamp(self.low, self.top) * self.step


class StoredWeight(nn.Module):
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
        stored = StoredWeight(module)
        for name in ("select", "results"):
            if name in dict(module.named_children()):
                setattr(stored, name, getattr(module, name))
        stored._forward_pre_hooks, stored._forward_hooks = module._forward_pre_hooks, module._forward_hooks
        replace_everywhere(model, module, stored)
    return model.eval()
