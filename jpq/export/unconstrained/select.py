"""`Select`: a part of a tensor's channels, read as a view where they lie side by side and as a copy elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from jpq.export.unconstrained.channel_order import is_contiguous
from jpq.tracing.forward import call_model, eval_mode, hook_modules
from jpq.types import JpqError


class Select(nn.Module):
    """A module that gives ascending positions of one dim: by `narrow` where they leave no gap, else by `index_select`.

    Args:
        index: the positions.
        dim: the dim.
        always_gather: copy in any case (the baseline that a chosen order is compared with).
    """

    index: Tensor | None

    def __init__(self, index: Sequence[int], dim: int, always_gather: bool = False):
        super().__init__()
        self.dim, self.start, self.length = dim, index[0], len(index)
        self.runs = 1 + sum(b != a + 1 for a, b in pairwise(index))
        copy = always_gather or not is_contiguous(index)
        self.register_buffer("index", torch.tensor(index, dtype=torch.long) if copy else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The selected channels."""
        if self.index is None:
            return x.narrow(self.dim, self.start, self.length)
        return x.index_select(self.dim, self.index)

    def extra_repr(self) -> str:
        """The positions, for `print(model)`."""
        gap_free = self.index is None
        positions = f"{self.start}:{self.start + self.length}" if gap_free else f"{self.length} in {self.runs} runs"
        return f"{positions}, dim={self.dim}"


def insert_selects(model: nn.Module, selects: Mapping[str, Sequence[int]], always_gather: bool = False) -> nn.Module:
    """Let each named Conv or Linear layer of `model` read a selection of its input channels, in place.

    The Select becomes the layer's child `select` and runs before its forward: the layer keeps its name and its class.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for name, index in selects.items():
        layer = modules.get(name)
        if layer is None or not len(index):
            raise JpqError(
                f"The plan selects {len(index)} inputs for layer '{name}', which the model cannot do. Load "
                "the plan into the model that it was made from."
            )
        dim = -1 if layer.weight.dim() == 2 else 1 - layer.weight.dim()
        layer.select = Select(index, dim, always_gather).to(layer.weight.device)
        layer.register_forward_pre_hook(_select_input, with_kwargs=True)
    return model


def _select_input(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer with its input, the first one or a keyword, selected."""
    if args:
        return (layer.select(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": layer.select(kwargs["input"])}


@dataclass(frozen=True)
class CopyCounts:
    """Numbers of selections in a model, and of channels and bytes that they copy."""

    views: int = 0  # selections without a copy
    gathers: int = 0  # selections that copy
    runs: int = 0  # contiguous runs that gathers read
    channels: int = 0  # channels that gathers copy
    size_bytes: int = 0  # bytes that gathers write for one batch

    def to_dict(self) -> dict[str, int]:
        """As plain data."""
        return asdict(self)


@torch.no_grad()
def count_copies(model: nn.Module, example: Any) -> CopyCounts:
    """Count the copies of a small model by running it on a batch (a tensor, a tuple of arguments, or a dict)."""
    size = 0

    def count(_: str, __: nn.Module, ___: Any, output: Tensor) -> None:
        nonlocal size
        size += output.numel() * output.element_size()

    selects = {n: m for n, m in model.named_modules() if isinstance(m, Select)}
    gathers = {n: s for n, s in selects.items() if s.index is not None}
    with eval_mode(model), hook_modules(gathers, count):
        call_model(model, example)
    runs, channels = sum(s.runs for s in gathers.values()), sum(s.length for s in gathers.values())
    return CopyCounts(len(selects) - len(gathers), len(gathers), runs, channels, size)
