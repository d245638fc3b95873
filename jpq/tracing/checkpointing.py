"""Modules that checkpoint activations (torch.utils.checkpoint): the form that gates and exporters can work with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint


class _NonReentrant:
    """What stands in the place of torch's CheckpointFunction: the same call without reentrant backward."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        """The function's result, with activations computed again in the backward pass."""
        return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


@contextmanager
def without_reentrant_checkpoints() -> Iterator[None]:
    """A context in which reentrant checkpoints (`use_reentrant=True`) are made without reentrant backward.

    A reentrant checkpoint runs its function without gradients, which samples of gates and ranges made outside it would
    lose, and is an operator that no exporter knows. Gradients of all else are the same.
    """
    original = torch_checkpoint.CheckpointFunction
    torch_checkpoint.CheckpointFunction = _NonReentrant  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        torch_checkpoint.CheckpointFunction = original  # type: ignore[misc]


def in_checkpoint() -> bool:
    """Whether code runs inside a checkpoint, at first or again, where saved tensors are counted."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


@contextmanager
def uncounted(seed: int, device: torch.device) -> Iterator[None]:
    """A context for what is made at the first run inside a checkpoint, and kept for the second.

    Its tensors are saved as outside of checkpoints, and its random numbers come from the seed, so that all that follows
    draws the same numbers in both runs.
    """
    devices = [device] if device.type == "cuda" else []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with torch.random.fork_rng(devices), keep:
        torch.manual_seed(seed)
        yield
