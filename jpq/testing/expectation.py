"""Assertions of the conformance checks: a condition, and the message of its AssertionError."""

from __future__ import annotations

import torch
from torch import Tensor


def expect(condition: object, sentence: str) -> None:
    """Raise AssertionError with this sentence unless the condition is true (a tensor: true everywhere)."""
    holds = bool(condition.all()) if isinstance(condition, Tensor) else bool(condition)
    if not holds:
        raise AssertionError(sentence)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two float64 results are equal but for rounding."""
    return torch.allclose(a, b, rtol=1e-12, atol=1e-12)
