"""Plain versions of torchvision's attention with relative position bias (MaxViT, Swin), whose heads are prunable.

Their projections are called as layers here, so that quantizers reach them, and no size in the code counts heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

HIDDEN_SCORE = -100.0  # added by Swin to the scores of tokens that are no neighbours


class BiasedAttention(nn.Module):
    """Attention, softmax(scale q k^T + bias) v per head, with bias[head, i, j] = table[index[i, j], head].

    Args:
        qkv: layer that makes queries, keys and values, heads * head_dim each.
        proj: layer that reads the heads side by side.
        table: [relative positions, heads] biases.
        index: [n, n] rows of the table.
        head_dim: size of a head.
        scale: factor of the scores; 1 / sqrt(head_dim) if None.
    """

    relative_position_index: Tensor

    def __init__(
        self, qkv: nn.Linear, proj: nn.Linear, table: Tensor, index: Tensor, head_dim: int, scale: float | None = None
    ):
        super().__init__()
        self.qkv, self.proj, self.head_dim, self.scale = qkv, proj, head_dim, scale
        self.relative_position_bias_table = nn.Parameter(table.detach().clone(), table.requires_grad)
        self.register_buffer("relative_position_index", index.clone())
        self.logit_scale: nn.Parameter | None = None  # [heads, 1, 1]: makes it cosine attention, times its exponential
        self.attention_dropout = 0.0

    @property
    def num_heads(self) -> int:
        """The number of heads that the table has now."""
        return self.relative_position_bias_table.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """[B, groups, n, C] -> [B, groups, n, C]: each group of n tokens attends to itself."""
        return self.attend(x, None)

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, groups, n, C] -> [B, groups, n, C]; `mask`, [groups, 1, n, n], is added to the scores."""
        n = x.shape[-2]
        bias = self.relative_position_bias_table[self.relative_position_index[:n, :n]].permute(2, 0, 1)
        bias = bias if mask is None else bias + mask
        parts = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)
        q, k, v = (part.transpose(-2, -3) for part in parts)  # [B, groups, heads, n, head_dim]
        if self.logit_scale is not None:
            q, k = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=math.log(100.0)).exp(), F.normalize(k, dim=-1)
        dropout = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=self.scale)
        return self.proj(y.transpose(-2, -3).flatten(-2))


def decompose_maxvit_attention(source: RelativePositionalMultiHeadAttention) -> BiasedAttention:
    """MaxViT's attention (Tu et al. 2022, arXiv:2204.01697) as `BiasedAttention` with the projections of `source`."""
    table, index = source.relative_position_bias_table, source.relative_position_index
    attention = BiasedAttention(source.to_qkv, source.merge, table, index, source.head_dim, source.scale_factor)
    return attention.train(source.training)


class ShiftedWindows(BiasedAttention):
    """Swin's attention: Liu et al. 2021 (arXiv:2103.14030), version 2 (arXiv:2111.09883), video (arXiv:2106.13230).

    The projections are those of `source`. Version 2 computes its bias by a small network from coordinates that never
    change: the table holds that network's output. It has no bias of keys: that part of qkv's bias is set to 0, and
    training may move it.
    """

    def __init__(self, source: ShiftedWindowAttention | ShiftedWindowAttention3d):
        n, cosine = math.prod(source.window_size), isinstance(source, ShiftedWindowAttentionV2)
        index, head_dim = source.relative_position_index.reshape(n, n), source.qkv.in_features // source.num_heads
        table = _computed_bias(source) if cosine else source.relative_position_bias_table
        super().__init__(source.qkv, source.proj, table, index, head_dim, 1.0 if cosine else None)
        self.window_size, self.shift_size = tuple(source.window_size), tuple(source.shift_size)
        self.video = isinstance(source, ShiftedWindowAttention3d)
        self.attention_dropout, self.dropout = source.attention_dropout, source.dropout
        if cosine:
            self.logit_scale = nn.Parameter(source.logit_scale.detach().clone(), source.logit_scale.requires_grad)
            if self.qkv.bias is not None:
                self.qkv.bias.data.chunk(3)[1].zero_()
        self.train(source.training)

    def forward(self, x: Tensor) -> Tensor:
        """[B, *space, C] -> [B, *space, C]; space is (height, width), or (time, height, width)."""
        space = x.shape[1:-1]
        window = [min(w, n) for w, n in zip(self.window_size, space, strict=True)] if self.video else self.window_size
        margin = [-n % w for w, n in zip(window, space, strict=True)]
        x = F.pad(x, [0, 0, *(side for m in reversed(margin) for side in (0, m))])
        padded = x.shape[1:-1]
        shift = [s if w < n else 0 for s, w, n in zip(self.shift_size, window, padded, strict=True)]
        dims = list(range(1, len(padded) + 1))
        if not any(shift):
            y = self.attend(_split_windows(x, window), None)
        else:
            x = x.roll([-s for s in shift], dims)
            y = self.attend(_split_windows(x, window), _shift_mask(padded, window, shift, x))
        counts = [n // w for w, n in zip(window, padded, strict=True)]
        y = _join_windows(F.dropout(y, self.dropout, self.training), window, counts)
        if any(shift):
            y = y.roll(shift, dims)
        for d, n in zip(dims, space, strict=True):
            y = y.narrow(d, 0, n)
        return y


def _computed_bias(source: Any) -> Tensor:
    """[relative positions, heads] biases that version 2's network computes from its coordinates."""
    with torch.no_grad():
        table = 16 * source.cpb_mlp(source.relative_coords_table).flatten(0, 2).sigmoid()
    return table.requires_grad_(any(p.requires_grad for p in source.cpb_mlp.parameters()))


def _split_windows(x: Tensor, window: Sequence[int]) -> Tensor:
    """[B, *space, C] -> [B, windows, tokens of a window, C]."""
    k = len(window)
    for d in reversed(range(k)):
        x = x.unflatten(1 + d, (-1, window[d]))
    x = x.permute(0, *range(1, 2 * k, 2), *range(2, 2 * k + 1, 2), 2 * k + 1)
    return x.flatten(k + 1, 2 * k).flatten(1, k)


def _join_windows(x: Tensor, window: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The inverse of `_split_windows`, with `counts` windows along each dim of space."""
    k = len(window)
    x = x.unflatten(2, tuple(window)).unflatten(1, tuple(counts))
    x = x.permute(0, *(d for i in range(1, k + 1) for d in (i, i + k)), 2 * k + 1)
    for d in range(1, k + 1):
        x = x.flatten(d, d + 1)
    return x


def _shift_mask(space: Sequence[int], window: Sequence[int], shift: Sequence[int], reference: Tensor) -> Tensor:
    """[windows, 1, n, n]: HIDDEN_SCORE where two tokens share a window only because the shift wrapped one around."""
    region = torch.zeros([1] * len(space), dtype=torch.long, device=reference.device)
    for d, (n, s) in enumerate(zip(space, shift, strict=True)):
        wrapped = torch.arange(n, device=reference.device) >= n - s
        region = 2 * region + wrapped.reshape([-1 if k == d else 1 for k in range(len(space))])
    tokens = _split_windows(region[None, ..., None], window)[0, :, :, 0]
    return ((tokens[:, :, None] != tokens[:, None, :]) * HIDDEN_SCORE).to(reference.dtype)[:, None]
