"""Plain versions of torch.nn's attention and transformer stacks, whose layers are visible and whose heads are prunable.

`Attention` is nn.MultiheadAttention (Vaswani et al. 2017, arXiv:1706.03762) with its packed projection split into
nn.Linear layers. Their inner width is heads * head_dim whatever embed_dim is, so heads can be removed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jpq.types import JpqError


class Attention(nn.Module):
    """Attention, softmax(q k^T / sqrt(head_dim)) v per head, with the arguments and outputs of nn.MultiheadAttention.

    Args:
        source: the module whose values and options are copied; it is not changed.
    """

    in_proj_bias = None  # tells nn.TransformerEncoderLayer not to hand packed weights to its fused kernel

    def __init__(self, source: nn.MultiheadAttention):
        super().__init__()
        self.head_dim, self.dropout, self.batch_first = source.head_dim, source.dropout, source.batch_first
        packed: Tensor | None = source.in_proj_weight
        separate = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        weights = separate if packed is None else packed.chunk(3)
        biases = (None, None, None) if source.in_proj_bias is None else source.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (copy_as_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = copy_as_linear(source.out_proj.weight, source.out_proj.bias)
        self.bias_k, self.bias_v, self.add_zero_attn = source.bias_k, source.bias_v, source.add_zero_attn
        self.train(source.training)

    @property
    def num_heads(self) -> int:
        """The number of heads that the projections have now."""
        return self.q_proj.out_features // self.head_dim

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, weights or None), shaped as nn.MultiheadAttention documents."""
        if query.is_nested:
            raise JpqError("Attention takes no nested tensors. Pad the sequences and give key_padding_mask.")
        if is_causal and attn_mask is None:
            raise JpqError("is_causal=True is a hint about attn_mask: give that mask as well.")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q = self._split_heads(self.q_proj(query))
        k = self._split_heads(self._append_tokens(self.k_proj(key), self.bias_k))
        v = self._split_heads(self._append_tokens(self.v_proj(value), self.bias_v))
        causal_only = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal_only else _additive_mask(attn_mask, key_padding_mask, q, k)
        y, weights = self._attend(q, k, v, mask, causal_only, need_weights)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(values, attention weights or None) of every head: [B, heads, L, size], [B, heads, L, S]."""
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), self.dropout, self.training)
            return weights @ v, weights
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal), None

    def _split_heads(self, x: Tensor) -> Tensor:
        """[B, L, heads * size] -> [B, heads, L, size]; size is head_dim, but a single head's values may be fewer."""
        size = self.head_dim if self.num_heads > 1 else x.shape[-1]
        return x.unflatten(-1, (-1, size)).transpose(1, 2)

    def _append_tokens(self, x: Tensor, learned: Tensor | None) -> Tensor:
        """[B, S, inner] with a learned token and one of zeros behind the others where the options ask for them."""
        if learned is not None:
            x = torch.cat([x, learned.expand(x.shape[0], -1, -1)], 1)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x


class Encoder(nn.Module):
    """nn.TransformerEncoder as it runs in training: without nested tensors and without reading a mask's values.

    Without nested tensors padded positions hold what their layers compute, where the fast path writes zeros.
    """

    def __init__(self, source: nn.TransformerEncoder):
        super().__init__()
        self.layers, self.num_layers, self.norm = source.layers, source.num_layers, source.norm
        self.training = source.training

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Output of the last layer, shaped as `src`."""
        for layer in self.layers:
            src = layer(src, mask, src_key_padding_mask, is_causal is True)
        return src if self.norm is None else self.norm(src)


class Decoder(nn.Module):
    """nn.TransformerDecoder without reading a mask's values, which torch.export cannot follow."""

    def __init__(self, source: nn.TransformerDecoder):
        super().__init__()
        self.layers, self.num_layers, self.norm = source.layers, source.num_layers, source.norm
        self.training = source.training

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Output of the last layer, shaped as `tgt`."""
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        for layer in self.layers:
            tgt = layer(tgt, memory, *masks, tgt_is_causal is True, memory_is_causal)
        return tgt if self.norm is None else self.norm(tgt)


def copy_as_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An nn.Linear with copies of these values, as trainable as they are."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


def _additive_mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask that is added to the scores, broadcastable to [B, heads, L, S]; it hides no appended token."""
    total = None
    if attn_mask is not None:  # [L, S] or [B * heads, L, S]
        total = _as_numbers(attn_mask, q.dtype)
        total = total[None, None] if total.dim() == 2 else total.unflatten(0, (q.shape[0], -1))
    if padding is not None:  # [B, S]
        hidden = _as_numbers(padding, q.dtype)[:, None, None]
        total = hidden if total is None else total + hidden
    extra = 0 if total is None else k.shape[-2] - total.shape[-1]
    return F.pad(total, (0, extra)) if total is not None and extra else total


def _as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (true: hidden) as numbers to add, 0 or -inf; a numeric mask is unchanged."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
