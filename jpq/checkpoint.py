"""Checkpoints: one file in the run's folder, written beside and renamed, read without executing anything."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jpq.files import replace_file
from jpq.types import JpqError

NAME = "checkpoint.pt"


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Keep `state` (tensors, numbers, text, lists and dicts of them) as the folder's checkpoint."""
    try:
        replace_file(folder / NAME, lambda part: torch.save(dict(state), part))
    except (OSError, RuntimeError) as error:
        raise JpqError(f"Cannot write the checkpoint {folder / NAME}: {error}. The last good one is kept.") from error


def load(folder: Path) -> dict[str, Any] | None:
    """The folder's checkpoint, or None where there is none. Raises JpqError for a file that is not one of ours."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise JpqError(
            f"{path} is not a readable checkpoint ({_short(error)}). Remove it, or run without --resume."
        ) from error
    if not isinstance(state, dict) or state.get("kind") != "jpq checkpoint":
        raise JpqError(f"{path} is not a checkpoint that jpq wrote. Remove it, or run without --resume.")
    return state


def restore(module: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Load a state dict strictly. Raises JpqError where it does not fit."""
    try:
        module.load_state_dict(dict(state))
    except (RuntimeError, AttributeError, TypeError) as error:
        raise JpqError(
            f"{source} does not fit this model ({_short(error)}). Remove it, or run without --resume."
        ) from error


def save_tensors(module: nn.Module, path: Path) -> None:
    """The module's state as safetensors."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    replace_file(path, lambda part: save_file(state, part))


def load_tensors(module: nn.Module, path: Path) -> None:
    """Load what `save_tensors` wrote. Raises JpqError for a missing, foreign or ill-fitting file."""
    try:
        state = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise JpqError(f"Cannot read {path} ({_short(error)}).") from error
    restore(module, state, path)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
