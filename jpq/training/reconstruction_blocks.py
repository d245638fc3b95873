"""The blocks whose outputs a reconstruction matches: the model's own residual blocks, and single layers outside them.

A residual block is a module that adds two tensors of one shape, both computed from the input, while it runs; modules of
its class are taken as blocks too (a stage's first block may have no addition). Of nested ones the outermost counts, as
long as it has at most `MOST_LAYERS` layers and is not the whole model (blocks as in BRECQ, arXiv:2102.05426, section
3.2). A block is called once, and takes and gives tensors whose dim 0 is the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from jpq.tracing.forward import batch_size, call_model, eval_mode

MOST_LAYERS = 16  # layers of a block: a larger module is divided

ADDITIONS = ("add", "add_", "__add__", "__iadd__", "__radd__")  # names of torch's functions that add


@dataclass(frozen=True)
class Block:
    """A part of the model: the module's name, and the names of the layers in it, in the order of their first calls."""

    name: str
    layers: tuple[str, ...]


@dataclass
class _Calls:
    """What one forward pass shows about each module, by name."""

    order: list[str] = field(default_factory=list)  # names, in the order of their first calls
    counts: Counter[str] = field(default_factory=Counter)
    adds: set[str] = field(default_factory=set)  # modules that add computed tensors themselves
    whole: set[str] = field(default_factory=set)  # modules that take and give tensors with one row per sample
    running: list[str] = field(default_factory=list)  # modules that run now, the innermost last


class _AdditionMode(TorchFunctionMode):
    """Notes which module adds two tensors of one shape, neither of them a parameter."""

    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note an addition, and call the function."""
        if self.calls.running and getattr(func, "__name__", "") in ADDITIONS:
            shapes = [a.shape for a in args[:2] if isinstance(a, Tensor) and not isinstance(a, nn.Parameter)]
            if len(shapes) == 2 and shapes[0] == shapes[1] and len(shapes[0]) > 1:
                self.calls.adds.add(self.calls.running[-1])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def find_blocks(model: nn.Module, layers: Collection[str], batch: Any) -> tuple[Block, ...]:
    """The blocks of a model that together hold these layers, in the order of their first calls.

    Args:
        model: float or attached; both have the same names.
        layers: names of the quantized layers.
        batch: inputs of at least two samples.

    A layer that is called several times, or on other than one row per sample, is in no block.
    """
    with eval_mode(model), _watch_calls(model, batch_size(batch)) as calls:
        call_model(model, batch)
    modules = dict(model.named_modules())
    classes = {type(modules[name]) for name in calls.adds if name}
    found: list[Block] = []
    for name in calls.order:
        inside = [n for n in calls.order if n in layers and (n == name or n.startswith(f"{name}."))] if name else []
        if not inside or any(n in block.layers for block in found for n in inside):
            continue
        whole = name in calls.whole and calls.counts[name] == 1
        once = all(calls.counts[n] == 1 for n in inside)
        is_block = type(modules[name]) in classes and len(inside) <= MOST_LAYERS
        if whole and once and (is_block or name in layers):
            found.append(Block(name, tuple(inside)))
    return tuple(found)


@contextmanager
def _watch_calls(model: nn.Module, samples: int) -> Iterator[_Calls]:
    """A context in which the model's calls are noted."""
    calls, handles = _Calls(), []

    def before(name: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.running.append(name)
            calls.counts[name] += 1
            if calls.counts[name] == 1:
                calls.order.append(name)

        return enter

    def after(name: str) -> Any:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.running.pop()
            if has_rows(args, samples) and not _tensors(kwargs) and has_rows((output,), samples):
                calls.whole.add(name)

        return leave

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name), with_kwargs=True))
    try:
        with _AdditionMode(calls):
            yield calls
    finally:
        for handle in handles:
            handle.remove()


def has_rows(args: Sequence[Any], samples: int) -> bool:
    """Whether these arguments hold tensors, none of them in a nest, and each has one row per sample."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    nested = [a for a in args if isinstance(a, (tuple, list, dict))]
    return bool(tensors) and not nested and all(t.dim() > 0 and len(t) == samples for t in tensors)


def _tensors(kwargs: Mapping[str, Any]) -> list[Any]:
    """The keyword arguments that are, or may hold, tensors."""
    return [value for value in kwargs.values() if isinstance(value, (Tensor, tuple, list, dict))]
