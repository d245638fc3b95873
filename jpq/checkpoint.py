"""Checkpoints: one file in the run's folder, written beside and renamed, read without executing anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialized
from torch import Tensor, nn

from jpq.files import replace_file
from jpq.tensor_files import safetensors_of, short, torch_of
from jpq.types import JpqError

NAME, KIND = "checkpoint.pt", "jpq checkpoint"


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Keep `state` (tensors, numbers, text, lists and dicts of them) as the folder's checkpoint."""

    def write(part: Path) -> None:
        with part.open("wb") as file:  # torch's own writer does not keep why it could not write
            torch.save(dict(state), file)

    replace_file(folder / NAME, write)


def load(folder: Path) -> dict[str, Any] | None:
    """The folder's checkpoint, or None where there is none. Raises JpqError for a file that is not one of ours."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        state = torch_of(path)
    except JpqError as error:
        raise JpqError(f"{error} Remove it, or run without --resume.") from error
    if not isinstance(state, dict) or state.get("kind") != KIND:
        raise JpqError(f"{path} is not a checkpoint that jpq wrote. Remove it, or run without --resume.")
    return state


def restore(module: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Load a state dict strictly. Raises JpqError where it does not fit."""
    try:
        module.load_state_dict(dict(state))
    except (RuntimeError, AttributeError, TypeError) as error:
        raise JpqError(
            f"{source} does not fit this model ({short(error)}). Remove it, or run without --resume."
        ) from error


def save_tensors(module: nn.Module, path: Path) -> None:
    """The module's state as safetensors."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    replace_file(path, lambda part: part.write_bytes(serialized(state)))  # whose errors are the system's own


def load_tensors(module: nn.Module, path: Path) -> None:
    """Load what `save_tensors` wrote. Raises JpqError for a missing, foreign or ill-fitting file, NaN or infinity."""
    state = safetensors_of(path)
    bad = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise JpqError(f"{path} holds NaN or infinity in '{bad[0]}': it is damaged.")
    restore(module, state, path)
