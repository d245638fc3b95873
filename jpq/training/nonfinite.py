"""Training that has come to what is no number: where it happened first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jpq.tracing.forward import hook_modules
from jpq.types import JpqError


def not_finite(net: nn.Module) -> list[str]:
    """Names of the parameters and buffers that are to be saved and hold NaN or infinity, parameters first."""
    parameters = {name for name, _ in net.named_parameters()}
    found = net.state_dict().items()
    bad = [n for n, t in found if isinstance(t, Tensor) and t.is_floating_point() and not t.isfinite().all()]
    return sorted(bad, key=lambda name: name not in parameters)


def require_finite(net: nn.Module, x: Tensor, phase: str, done: int) -> None:
    """Raise JpqError where a parameter is not a number, naming what is not finite first on the batch `x`; or a buffer.

    BatchNorm's running variance overflows before any loss does: it is of squares.
    """
    bad = not_finite(net)
    if bad and bad[0] in dict(net.named_parameters()):
        raise JpqError(diverged(net, x, phase, done))
    require_buffers(net, f"phase {phase}, epoch {done + 1}")


def require_buffers(net: nn.Module, when: str) -> None:
    """Raise JpqError where a model cannot be saved as it stands: something in it is NaN or infinite."""
    bad = not_finite(net)
    if bad:
        raise JpqError(
            f"'{bad[0]}' of the model is NaN or infinite ({when}): what it is measured from is larger than "
            "numbers of 32 bits can be. Look for bad samples in the data, or lower --lr."
        )


@torch.no_grad()
def diverged(net: nn.Module, x: Tensor, phase: str, done: int) -> str:
    """The sentence for a loss that is not a number, after `done` epochs of a phase: where it happened first."""
    bad = [name for name, p in net.named_parameters() if not p.isfinite().all()]
    first: list[str] = []

    def look(name: str, _: nn.Module, __: Any, out: Any) -> None:
        if isinstance(out, Tensor) and not first and not out.isfinite().all():
            first.append(name)

    with hook_modules({n: m for n, m in net.named_modules() if not list(m.children())}, look):
        net(x)
    where = f"the output of layer '{first[0]}'" if first else f"parameter '{bad[0]}'" if bad else "the loss itself"
    return (
        f"The loss is not a number in phase {phase}, epoch {done + 1}: {where} is the first that is not "
        "finite. The last checkpoint is kept. Lower --lr (or --gate-lr, --bit-lr), or look for bad samples in the data."
    )
