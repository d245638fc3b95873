"""Small networks whose multiplications are no plain layers: computed weights, products of activations, cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune


class Standardised(nn.Conv2d):  # timm's StdConv2d, BiT, NFNet
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Conv1D(nn.Module):  # GPT-2's
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(i, o)), nn.Parameter(torch.zeros(o))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Code(nn.Module):
    """A network of one line of code over a few parameters."""

    def __init__(self, code: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            value = nn.Parameter(torch.randn(part)) if isinstance(part, tuple) else part
            setattr(self, name, value)
        self.code = code

    def forward(self, *x: Tensor) -> Tensor:
        return self.code(self, *x)


class TiedTranspose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.m = nn.Linear(12, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.m(F.relu(self.e(x)))), self.e.weight.t())


class Windows(nn.Module):  # Swin's products, on windows of a feature map
    def __init__(self, dim: int = 8, heads: int = 2, window: int = 4) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.randn(heads, window**2, window**2))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        k = self.window
        x = x.view(b, h // k, k, w // k, k, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, k * k, c)
        q, key, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ key.transpose(-2, -1) + self.table).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).flatten(2)).mean((1, 2)).view(b, -1)


class HeadsByEinsum(nn.Module):
    def __init__(self, dim: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        scores = torch.einsum("blhe,bshe->bhls", q, k).softmax(-1)
        return self.proj(torch.einsum("bhls,bshe->blhe", scores, v).flatten(2)).mean(1)


class Sdpa(nn.Module):
    def __init__(self, dim: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.size = dim // heads
        self.up, self.qkv, self.proj, self.head = (
            nn.Linear(dim, dim),
            nn.Linear(dim, 3 * dim),
            nn.Linear(dim, dim),
            nn.Linear(dim, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.up(x).relu()).unflatten(-1, (3, -1, self.size)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.head(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1))


class LastStep(nn.Module):
    def __init__(self, cell: nn.Module, width: int) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Blur(nn.Module):  # a fixed filter in a buffer
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
        self.register_buffer("kernel", torch.full((4, 1, 2, 2), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.conv2d(self.first(x).relu(), self.kernel, groups=4))


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    prune.l1_unstructured(model[2], "weight", 0.5)
    return model


def _standard() -> nn.Module:
    return nn.Sequential(Standardised(3, 16, 3), nn.ReLU(), Standardised(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))


def _read_past_module(net: Any, x: Tensor) -> Tensor:  # its quantizers do not see the second product
    return net.o(F.linear(net.m(x).relu(), net.m.weight).relu())


def _autoencoder(net: Any, x: Tensor) -> Tensor:  # the decoder has the encoder's weight
    return F.conv_transpose2d(net.m(net.e(x).relu()).relu(), net.e.weight)


def _two_ways(net: Any, x: Tensor) -> Tensor:
    return F.conv_transpose2d(net.m(F.conv2d(x, net.w).relu()).relu(), net.w)


def _dynamic(net: Any, x: Tensor) -> Tensor:  # a kernel for each sample
    weight = net.make(x.mean((2, 3))).reshape(-1, 3, 3, 3)
    return F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight, groups=len(x)).flatten(1).view(len(x), -1)


IMAGE, ROWS, TOKENS = torch.randn(2, 3, 9, 9), torch.randn(4, 12), torch.randn(2, 6, 12)

NETS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "standardised": (_standard, IMAGE),
    "standardised_grouped": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Standardised(8, 8, 3, groups=4)), IMAGE),
    "pruned": (pruned, IMAGE),
    "tied_transpose": (TiedTranspose, ROWS),
    "read_past_module": (lambda: Code(_read_past_module, m=nn.Linear(12, 12), o=nn.Linear(12, 3)), ROWS),
    "tied_convolution": (lambda: Code(_autoencoder, e=nn.Conv2d(3, 8, 3), m=nn.Conv2d(8, 8, 1)), IMAGE),
    "two_ways": (lambda: Code(_two_ways, w=(8, 3, 3, 3), m=nn.Conv2d(8, 8, 1)), IMAGE),
    "matmul": (lambda: Code(lambda s, x: s.o(F.relu(x @ s.w)), w=(12, 32), o=nn.Linear(32, 8)), ROWS),
    "matmul_from_left": (lambda: Code(lambda s, x: s.w @ x, w=(5, 6)), TOKENS),
    "addmm": (lambda: nn.Sequential(Conv1D(12, 16), nn.GELU(), Conv1D(16, 8), nn.Linear(8, 3)), TOKENS),
    "mv": (lambda: Code(lambda s, x: torch.stack([torch.mv(s.w, row) for row in x]), w=(5, 12)), ROWS),
    "low_rank": (lambda: Code(lambda s, x: F.linear(x, s.w + s.a @ s.b), w=(8, 12), a=(8, 2), b=(2, 12)), ROWS),
    "two_bare_weights": (lambda: Code(lambda s, x: F.linear(F.linear(x, s.up), s.down), up=(7, 12), down=(3, 7)), ROWS),
    "packed_weight": (
        lambda: Code(lambda s, x: sum(F.linear(x, w) for w in s.in_proj_weight.chunk(3)), in_proj_weight=(12, 12)),
        ROWS,
    ),
    "bmm": (lambda: Code(lambda s, x: torch.bmm(s.a(x), s.b(x).mT), a=nn.Linear(12, 8), b=nn.Linear(12, 8)), TOKENS),
    "baddbmm": (
        lambda: Code(lambda s, x: torch.baddbmm(s.bias, s.a(x), x.mT), a=nn.Linear(12, 12), bias=(1, 6, 6)),
        TOKENS,
    ),
    "gram": (lambda: Code(lambda s, x: s.a(torch.einsum("btc,btd->bcd", x, x)), a=nn.Linear(12, 4)), TOKENS),
    "einsum_weight": (lambda: Code(lambda s, x: torch.einsum("btc,hcd->bthd", x, s.w), w=(2, 12, 5)), TOKENS),
    "einsum_ellipsis": (lambda: Code(lambda s, x: torch.einsum("...c,dc->...d", x, s.w), w=(5, 12)), TOKENS),
    "einsum_three": (
        lambda: Code(lambda s, x: torch.einsum("btc,cr,rd->btd", x, s.a, s.b), a=(12, 3), b=(3, 7)),
        TOKENS,
    ),
    "einsum_elementwise": (lambda: Code(lambda s, x: torch.einsum("btc,c->btc", x, s.w), w=(12,)), TOKENS),
    "tensordot": (lambda: Code(lambda s, x: torch.tensordot(x, s.w, dims=([2], [0])), w=(12, 5)), TOKENS),
    "dynamic_kernel": (lambda: Code(_dynamic, make=nn.Linear(3, 81)), IMAGE),
    "windows": (Windows, torch.randn(2, 8, 8, 8)),
    "heads_by_einsum": (HeadsByEinsum, torch.randn(2, 5, 8)),
    "sdpa": (Sdpa, torch.randn(2, 5, 16)),
    "multihead": (lambda: Code(lambda s, x: s.a(x, x, x)[0], a=nn.MultiheadAttention(12, 3, batch_first=True)), TOKENS),
    "cross_attention": (
        lambda: Code(lambda s, x: s.a(x[:, :2], x, x)[0], a=nn.MultiheadAttention(12, 3, batch_first=True)),
        TOKENS,
    ),
    "encoder": (lambda: nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), TOKENS),
    "gru": (lambda: LastStep(nn.GRU(12, 8, 2, batch_first=True, bidirectional=True), 16), TOKENS),
    "lstm": (lambda: LastStep(nn.LSTM(12, 8, batch_first=True), 8), TOKENS),
    "lstm_projected": (lambda: LastStep(nn.LSTM(12, 8, proj_size=5, batch_first=True), 5), TOKENS),
    "rnn": (lambda: LastStep(nn.RNN(12, 8, batch_first=True, nonlinearity="relu"), 8), TOKENS),
    "gru_cell": (lambda: Code(lambda s, x: s.c(x, s.h(x)), c=nn.GRUCell(12, 8), h=nn.Linear(12, 8)), ROWS),
    "transposed_grouped": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 3, 2, groups=2)), IMAGE),
    "volume": (lambda: nn.Conv3d(2, 4, (1, 3, 2), stride=2), torch.randn(2, 2, 5, 6, 7)),
    "signal": (
        lambda: nn.Sequential(nn.Conv1d(12, 6, 3, dilation=2), nn.ConvTranspose1d(6, 4, 3)),
        torch.randn(2, 12, 9),
    ),
    "blur": (Blur, IMAGE),
}
