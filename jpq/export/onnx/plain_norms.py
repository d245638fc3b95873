"""Norms that torch.onnx cannot export, in evaluation mode, as modules that compute the same and that it can.

- InstanceNorm with running statistics normalises by them, as BatchNorm does.
- BatchNorm without running statistics normalises by those of each batch: written out in means.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jpq.methods.quantizers import replace_and_keep_rounding, result_quantizer

_BATCH_NORMS: tuple[type[Any], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS: tuple[type[Any], ...] = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class BatchStatisticsNorm(nn.Module):
    """BatchNorm by the mean and variance of the batch at hand, in plain operators."""

    def __init__(self, norm: Any):
        super().__init__()
        self.eps, self.weight, self.bias = norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x, `[batch, channels, ...]`, of the same shape."""
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        centred = x - x.mean(dims, keepdim=True)
        x = centred / (centred.square().mean(dims, keepdim=True) + self.eps).sqrt()
        x = x if self.weight is None else x * self.weight.reshape(shape)
        return x if self.bias is None else x + self.bias.reshape(shape)


@torch.no_grad()
def replace_norms(model: nn.Module) -> None:
    """Replace such norms of a model in evaluation mode, in place. Norms with hooks of the user's own stay."""
    for norm in list(model.modules()):
        rounding_hooks = result_quantizer(norm) is not None
        if len(norm._forward_hooks) > rounding_hooks or norm._forward_pre_hooks:
            continue
        if type(norm) in _BATCH_NORMS and norm.running_mean is None:
            replace_and_keep_rounding(model, norm, BatchStatisticsNorm(norm))
        elif type(norm) in _INSTANCE_NORMS and norm.running_mean is not None:
            kind = _BATCH_NORMS[_INSTANCE_NORMS.index(type(norm))]
            new = kind(norm.num_features, norm.eps, affine=norm.affine).to(norm.running_mean).eval()
            for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
                getattr(new, name).copy_(tensor)
            replace_and_keep_rounding(model, norm, new)
