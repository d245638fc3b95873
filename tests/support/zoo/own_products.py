"""Look-alikes of modules of other libraries that make products in code of their own, and a net of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def standardised(w: Tensor) -> Tensor:
    dims = tuple(range(1, w.dim()))
    return (w - w.mean(dims, keepdim=True)) / (w.std(dims, keepdim=True) + 1e-5)


class StandardConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, standardised(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups)


class ScaledConv(nn.Conv2d):  # NFNet's: a gain of its own, standardised by batch_norm
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * 0.3).view(-1)
        weight = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding, groups=self.groups)


class SameConv(nn.Conv2d):  # pads by hand
    def forward(self, x: Tensor) -> Tensor:
        k, d = self.weight.shape[-1], self.dilation[0]
        total = (k - 1) * d
        x = F.pad(x, (total // 2, total - total // 2, total // 2, total - total // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class CastLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        bias = self.bias.to(dtype=input.dtype) if self.bias is not None else None
        return F.linear(input, self.weight.to(dtype=input.dtype), bias=bias)


class TransposedConv(nn.ConvTranspose2d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.conv_transpose2d(
            x, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )


class GPTConv(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = o, nn.Parameter(torch.randn(i, o) / i), nn.Parameter(torch.rand(o))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


class Bare(nn.Module):
    """A product of one bare weight, by a function of (input, weight)."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.w, self.product = nn.Parameter(torch.randn(shape) / shape[0]), product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.w)


class Packed(nn.Module):  # three layers in one weight, one of them called twice
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b, self.out = nn.Parameter(torch.randn(24, 12)), nn.Parameter(torch.rand(24)), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = ((w, bias) for w, bias in zip(self.w.chunk(3), self.b.chunk(3), strict=True))
        return self.out(F.softplus(F.linear(x, *a)) * F.linear(x, *b) + F.linear(x, *c) - F.linear(x + 1, *c))


class Several(nn.Module):  # bare weights of a gated unit
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Parameter(torch.randn(12, 20)), nn.Parameter(torch.randn(20, 12))
        self.down, self.bias = nn.Parameter(torch.randn(20, 12)), nn.Parameter(torch.rand(20))

    def forward(self, x: Tensor) -> Tensor:
        return (F.silu(x @ self.gate.t() + self.bias) * (x @ self.up)) @ self.down


class Filters(nn.Module):  # a buffer that is expanded to the channels: BlurPool
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("filt", torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None] / 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            F.pad(x, (1, 1, 1, 1), "reflect"), self.filt.expand(self.channels, 1, 3, 3), groups=self.channels
        )


class OwnProducts(nn.Module):
    """A small net for the digits, in which no layer but the first is plain."""

    def __init__(self, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.ReLU(),
            StandardConv(8, 12, 3, padding=1, groups=2),
            nn.ReLU(),
            Filters(12),
            ScaledConv(12, 16, 3, padding=1),
            nn.ReLU(),
            SameConv(16, 12, 3, stride=2),
            nn.ReLU(),
            nn.AvgPool2d(4),
            nn.Flatten(),
            GPTConv(12, 16),
            nn.ReLU(),
            Bare(torch.matmul, 16, 20),
            nn.ReLU(),
            CastLinear(20, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)
