"""Masks of torch.nn.utils.prune, which compute a weight from a parameter and a buffer before each forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from jpq.tracing.copy_model import computed_tensors, copy_model


def has_pruning_masks(model: nn.Module) -> bool:
    """Whether a part of the model is masked by torch.nn.utils.prune."""
    return any(_masks(module) for module in model.modules())


def without_pruning_masks(model: Any) -> Any:
    """The model, or what is given for one, itself where nothing masks it; else a copy with the masked weights.

    What keeps tensors of an earlier forward pass, or was built in inference mode, is copied too.
    """
    if not isinstance(model, nn.Module):
        return model
    lazy = nn.parameter.UninitializedParameter
    in_inference_mode = any(not isinstance(p, lazy) and p.is_inference() for p in model.parameters())
    if not (in_inference_mode or has_pruning_masks(model) or computed_tensors(model)):
        return model
    model = copy_model(model)
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
