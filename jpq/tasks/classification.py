"""jpq.tasks.classification."""

from __future__ import annotations

import torch
from torch import nn

from jpq.tasks.data import Batches
from jpq.tracing.forward import eval_mode


@torch.no_grad()
def evaluate(net: nn.Module, batches: Batches) -> float:
    """Share of samples whose largest logit is their class, in [0, 1]; evaluation mode."""
    with eval_mode(net):
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in batches)
    return right / batches.size
