"""Models that are compared in double precision though their code casts to float32, as `x.float() / 255` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

T = TypeVar("T")


def in_double(run: Callable[[], T]) -> T:
    """What `run` gives, which calls models in double precision.

    Where their code makes float32 numbers on the way, and layers then meet two precisions, it is run again with
    `double_casts`. Other models run as they are: a graph that torch.export made holds float32 constants of its own, and
    compares with the code that it was made of.
    """
    try:
        return run()
    except RuntimeError:
        with double_casts():
            return run()


@contextmanager
def double_casts() -> Iterator[None]:
    """A context in which code that casts to float32, or makes float32 of integers, gets float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Casts():
            yield
    finally:
        torch.set_default_dtype(before)


class _Casts(TorchFunctionMode):
    """Casts to float32, and whatever else asks for that type, give float64: in code and in graphs of ATen operators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        return func(*map(_wide, args), **{key: _wide(value) for key, value in (kwargs or {}).items()})


def _wide(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument
