"""Random small networks from a seed: layers of every kind in random order, with branches, shared and computed weights.

A network is a sequence of random blocks on images (2-d), signals (1-d), volumes (3-d), tokens or vectors. Every block
takes and gives a tensor of the same modality and knows its number of channels, so any block can follow any other.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

CLASSES = 5
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ADAPTIVE_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.LeakyReLU, nn.ReLU6, nn.Tanh, nn.ELU)


class Residual(nn.Module):
    """The input plus a branch."""

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Concatenated(nn.Module):
    """The outputs of several branches side by side."""

    def __init__(self, branches: list[nn.Module], dim: int):
        super().__init__()
        self.branches, self.dim = nn.ModuleList(branches), dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], self.dim)


class Halves(nn.Module):
    """Two halves of the channels, of which one goes through a branch (the split of CSP and ShuffleNet)."""

    def __init__(self, branch: nn.Module, dim: int, shuffle: bool):
        super().__init__()
        self.branch, self.dim, self.shuffle = branch, dim, shuffle

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, self.dim)
        if not self.shuffle:
            return torch.cat([first, self.branch(second)], self.dim)
        stacked = torch.stack([first, self.branch(second)], self.dim + 1)
        return stacked.flatten(self.dim, self.dim + 1)


class Excited(nn.Module):
    """Squeeze and excitation: channels scaled by a small network of their averages."""

    def __init__(self, dims: int, channels: int, inner: int):
        super().__init__()
        self.down, self.up = CONVS[dims](channels, inner, 1), CONVS[dims](inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        average = x.mean(tuple(range(2, x.dim())), keepdim=True)
        return x * torch.sigmoid(self.up(F.relu(self.down(average))))


class Shared(nn.Module):
    """One layer called twice."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.relu(self.layer(x)))


class StandardizedConv(nn.Conv2d):
    """A convolution whose weight is standardised in its forward (BiT, NFNet)."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True, unbiased=False) + 1e-5
        return F.conv2d(x, (self.weight - mean) / std, self.bias, self.stride, self.padding)


class PaddedConv(nn.Conv2d):
    """A subclass that pads by hand, as TensorFlow's ports do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride)


class MatrixProduct(nn.Module):
    """A layer whose weight, [in, out], is multiplied in the module's own code."""

    def __init__(self, inputs: int, outputs: int, way: str):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5), nn.Parameter(torch.zeros(outputs))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "matmul":
            return x @ self.w + self.b
        if self.way == "einsum":
            return torch.einsum("...i,io->...o" if x.dim() != 3 else "bti,io->bto", x, self.w) + self.b
        if self.way == "linear":
            return F.linear(x, self.w.t(), self.b)
        return torch.addmm(self.b, x.reshape(-1, x.shape[-1]), self.w).reshape(*x.shape[:-1], -1)


class HandAttention(nn.Module):
    """Self-attention as most code writes it: one projection for q, k, v and a reshape by sizes of the input."""

    def __init__(self, width: int, heads: int, fused: bool, sizes: bool):
        super().__init__()
        self.heads, self.fused, self.sizes = heads, fused, sizes
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width if self.sizes else -1))


class PackedAttention(nn.Module):
    """Self-attention by nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    """All outputs of a recurrent layer over the tokens."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class HandNorm(nn.Module):
    """Root-mean-square norm over the last dim, as language models write it."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Tokens(nn.Module):
    """Images, signals or volumes seen as tokens [B, T, C] by a module, and given back in their shape."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])


class Pixels(nn.Module):
    """Pixel shuffle up, and a strided convolution down again."""

    def __init__(self, channels: int, outputs: int):
        super().__init__()
        self.shuffle, self.down = nn.PixelShuffle(2), nn.Conv2d(channels // 4, outputs, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.shuffle(x))


@dataclass
class Draw:
    """The random choices behind one network."""

    rng: random.Random
    dims: int  # 1, 2, 3: spatial dims; 0: tokens or vectors
    tokens: bool = False  # [B, T, C]
    depth: int = 0  # of branches
    size: int = 0  # smallest spatial size left

    def channels(self) -> int:
        return self.rng.choice((4, 6, 8, 12, 16))

    @property
    def dim(self) -> int:
        """The dim along which channels lie."""
        return 1 if self.dims else -1


Block = Callable[[Draw, int], "tuple[nn.Module, int]"]


def _conv(draw: Draw, width: int) -> tuple[nn.Module, int]:
    rng, outputs = draw.rng, draw.channels()
    kernel, dilation = rng.choice((1, 3)), rng.choice((1, 1, 2))
    padding: Any = rng.choice(("same", dilation * (kernel // 2)))
    groups = rng.choice([g for g in (1, 1, 1, 2, 4) if width % g == 0 and outputs % g == 0])
    bias = rng.random() < 0.6
    mode = rng.choice(
        ("zeros", "zeros", "zeros", "reflect" if kernel == 3 and dilation == 1 and draw.dims < 3 else "zeros")
    )
    layer = CONVS[draw.dims](
        width, outputs, kernel, padding=padding, dilation=dilation, groups=groups, bias=bias, padding_mode=mode
    )
    return layer, outputs


def _depthwise(draw: Draw, width: int) -> tuple[nn.Module, int]:
    outputs = width * draw.rng.choice((1, 1, 2)) if width <= 16 else width
    return CONVS[draw.dims](width, outputs, 3, padding=1, groups=width, bias=draw.rng.random() < 0.5), outputs


def _strided(draw: Draw, width: int) -> tuple[nn.Module, int]:
    if draw.size < 4 or draw.depth:
        return _conv(draw, width)
    draw.size //= 2
    outputs = draw.channels()
    return CONVS[draw.dims](width, outputs, 3, stride=2, padding=1), outputs


def _transposed(draw: Draw, width: int) -> tuple[nn.Module, int]:
    outputs = draw.channels()
    groups = draw.rng.choice([g for g in (1, 1, 2) if width % g == 0 and outputs % g == 0])
    kernel, stride = (2, 2) if draw.depth == 0 and draw.size <= 4 and draw.dims < 3 else (3, 1)
    if stride == 2:
        draw.size *= 2
    return TRANSPOSED[draw.dims](width, outputs, kernel, stride, padding=(kernel - stride) // 2, groups=groups), outputs


def _norm(draw: Draw, width: int) -> tuple[nn.Module, int]:
    if draw.dims == 0:
        if not draw.tokens:
            return draw.rng.choice((nn.BatchNorm1d(width), nn.LayerNorm(width))), width
        return draw.rng.choice((nn.LayerNorm(width), HandNorm(width), nn.RMSNorm(width))), width
    norms = [BATCH_NORMS[draw.dims](width)] * 3 + [nn.GroupNorm(2 - width % 2, width), nn.GroupNorm(1, width)]
    if draw.size > 1 and draw.dims == 2:
        norms.append(nn.InstanceNorm2d(width, affine=True))
    return draw.rng.choice(norms), width


def _activation(draw: Draw, width: int) -> tuple[nn.Module, int]:
    return draw.rng.choice(ACTIVATIONS)(), width


def _pool(draw: Draw, width: int) -> tuple[nn.Module, int]:
    if draw.size < 3:
        return _activation(draw, width)
    if draw.depth or draw.size < 4:
        return draw.rng.choice((MAX_POOLS, AVERAGE_POOLS))[draw.dims](3, 1, 1), width
    draw.size //= 2
    return draw.rng.choice((MAX_POOLS, AVERAGE_POOLS))[draw.dims](2), width


def _linear(draw: Draw, width: int) -> tuple[nn.Module, int]:
    outputs = draw.channels()
    return nn.Linear(width, outputs, bias=draw.rng.random() < 0.7), outputs


def _product(draw: Draw, width: int) -> tuple[nn.Module, int]:
    outputs = draw.channels()
    inner = MatrixProduct(width, outputs, draw.rng.choice(("matmul", "einsum", "linear", "addmm")))
    return (Tokens(inner) if draw.dims else inner), outputs


def _attention(draw: Draw, width: int) -> tuple[nn.Module, int]:
    heads = draw.rng.choice([h for h in (1, 2, 4) if width % h == 0])
    if draw.rng.random() < 0.4:
        inner: nn.Module = PackedAttention(width, heads)
    else:
        inner = HandAttention(width, heads, draw.rng.random() < 0.5, draw.rng.random() < 0.5)
    return (Tokens(inner) if draw.dims else inner), width


def _recurrent(draw: Draw, width: int) -> tuple[nn.Module, int]:
    hidden, both = draw.rng.choice((4, 6, 8)), draw.rng.random() < 0.3
    kind = draw.rng.choice((nn.GRU, nn.LSTM, nn.RNN))
    inner = Recurrent(kind(width, hidden, batch_first=True, bidirectional=both, num_layers=draw.rng.choice((1, 1, 2))))
    return (Tokens(inner) if draw.dims else inner), hidden * (1 + both)


def _residual(draw: Draw, width: int) -> tuple[nn.Module, int]:
    draw.depth += 1
    branch, outputs = sequence(draw, width, draw.rng.randint(1, 3))
    if outputs != width:
        branch.append(CONVS[draw.dims](outputs, width, 1) if draw.dims else nn.Linear(outputs, width))
    draw.depth -= 1
    return Residual(branch), width


def _concatenated(draw: Draw, width: int) -> tuple[nn.Module, int]:
    draw.depth += 1
    branches = [sequence(draw, width, draw.rng.randint(1, 2)) for _ in range(2)]
    draw.depth -= 1
    return Concatenated([branch for branch, _ in branches], draw.dim), sum(outputs for _, outputs in branches)


def _halves(draw: Draw, width: int) -> tuple[nn.Module, int]:
    if width % 2:
        return _activation(draw, width)
    draw.depth += 1
    branch, outputs = sequence(draw, width // 2, draw.rng.randint(1, 2))
    if outputs != width // 2:
        branch.append(CONVS[draw.dims](outputs, width // 2, 1) if draw.dims else nn.Linear(outputs, width // 2))
    draw.depth -= 1
    return Halves(branch, draw.dim, bool(draw.dims) and draw.rng.random() < 0.5), width


def _excited(draw: Draw, width: int) -> tuple[nn.Module, int]:
    return Excited(draw.dims, width, draw.rng.choice((2, 4))), width


def _shared(draw: Draw, width: int) -> tuple[nn.Module, int]:
    layer = CONVS[draw.dims](width, width, 3, padding=1) if draw.dims else nn.Linear(width, width)
    return Shared(layer), width


def _standardized(draw: Draw, width: int) -> tuple[nn.Module, int]:
    outputs = draw.channels()
    return draw.rng.choice((StandardizedConv(width, outputs, 3, padding=1), PaddedConv(width, outputs, 3))), outputs


def _normed_weight(draw: Draw, width: int) -> tuple[nn.Module, int]:
    layer, outputs = _conv(draw, width) if draw.dims else _linear(draw, width)
    if draw.rng.random() < 0.5:
        return parametrizations.weight_norm(layer), outputs
    prune.l1_unstructured(layer, "weight", 0.3)
    return layer, outputs


def _pixels(draw: Draw, width: int) -> tuple[nn.Module, int]:
    outputs = draw.channels()
    return (Pixels(width, outputs), outputs) if width % 4 == 0 else _conv(draw, width)


SPATIAL: tuple[Block, ...] = (
    *(_conv,) * 5,
    _depthwise,
    _strided,
    _transposed,
    *(_norm,) * 3,
    *(_activation,) * 4,
    _pool,
    _residual,
    _residual,
    _concatenated,
    _halves,
    _excited,
    _shared,
    _normed_weight,
    _product,
    _attention,
    _recurrent,
)
IMAGE: tuple[Block, ...] = (*SPATIAL, _standardized, _standardized, _pixels)
TOKEN: tuple[Block, ...] = (
    *(_linear,) * 4,
    *(_norm,) * 2,
    *(_activation,) * 3,
    _product,
    _product,
    _attention,
    _attention,
    _recurrent,
    _recurrent,
    _residual,
    _residual,
    _concatenated,
    _halves,
    _shared,
    _normed_weight,
)
VECTOR: tuple[Block, ...] = tuple(block for block in TOKEN if block not in (_attention, _recurrent))


def sequence(draw: Draw, width: int, length: int) -> tuple[nn.Sequential, int]:
    """A sequence of random blocks and its number of output channels."""
    blocks = (IMAGE if draw.dims == 2 else SPATIAL) if draw.dims else (TOKEN if draw.tokens else VECTOR)
    if draw.depth:  # branches are plain: no branches in branches, and sizes stay
        blocks = tuple(b for b in blocks if b not in (_residual, _concatenated, _halves, _recurrent))
    layers = []
    for _ in range(length):
        layer, width = draw.rng.choice(blocks)(draw, width)
        layers.append(layer)
    return nn.Sequential(*layers), width


class TakeMean(nn.Module):
    """The mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@torch.no_grad()
def _keep_signals(model: nn.Module) -> None:
    """Scale weights so that samples still differ at the output, and give batch norms statistics and signed gains."""
    for p in model.parameters():
        if p.dim() > 1:
            p.mul_(2.0)  # of torch's start, whose signals fade by sqrt(3) a layer
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.2, 2.0)
            norm.weight.uniform_(-1.5, 1.5)
            norm.bias.normal_(0, 0.3)


def random_network(seed: int) -> tuple[nn.Module, Tensor]:
    """A random network in evaluation mode, and an example of two samples; the same for the same seed."""
    model, x = _draw_network(seed)
    _keep_signals(model)
    return model, x


def _draw_network(seed: int) -> tuple[nn.Module, Tensor]:
    """A network as torch initialises it, and an example."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kind = rng.choice(("image",) * 5 + ("signal", "signal", "volume", "tokens", "tokens", "tokens", "vector"))
    inputs, length = rng.choice((1, 3, 4)), rng.randint(3, 8)
    if kind in ("tokens", "vector"):
        inputs = rng.choice((4, 8))
        draw = Draw(rng, 0, tokens=kind == "tokens")
        x = torch.randn(2, 5, inputs) if draw.tokens else torch.randn(2, inputs)
        body, width = sequence(draw, inputs, length)
        end: list[nn.Module] = [TakeMean()] if draw.tokens else []
        return nn.Sequential(body, *end, nn.Linear(width, CLASSES)).eval(), x
    dims, size = {"image": (2, rng.choice((8, 9))), "signal": (1, 12), "volume": (3, 4)}[kind]
    draw = Draw(rng, dims, size=size)
    x = torch.randn(2, inputs, *(size,) * dims)
    stem = CONVS[dims](inputs, first := draw.channels(), 3, padding=1)
    body, width = sequence(draw, first, length)
    head = [nn.Flatten(), nn.Linear(width, CLASSES)]
    return nn.Sequential(stem, body, ADAPTIVE_POOLS[dims](1), *head).eval(), x
