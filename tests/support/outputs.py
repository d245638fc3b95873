"""Comparison of what two models give: one tensor, or tensors nested in tuples, lists and dicts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten


def flat(output: Any) -> Tensor:
    """All elements of a (nested) output as one vector."""
    return torch.cat([t.flatten() for t in tree_flatten(output)[0]])


def gap(a: Any, b: Any) -> float:
    """The largest absolute difference of two outputs, as a share of the largest absolute element of the former."""
    a, b = flat(a), flat(b)
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
