"""Sizes that a model's code names in its own torch calls, rewritten to the number of channels that were kept.

In `q.reshape(B, N, C)` the code takes C from another tensor, or from an attribute; where channels go, that number is
wrong. A size is recorded under a name that says which call it is and what becomes of each of its numbers:

    blocks.0.attn@reshape:1[*, *, n]       the second reshape of blocks.0.attn; the last size counts channels
    blocks.0.attn@reshape:0[*, *, 3, n, 64]   the fourth size counts; 3 and 64 are held at these numbers
    mixer@split:0[16, n]                   of two parts the second counts channels, the first has 16

The name stands in `Network.attributes` beside the counting attributes of modules, with the labels that are counted,
and in `Plan.slices`, with the kept indices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from jpq.tracing.channel_labels import unique_labels
from jpq.tracing.own_calls import OwnCall, own_call_actions, replace_calls
from jpq.types import NONE, JpqError, Labels

COUNT = "n"  # the number of kept channels
KEEP = "*"  # whatever the code says

Pattern = Sequence[int | str]  # per number of a call: COUNT, KEEP, or the number at which it is held

_NAME = re.compile(r"(?P<module>[^@]*)@(?P<key>\w+:\d+)\[(?P<pattern>[-*n\d, ]*)\]")

Arguments = tuple[Any, tuple[Any, ...], dict[str, Any]]  # a function, its positional and its keyword arguments


@dataclass(frozen=True)
class CallSizes:
    """The sizes in the code's calls that could follow the kept channels, and the channels that depend on it."""

    labels: Mapping[str, Labels] = field(default_factory=dict)  # name of a size -> classes that it counts
    needed: Mapping[int, str] = field(default_factory=dict)  # class that stays unless its sizes follow -> reason

    @classmethod
    def resolve(
        cls, find: Callable[[Labels], Labels], sizes: Mapping[str, list[Labels]], conditional: list[tuple[Labels, str]]
    ) -> CallSizes:
        """Labels as classes; a size that counts different channels in different runs of its call is left out."""
        resolved = {}
        for name, calls in sizes.items():
            first, *others = [find(labels) for labels in calls]
            if all(np.array_equal(first, other) for other in others):
                resolved[name] = first
        reasons = {c: why for labels, why in reversed(conditional) for c in unique_labels(find(labels)) if c != NONE}
        return cls(resolved, reasons)

    def touching(self, classes: set[int]) -> dict[str, Labels]:
        """The sizes that count at least one of these classes."""
        return {name: labels for name, labels in self.labels.items() if classes & set(labels.tolist())}


def name_size(call: OwnCall, pattern: Pattern) -> str:
    """The name under which the size that `pattern` marks by COUNT is recorded."""
    return f"{call.module}@{call.key}[{', '.join(map(str, pattern))}]"


def is_call_size(name: str) -> bool:
    """Whether a name of `Network.attributes` or `Plan.slices` is that of a size in a call."""
    return _NAME.fullmatch(name) is not None


def parse_size(name: str) -> tuple[OwnCall, list[int | str]]:
    """The call and the pattern of a size's name. Raises JpqError for another name."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise JpqError(f"'{name}' names no size of a call. Load the plan that jpq wrote.")
    tokens = [token.strip() for token in match["pattern"].split(",")]
    try:
        pattern = [token if token in (COUNT, KEEP) else int(token) for token in tokens]
    except ValueError as error:
        raise JpqError(f"'{name}' names no size of a call ({error}). Load the plan that jpq wrote.") from error
    return OwnCall(match["module"], match["key"]), pattern


def can_resize(call: OwnCall) -> bool:
    """Whether the sizes of this call can be rewritten."""
    return call.key.partition(":")[0] in _RESIZE


def resize_calls(model: nn.Module, counts: Mapping[str, int]) -> None:
    """Rewrite sizes in calls of `model`, in place: name -> number of kept channels.

    Raises JpqError for a name that does not fit the model.
    """
    for name, count in counts.items():
        call, pattern = parse_size(name)
        if not can_resize(call):
            raise JpqError(f"'{name}' names a call whose sizes jpq cannot rewrite. Load the plan that jpq wrote.")
        try:
            module = model.get_submodule(call.module)
        except AttributeError as error:
            raise JpqError(
                f"The plan rewrites '{name}', which this {type(model).__name__} has not. Load the plan into the model "
                "that it was made from."
            ) from error
        before = own_call_actions(module).get(call.key)
        earlier = before if isinstance(before, Resize) else Resize({}, {})
        held = {k: int(token) for k, token in enumerate(pattern) if token not in (COUNT, KEEP)}
        counted = {k: count for k, token in enumerate(pattern) if token == COUNT}
        replace_calls(module, {call.key: Resize({**earlier.counts, **counted}, {**earlier.held, **held})})


@dataclass(frozen=True)
class Resize:
    """The same call with other sizes: those of `counts`, by position, and those that are held."""

    counts: Mapping[int, int]
    held: Mapping[int, int]

    def run(self, module: nn.Module, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of the call with these sizes."""
        resize = _RESIZE[function.__name__]
        function, args, kwargs = resize(self, function, args, dict(kwargs))
        return function(*args, **kwargs)

    @property
    def values(self) -> dict[int, int]:
        """Every rewritten size by its position."""
        return {**self.held, **self.counts}

    def apply(self, sizes: Iterable[Any], infer: bool = False) -> list[Any]:
        """The call's sizes with those that are rewritten; with `infer` a single count is left to torch, as -1."""
        new = [self.values.get(k, size) for k, size in enumerate(sizes)]
        if infer and len(self.counts) == 1 and not any(isinstance(n, int) and n == -1 for n in new):
            new[next(iter(self.counts))] = -1
        return new


def _take(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, *names: str) -> Any:
    """An argument by its position or one of its names, which leaves `kwargs`."""
    if len(args) > position:
        return args[position]
    for name in names:
        if name in kwargs:
            return kwargs.pop(name)
    return None


def _shape(resize: Resize, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """x.reshape(2, 3), x.view((2, 3)), torch.reshape(x, shape=(2, 3)), x.expand(2, 3)."""
    first = _take(args, kwargs, 1, "shape", "size")
    sizes = args[1:] if len(args) > 2 or isinstance(first, int) else first
    return function, (args[0], resize.apply(sizes, infer=True)), kwargs


def _repeat(resize: Resize, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """x.repeat(2, 3), x.tile((2, 3)), torch.tile(x, dims=(2, 3))."""
    first = _take(args, kwargs, 1, "repeats", "dims")
    times = args[1:] if len(args) > 2 or isinstance(first, int) else first
    return torch.Tensor.repeat, (args[0], resize.apply(times)), {}


def _repeat_interleave(resize: Resize, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """x.repeat_interleave(times, dim)."""
    times = resize.apply([_take(args, kwargs, 1, "repeats")])
    return function, (args[0], *times, *args[2:]), kwargs


def _unflatten(resize: Resize, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """x.unflatten(dim, sizes)."""
    dim, sizes = _take(args, kwargs, 1, "dim"), _take(args, kwargs, 2, "sizes")
    return function, (args[0], dim, tuple(resize.apply(sizes, infer=True))), kwargs


def _split(resize: Resize, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """x.split(8, dim), x.split([8, 16], dim), x.chunk(3, dim): always with the size of every part."""
    x = _take(args, kwargs, 0, "tensor", "input")
    dim = _take(args, kwargs, 2, "dim")
    return torch.Tensor.split, (x, [resize.values[k] for k in range(len(resize.values))], dim or 0), {}


def _narrow(resize: Resize, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """x.narrow(dim, start, length)."""
    dim = _take(args, kwargs, 1, "dim")
    bounds = [_take(args, kwargs, 2, "start"), _take(args, kwargs, 3, "length")]
    return function, (args[0], dim, *resize.apply(bounds)), kwargs


def _pad(resize: Resize, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """F.pad(x, [0, 1, 2, 3], mode, value)."""
    sizes = resize.apply(_take(args, kwargs, 1, "pad"))
    return function, (args[0], sizes, *args[2:]), kwargs


def _groups(resize: Resize, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """F.conv2d(x, weight, bias, stride, padding, dilation, groups); transposed, groups are the seventh, too."""
    groups = resize.values[0]
    if len(args) > 6:
        return function, (*args[:6], groups, *args[7:]), kwargs
    return function, args, {**kwargs, "groups": groups}


def _normalized_shape(resize: Resize, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """F.layer_norm(x, (8,), weight, bias)."""
    sizes = resize.apply(_take(args, kwargs, 1, "normalized_shape"))
    return function, (args[0], sizes, *args[2:]), kwargs


def _index(resize: Resize, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """x[:, 4:8]: positions 2 d and 2 d + 1 are start and stop of the slice along dim d, as torch counts them."""
    x, index = args
    items = list(index) if isinstance(index, tuple) else [index]
    named = sum(item is not None and item is not Ellipsis for item in items)
    dim = 0
    for k, item in enumerate(items):
        if item is Ellipsis:
            dim += x.dim() - named
            continue
        if isinstance(item, slice):
            start, stop = (resize.values.get(2 * dim + end, old) for end, old in enumerate((item.start, item.stop)))
            items[k] = slice(start, stop, item.step)
        dim += not (isinstance(item, int) and not isinstance(item, bool))
    return function, (x, tuple(items)), kwargs


_RESIZE: dict[str, Callable[[Resize, Any, tuple[Any, ...], dict[str, Any]], Arguments]] = {
    **dict.fromkeys(("reshape", "view", "expand", "broadcast_to"), _shape),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "repeat_interleave": _repeat_interleave,
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "chunk", "unsafe_chunk"), _split),
    "narrow": _narrow,
    "pad": _pad,
    **dict.fromkeys((f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)), _groups),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized_shape),
    "__getitem__": _index,
}
