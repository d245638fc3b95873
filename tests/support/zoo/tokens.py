"""Small networks whose channels are the last dim: attention, embeddings, transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):  # heads are units where the code lets them be
    def __init__(self, heads: int = 4, size: int = 3, rigid: bool = False) -> None:
        super().__init__()
        self.heads, self.size, self.rigid = heads, size, rigid
        self.embed, self.qkv, self.out = nn.Linear(6, 10), nn.Linear(10, 3 * heads * size), nn.Linear(heads * size, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        size = 12 // self.heads if self.rigid else self.size
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.out(y).mean(1))


class AttentionRigid(Attention):  # the head size follows from the number of heads: heads stay
    def __init__(self) -> None:
        super().__init__(rigid=True)


class AttentionByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q, self.k, self.v, self.out = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.num_heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


class Transformer(nn.Module):  # nn.MultiheadAttention, LayerNorm, class token, positions, layer scale
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.attend = nn.Conv2d(3, 8, 2, 2), nn.MultiheadAttention(8, 2, batch_first=True)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.n1, self.n2, self.scale = nn.LayerNorm(8), nn.LayerNorm(8), nn.Parameter(torch.rand(8))
        self.mlp, self.head = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        y = self.n1(x)
        x = x + self.attend(y, y, y, need_weights=False)[0]
        return self.head((x + self.scale * self.mlp(self.n2(x)))[:, 0])


class Normed(nn.Module):  # a residual stream through a LayerNorm, an RMSNorm and a GroupNorm: frozen, or opened
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.n1, self.n2 = nn.Linear(6, 12), nn.Linear(12, 4), nn.LayerNorm(12), nn.RMSNorm(12)
        self.n3, self.n4 = nn.GroupNorm(3, 12), nn.LayerNorm(12, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.n2(x + self.mlp(self.n1(x)))
        return self.head(self.n4(self.n3(x.transpose(1, 2)).transpose(1, 2)).mean(1))


class Tokens(nn.Module):  # embedding, class token and positions without a LayerNorm: their columns go with the rest
    def __init__(self) -> None:
        super().__init__()
        self.table, self.token = nn.Embedding(7, 6), nn.Parameter(torch.randn(1, 1, 6))
        self.scale = nn.Parameter(torch.rand(6))
        self.mlp, self.head = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)), nn.Linear(6, 4)

    def forward(self, index: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(index), -1, -1), self.table(index)], 1)
        return self.head((x + self.scale * self.mlp(x)).mean(1))
