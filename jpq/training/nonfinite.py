"""Training that reached NaN or infinity: the first layer, parameter or buffer that is not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jpq.tracing.forward import call_model, hook_modules
from jpq.types import JpqError


def check_finite(net: nn.Module, x: Any, phase: str, done: int) -> None:
    """Raise JpqError where a parameter or buffer is NaN or infinite, with the first layer that is so on the batch `x`.

    BatchNorm's running variance overflows before any loss does: it is of squares.
    """
    names = nonfinite_names(net)
    if names and names[0] in dict(net.named_parameters()):
        raise JpqError(divergence_error(net, x, phase, done))
    check_buffers(net, f"phase {phase}, epoch {done + 1}")


def check_buffers(net: nn.Module, moment: str) -> None:
    """Raise JpqError where a model cannot be saved as it stands: something in it is NaN or infinite."""
    names = nonfinite_names(net)
    if names:
        raise JpqError(
            f"'{names[0]}' of the model is NaN or infinite ({moment}): what it is measured from is larger than "
            "numbers of 32 bits can be. Look for bad samples in the data, or lower --lr."
        )


def nonfinite_names(net: nn.Module) -> list[str]:
    """Names in the state dict whose tensors hold NaN or infinity, parameters first."""
    parameters = {name for name, _ in net.named_parameters()}
    tensors = {n: t for n, t in net.state_dict().items() if isinstance(t, Tensor) and t.is_floating_point()}
    names = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    return sorted(names, key=lambda name: name not in parameters)


@torch.no_grad()
def divergence_error(net: nn.Module, x: Any, phase: str, done: int) -> str:
    """The error message for a loss that is not a number, after `done` epochs of a phase, with the first bad layer."""
    parameters = [name for name, p in net.named_parameters() if not p.isfinite().all()]
    layers: list[str] = []

    def note_nonfinite(name: str, _: nn.Module, __: Any, out: Any) -> None:
        if isinstance(out, Tensor) and not layers and not out.isfinite().all():
            layers.append(name)

    with hook_modules({n: m for n, m in net.named_modules() if not list(m.children())}, note_nonfinite):
        call_model(net, x)
    place = "the loss itself"
    if layers:
        place = f"the output of layer '{layers[0]}'"
    elif parameters:
        place = f"parameter '{parameters[0]}'"
    return (
        f"The loss is not a number in phase {phase}, epoch {done + 1}: {place} is the first that is not "
        "finite. The last checkpoint is kept. Lower --lr (or --gate-lr, --bit-lr), or look for bad samples in the data."
    )
