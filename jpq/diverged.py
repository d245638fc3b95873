"""Training that has come to what is no number: where it happened first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jpq.network.read import heard
from jpq.types import JpqError


def is_finite(net: nn.Module) -> bool:
    """Whether every parameter is a number."""
    return all(bool(p.isfinite().all()) for p in net.parameters())


def require_finite(net: nn.Module, x: Tensor, phase: str, done: int) -> None:
    """Raise JpqError where a parameter is not a number, naming what is not finite first on the batch `x`."""
    if not is_finite(net):
        raise JpqError(diverged(net, x, phase, done))


@torch.no_grad()
def diverged(net: nn.Module, x: Tensor, phase: str, done: int) -> str:
    """The sentence for a loss that is not a number, after `done` epochs of a phase: where it happened first."""
    bad = [name for name, p in net.named_parameters() if not p.isfinite().all()]
    first: list[str] = []

    def look(name: str, _: nn.Module, __: Any, out: Any) -> None:
        if isinstance(out, Tensor) and not first and not out.isfinite().all():
            first.append(name)

    with heard({n: m for n, m in net.named_modules() if not list(m.children())}, look):
        net(x)
    where = f"the output of layer '{first[0]}'" if first else f"parameter '{bad[0]}'" if bad else "the loss itself"
    return (
        f"The loss is not a number in phase {phase}, epoch {done + 1}: {where} is the first that is not "
        "finite. The last checkpoint is kept. Lower --lr (or --gate-lr, --bit-lr), or look for bad samples in the data."
    )
