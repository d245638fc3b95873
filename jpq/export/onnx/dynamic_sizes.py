"""Files that take images of any height and width: written where the file computes another size as the model does.

A fully convolutional network needs no fixed size, and torch.onnx then writes none. Whether that is so is not read off
the code but tried: the file is run on an image of another size and compared with the model. A network that has its
size in it (a Linear layer over all pixels, sizes that Python computed while it was traced) fails, and its file takes
the example's size alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from jpq.export.onnx.free_batch import SAME, mean_difference
from jpq.export.runtimes import Session
from jpq.tracing.forward import call_model, collect_tensors, eval_mode

LARGER = (32, 64)  # pixels that the other image has more, in height and width: multiples of most strides

Axes = dict[str, dict[int, str]]


def add_sides(axes: Axes, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Axes:
    """Names of free dims, with height and width of images [B, C, H, W] among them.

    Args:
        axes: names of the free dims of each tensor.
        inputs, outputs: the example's tensors by name.
    """
    sides = {name: {**entry} for name, entry in axes.items()}
    sizes = {tuple(x.shape[2:]) for x in inputs.values() if x.dim() == 4}
    for name, tensor in {**inputs, **outputs}.items():
        if tensor.dim() == 4:
            prefix = "" if name in inputs or tuple(tensor.shape[2:]) in sizes else "output_"
            sides.setdefault(name, {}).update({2: f"{prefix}height", 3: f"{prefix}width"})
    return sides


def is_image(example: Any) -> bool:
    """Whether a batch is one tensor of images, [B, C, H, W]."""
    return isinstance(example, Tensor) and example.dim() == 4


@torch.no_grad()
def computes_other_size(path: Path, model: nn.Module, images: Tensor) -> bool:
    """Whether a file computes an image of another size as the model does, with the same size of output.

    Args:
        path: the ONNX file; model: what it was written from.
        images: [B, C, H, W], of which the first is repeated to a larger one.
    """
    height, width = (side + more for side, more in zip(images.shape[2:], LARGER, strict=True))
    times = (1, 1, -(-height // images.shape[2]), -(-width // images.shape[3]))
    other = images[:1].repeat(times)[:, :, :height, :width].contiguous()
    try:
        with eval_mode(model):
            expected = collect_tensors(call_model(model, other))
        found = collect_tensors(Session(path, optimised=False)(other))
    except Exception:  # the model, the exporter's shapes or the runtime refuse it, each in its own way
        return False
    return [t.shape for t in expected] == [t.shape for t in found] and mean_difference(expected, found) <= SAME


def takes_any_size(path: str | Path) -> bool:
    """Whether height and width of a file's first input are free."""
    inputs: Sequence[Any] = onnx.load(str(path), load_external_data=False).graph.input
    dims = inputs[0].type.tensor_type.shape.dim if inputs else ()
    return len(dims) == 4 and all(dim.dim_param for dim in dims[2:])
