"""Models that are compared in double precision though their code casts to float32, as `x.float() / 255` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


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
    """Casts to float32 become casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            return args[0].double()
        if func in (Tensor.to, Tensor.type):
            args = tuple(_wide(a) for a in args)
            kwargs = {key: _wide(a) for key, a in kwargs.items()}
        return func(*args, **kwargs)


def _wide(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument
