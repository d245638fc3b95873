"""The .pt2 file: a rebuilt model in ATen operators alone, written by torch.export, which loads without jpq or brevitas.

Each quantizer becomes division, round, clamp and multiplication by its step; weights are stored as integers (int8 where
they fit) and multiplied by their steps when the model runs. The numbers are those of the rebuilt model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call
from torch.utils._pytree import tree_map

from jpq.export.program import free_sizes, is_free_size
from jpq.files.atomic import replace_file
from jpq.methods.quantizers import (
    act_quantizer,
    is_quantized,
    plain_layer,
    replace_everywhere,
    result_quantizer,
    weight_quantizer,
)
from jpq.methods.quantizers.uniform_integer import IntegerQuantizer
from jpq.tracing.forward import (
    batch_size,
    call_on_copies,
    first_samples,
    note_missing_batch_dims,
    plain_outputs,
    split_arguments,
)
from jpq.tracing.traced_lengths import traced_lengths
from jpq.types import JpqError

_FLOAT_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)

_HOOKS = [f"_forward{pre}_hooks{keywords}" for pre in ("", "_pre") for keywords in ("", "_with_kwargs")]


def export_pt2(small: nn.Module, example: Any, path: str | Path) -> None:
    """Write a rebuilt model as a torch.export archive with a dynamic batch dimension.

    Raises JpqError where torch.export cannot read the model.
    """
    _check_signature(small, split_arguments(example)[1])
    model = replace_quantizers(small)
    args, kwargs = split_arguments(tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, example))
    try:
        with plain_outputs(model), traced_lengths():
            program = _export_any_batch(model, args, kwargs)
        replace_file(path, lambda part: _save(program, part))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise JpqError(f"torch.export cannot write this model as .pt2 ({reason}). Choose the other forms.") from error


def _check_signature(model: nn.Module, keywords: Collection[str]) -> None:
    """Raise JpqError where `forward` takes keywords that it does not name: torch writes a file that does not run."""
    parameters = inspect.signature(model.forward).parameters
    unnamed = [name for name in keywords if name not in parameters]
    if unnamed:
        raise JpqError(
            f"The forward of {type(model).__name__} takes '{unnamed[0]}' by **keywords, and a .pt2 file of that cannot "
            "be run. Name it among its arguments, or choose the other forms."
        )


def _export_any_batch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """The program of a model for batches of any size, or of the sizes that its code allows; for one sample without.

    Raises JpqError where it allows that of the example alone.
    """
    size = batch_size((args, kwargs))
    batches = first_samples((args, kwargs), 2) if size == 1 else (args, kwargs)  # a dim of size 1 is a constant

    def export(dim: Any) -> ExportedProgram:
        shapes = free_sizes(model, args, kwargs, size, dim)
        return torch.export.export(model, *batches, dynamic_shapes=shapes, strict=False)

    layers = {n: m for n, m in model.named_modules() if isinstance(m, (*_FLOAT_LAYERS, StoredIntegerLayer))}
    with torch.no_grad(), note_missing_batch_dims(layers) as found:
        call_on_copies(model, args, kwargs)
    if any(not isinstance(x, nn.Parameter) for x in found.values()):
        return torch.export.export(model, args, kwargs, strict=False)
    try:
        return export(Dim("batch", min=1))
    except (RuntimeError, ValueError) as error:  # constraints that the code sets, as `assert len(x) < 1000` does
        program = export(Dim.AUTO)
        inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
        if not any(is_free_size(n) for v in inputs if isinstance(v, Tensor) for n in v.shape):
            raise JpqError(
                f"This model's code fixes the number of samples at {size}, so that no .pt2 file takes any other: a "
                "loop over samples, int(x.shape[0]) or the like. Replace it by x.shape[0] and operations on the whole "
                "batch, or choose the other forms."
            ) from error
    most = min(limits.upper for limits in program.range_constraints.values())
    if not most.is_number or most.is_infinite:
        return program
    try:
        return export(Dim("batch", min=1, max=int(most)))  # with one sample too, which AUTO leaves out
    except (RuntimeError, ValueError):
        return program


def _save(program: Any, part: Path) -> None:
    """Write a program to a file of any name: torch.export.save insists on an ending where it is given a path."""
    with part.open("wb") as file:
        torch.export.save(program, file)


@torch.no_grad()
def replace_quantizers(small: nn.Module) -> nn.Module:
    """A copy of a rebuilt model in plain torch modules instead of brevitas', on the CPU and in evaluation mode."""
    model = copy.deepcopy(small).cpu().eval()
    for module in list(model.modules()):
        grid = result_quantizer(module)
        if grid is not None:
            module.results = Rounding(grid)
    for layer in [m for m in model.modules() if is_quantized(m)]:
        replacement = StoredIntegerLayer(layer)
        for name in ("select", "results"):
            if name in dict(layer.named_children()):
                setattr(replacement, name, getattr(layer, name))
        for hooks in _HOOKS:
            setattr(replacement, hooks, getattr(layer, hooks))
        replace_everywhere(model, layer, replacement)
    return model.eval()


class Rounding(nn.Module):
    """Rounding to a quantizer's grid in plain operators."""

    step: Tensor

    def __init__(self, grid: IntegerQuantizer):
        super().__init__()
        self.register_buffer("step", grid.scale().detach().clone())
        self.low, self.high = (float(end) for end in grid.integers())

    def forward(self, x: Tensor) -> Tensor:
        """Rounded x, of the same shape."""
        return torch.div(x, self.step).round().clamp(self.low, self.high) * self.step


class StoredIntegerLayer(nn.Module):
    """A Conv or Linear layer on a rounded input, with its weight stored as integers and steps."""

    integers: Tensor
    steps: Tensor

    def __init__(self, layer: Any):
        super().__init__()
        grid = weight_quantizer(layer)
        low, high = grid.integers()
        dtype = torch.int8 if float(grid.largest_integer().max()) < 2**7 else torch.int32
        steps = grid.scale().detach().clone()
        self.register_buffer("integers", torch.div(layer.weight.detach(), steps).round().clamp(low, high).to(dtype))
        self.register_buffer("steps", steps)
        self.bias = layer.bias
        self.grid = Rounding(act_quantizer(layer))
        self._layer = [plain_layer(layer)]  # in a list, so that its weights are not parameters of this module
        weight = layer.weight.detach()
        self._unrounded = [] if torch.equal(self._rounded(), weight) else [weight]  # in a file only where code reads it

    def __getattr__(self, name: str) -> Any:
        """Sizes and options of the layer, such as `out_features`, which models' code may read."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_layer" not in self.__dict__:
                raise
            return getattr(self._layer[0], name)

    @property
    def weight(self) -> Tensor:
        """The weight as other code reads it: not rounded where the layer's is not on its grid yet."""
        return self._unrounded[0] if self._unrounded else self._rounded()

    def _rounded(self) -> Tensor:
        """Integers times steps."""
        return self.integers.to(self.steps.dtype) * self.steps

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output; other arguments are the layer's own, such as the `output_size` of a transposed one."""
        parameters = {"weight": self._rounded()}
        if self.bias is not None:
            parameters["bias"] = self.bias
        output: Tensor = functional_call(self._layer[0], parameters, (self.grid(input), *args), kwargs)
        return output
