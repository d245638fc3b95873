"""`len` of a tensor, as an exporter must see it: the size of the first dim, not a number.

Python demands an int of `len(x)`, so that torch.onnx writes the example's batch size into the file and torch.export
finds that the batch is fixed, where `x.shape[0]` stays free in both.
"""

from __future__ import annotations

import builtins
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def traced_lengths() -> Iterator[None]:
    """A context in which `len(x)` of a tensor is `x.shape[0]` in this thread, which an exporter can follow."""
    plain, thread = builtins.len, threading.get_ident()

    def length(value: Any, /) -> Any:
        if isinstance(value, Tensor) and value.dim() and threading.get_ident() == thread:
            return value.shape[0]
        return plain(value)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = plain
