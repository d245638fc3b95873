"""Masks of torch.nn.utils.prune, which compute a weight from a parameter and a buffer before each forward pass."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod


def has_pruning_masks(model: nn.Module) -> bool:
    """Whether a part of the model is masked by torch.nn.utils.prune."""
    return any(_masks(module) for module in model.modules())


def without_pruning_masks(model: Any) -> Any:
    """The model, or what is given for one, itself where nothing masks it; else a copy with the masked weights."""
    if not isinstance(model, nn.Module) or not has_pruning_masks(model):
        return model
    computed = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    model = copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})  # copy refuses computed tensors
    for module in model.modules():
        fold_pruning_masks(module)
    return model


def fold_pruning_masks(module: nn.Module) -> None:
    """Replace weights that torch.nn.utils.prune masks, in place, by parameters of the masked values."""
    for key, mask in _masks(module).items():
        name = mask._tensor_name
        original = module._parameters[f"{name}_orig"]
        assert original is not None
        with torch.no_grad():
            value = original * getattr(module, f"{name}_mask")
        del module._forward_pre_hooks[key], module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"]
        vars(module).pop(name, None)
        module.register_parameter(name, nn.Parameter(value, original.requires_grad))


def _masks(module: nn.Module) -> dict[int, BasePruningMethod]:
    """The hooks of torch.nn.utils.prune on a module, by their keys."""
    return {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, BasePruningMethod)}
