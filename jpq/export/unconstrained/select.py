"""Reading a part of the channels: a view where they lie side by side, a copy where they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from jpq.export.unconstrained.channel_order import contiguous
from jpq.tracing.forward import call_model, eval_mode, hook_modules
from jpq.types import JpqError


class Select(nn.Module):
    """`x` at ascending positions `index` of dim `dim`: `narrow` where they leave no gap, else `index_select`.

    `always_gather` copies in any case (the baseline that a chosen order is compared with).
    """

    index: Tensor | None

    def __init__(self, index: Sequence[int], dim: int, always_gather: bool = False):
        super().__init__()
        self.dim, self.start, self.length = dim, index[0], len(index)
        self.runs = 1 + sum(b != a + 1 for a, b in pairwise(index))
        copy = always_gather or not contiguous(index)
        self.register_buffer("index", torch.tensor(index, dtype=torch.long) if copy else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The selected channels."""
        if self.index is None:
            return x.narrow(self.dim, self.start, self.length)
        return x.index_select(self.dim, self.index)

    def extra_repr(self) -> str:
        """What it reads, for `print(model)`."""
        what = (
            f"{self.start}:{self.start + self.length}" if self.index is None else f"{self.length} in {self.runs} runs"
        )
        return f"{what}, dim={self.dim}"


def insert(model: nn.Module, selects: Mapping[str, Sequence[int]], always_gather: bool = False) -> nn.Module:
    """Let each named Conv or Linear layer of `model` read a selection, in place.

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
        layer.register_forward_pre_hook(_selected)
    return model


def _selected(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.select(args[0]), *args[1:])


@dataclass(frozen=True)
class Copies:
    """What a model spends on reading parts of tensors."""

    views: int = 0  # selections that cost nothing
    gathers: int = 0  # selections that copy
    runs: int = 0  # contiguous runs that gathers read
    channels: int = 0  # that gathers copy
    size_bytes: int = 0  # that gathers write, for the batch that was given

    def to_dict(self) -> dict[str, int]:
        """As plain data."""
        return asdict(self)


@torch.no_grad()
def copies(model: nn.Module, example: Any) -> Copies:
    """Counted by running an exported model on a batch (a tensor, a tuple of arguments, or a dict of keywords)."""
    size = 0

    def count(_: str, __: nn.Module, ___: Any, out: Tensor) -> None:
        nonlocal size
        size += out.numel() * out.element_size()

    selects = {n: m for n, m in model.named_modules() if isinstance(m, Select)}
    gathers = {n: s for n, s in selects.items() if s.index is not None}
    with eval_mode(model), hook_modules(gathers, count):
        call_model(model, example)
    runs, channels = sum(s.runs for s in gathers.values()), sum(s.length for s in gathers.values())
    return Copies(len(selects) - len(gathers), len(gathers), runs, channels, size)
