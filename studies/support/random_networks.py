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
TOKENS = 5
LONGEST = 25  # positions that a recurrent layer reads: its steps are written out
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


class Gated(nn.Module):
    """A branch, times the sigmoid of another branch."""

    def __init__(self, branch: nn.Module, gate: nn.Module):
        super().__init__()
        self.branch, self.gate = branch, gate

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) * torch.sigmoid(self.gate(x))


class Summed(nn.Module):
    """The sum of several branches (Inception, RepVGG)."""

    def __init__(self, branches: list[nn.Module]):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches)  # type: ignore[return-value]


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Sliced(nn.Module):
    """Some channels go through a branch, the others around it, cut out by slices."""

    def __init__(self, branch: nn.Module, kept: int, dim: int):
        super().__init__()
        self.branch, self.kept, self.dim = branch, kept, dim

    def forward(self, x: Tensor) -> Tensor:
        if self.dim == 1:
            return torch.cat([x[:, : self.kept], self.branch(x[:, self.kept :])], 1)
        return torch.cat([self.branch(x[..., self.kept :]), x[..., : self.kept]], -1)


class ChannelsLast(nn.Module):
    """Layers over the last dim of a permuted image, scaled by a learned vector (ConvNeXt)."""

    def __init__(self, dims: int, width: int, inner: int):
        super().__init__()
        self.order, self.back = (0, *range(2, dims + 2), 1), (0, dims + 1, *range(1, dims + 1))
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.scale * self.layers(x.permute(self.order))).permute(self.back)


class UpAndDown(nn.Module):
    """A branch at half the size, enlarged to the input's size and laid beside it (U-Net)."""

    def __init__(self, dims: int, branch: nn.Module):
        super().__init__()
        self.pool, self.branch = MAX_POOLS[dims](2), branch

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.interpolate(self.branch(self.pool(x)), size=x.shape[2:]), x], 1)


class LinearExcited(nn.Module):
    """Squeeze and excitation by Linear layers and a view."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width), nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        scale = self.layers(x.flatten(2).mean(-1)).view(batch, channels, *(1,) * (x.dim() - 2))
        return x * scale.expand_as(x)


class Maxout(nn.Module):
    """The largest of every two channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1] // 2, 2, *x.shape[2:]).amax(2)


class Scaled(nn.Module):
    """Each channel times a learned number, plus another."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


class TimeFirst(nn.Module):
    """A recurrent layer that wants time first, read at its last states."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.layer(x.transpose(0, 1))
        last = state[0] if isinstance(state, tuple) else state
        return out.transpose(0, 1) + last[-1].unsqueeze(1)


class TokenMixing(nn.Module):
    """A layer over the tokens instead of the channels (MLP-Mixer)."""

    def __init__(self, tokens: int, inner: int):
        super().__init__()
        self.up, self.down = nn.Linear(tokens, inner), nn.Linear(inner, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x.mT))).mT


class CrossAttention(nn.Module):
    """Attention of learned queries to the tokens, whose number it leaves as it was."""

    def __init__(self, width: int, heads: int, tokens: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, tokens, width))
        self.heads, self.head = heads, width // heads
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(self.queries.expand(batch, -1, -1)).view(batch, -1, self.heads, self.head).transpose(1, 2)
        k, v = self.kv(x).chunk(2, -1)
        k, v = (t.view(batch, tokens, self.heads, self.head).transpose(1, 2) for t in (k, v))
        weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / self.head**0.5, dim=-1)
        return self.out(torch.matmul(weights, v).permute(0, 2, 1, 3).flatten(2))


class Tied(nn.Module):
    """Two layers with one weight, the second transposed (an autoencoder)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.encode = nn.Linear(width, inner)
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.encode(x)), self.encode.weight.t(), self.shift)


@dataclass
class Draw:
    """The random choices behind one network."""

    rng: random.Random
    dims: int  # 1, 2, 3: spatial dims; 0: tokens or vectors
    tokens: bool = False  # [B, T, C]
    depth: int = 0  # of branches
    size: int = 0  # smallest spatial size left
    halved: bool = False  # within a branch at half of that

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
        pools = draw.rng.choice((MAX_POOLS, AVERAGE_POOLS))
        if draw.halved and draw.dims == 3:  # avg_pool3d refuses windows beyond the image, though it pads
            pools = MAX_POOLS
        return pools[draw.dims](3, 1, 1), width
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
    if draw.dims and draw.size**draw.dims > LONGEST:
        return _conv(draw, width)
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


def _gated(draw: Draw, width: int) -> tuple[nn.Module, int]:
    make, outputs = (CONVS[draw.dims] if draw.dims else nn.Linear), draw.channels()
    extra = (1,) if draw.dims else ()
    if draw.rng.random() < 0.5:
        return nn.Sequential(make(width, 2 * outputs, *extra), nn.GLU(draw.dim)), outputs
    return Gated(make(width, outputs, *extra), make(width, outputs, *extra)), outputs


def _summed(draw: Draw, width: int) -> tuple[nn.Module, int]:
    outputs = draw.channels()
    if not draw.dims:
        return Summed([nn.Linear(width, outputs), nn.Linear(width, outputs, bias=False)]), outputs
    conv, norm = CONVS[draw.dims], BATCH_NORMS[draw.dims]
    wide, narrow = (3,) * draw.dims, (3,) + (1,) * (draw.dims - 1)
    branches = [
        nn.Sequential(conv(width, outputs, wide, padding=1, bias=False), norm(outputs)),
        conv(width, outputs, narrow, padding=tuple(k // 2 for k in narrow)),
        nn.Sequential(conv(width, outputs, 1, bias=False), norm(outputs, affine=False)),
    ]
    return Summed(branches[: draw.rng.randint(2, 3)]), outputs


def _sliced(draw: Draw, width: int) -> tuple[nn.Module, int]:
    kept = draw.rng.randint(1, width - 1)
    draw.depth += 1
    branch, outputs = sequence(draw, width - kept, 1)
    draw.depth -= 1
    return Sliced(branch, kept, draw.dim), kept + outputs


def _channels_last(draw: Draw, width: int) -> tuple[nn.Module, int]:
    return ChannelsLast(draw.dims, width, draw.channels()), width


def _up_and_down(draw: Draw, width: int) -> tuple[nn.Module, int]:
    if draw.size < 4 or draw.depth:
        return _conv(draw, width)
    draw.depth += 1
    draw.halved = True
    branch, outputs = sequence(draw, width, draw.rng.randint(1, 2))
    draw.halved = False
    draw.depth -= 1
    return UpAndDown(draw.dims, branch), width + outputs


def _linear_excited(draw: Draw, width: int) -> tuple[nn.Module, int]:
    return LinearExcited(width, draw.rng.choice((2, 4))), width


def _maxout(draw: Draw, width: int) -> tuple[nn.Module, int]:
    return (Maxout(), width // 2) if width % 2 == 0 and width > 4 else _activation(draw, width)


def _scaled(draw: Draw, width: int) -> tuple[nn.Module, int]:
    return Scaled((1, width, *(1,) * draw.dims) if draw.dims else (width,)), width


def _shuffled(draw: Draw, width: int) -> tuple[nn.Module, int]:
    groups = draw.rng.choice([g for g in (1, 2, 4) if width % g == 0])
    return nn.Sequential(CONVS[draw.dims](width, width, 1, groups=groups), nn.ChannelShuffle(groups)), width


def _padded(draw: Draw, width: int) -> tuple[nn.Module, int]:
    outputs, dims = draw.channels(), draw.dims
    pads = (1,) * (2 * dims)
    mode = draw.rng.choice(("constant", "replicate", "circular"))
    value = draw.rng.choice((0.0, 0.5)) if mode == "constant" else None
    pad = Called(lambda x: F.pad(x, pads, mode, value))
    return nn.Sequential(pad, CONVS[dims](width, outputs, 3)), outputs


def _function(draw: Draw, width: int) -> tuple[nn.Module, int]:
    dim = draw.dim
    spatial = tuple(range(2, 2 + draw.dims))
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: F.relu(x, inplace=False).mul(0.5),
        lambda x: F.normalize(x, dim=dim) * 3,
        lambda x: x.softmax(dim) * 4,
        lambda x: x.clamp(-1.0, 1.5),
        lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda x: x.flip(dim),
        lambda x: x.roll(1, dim),
        lambda x: torch.cat([F.relu(x), F.relu(-x)], dim).narrow(dim, 0, width),
        lambda x: x * torch.tanh(F.softplus(x)),
    ]
    if draw.dims:
        functions += [
            lambda x: x - x.mean(spatial, keepdim=True),
            lambda x: x * (x.amax(spatial, keepdim=True) > 0),
            lambda x: x + x.flatten(2).max(-1)[0].reshape(*x.shape[:2], *(1,) * draw.dims),
        ]
    return Called(draw.rng.choice(functions)), width


def _prelu(draw: Draw, width: int) -> tuple[nn.Module, int]:
    return (nn.PReLU(width), width) if draw.dims else _activation(draw, width)


def _odd_conv(draw: Draw, width: int) -> tuple[nn.Module, int]:
    """Strides above the kernel, even kernels, unequal pads, transposed ones that dilate."""
    outputs, conv = draw.channels(), CONVS[draw.dims]
    if draw.depth or draw.size < 6:
        choice = draw.rng.choice(("even", "dilated transposed"))
    else:
        choice = draw.rng.choice(("even", "dilated transposed", "stride above kernel", "transposed, larger"))
    if choice == "even":
        return conv(width, outputs, 2, padding="same"), outputs
    if choice == "dilated transposed":
        return TRANSPOSED[draw.dims](width, outputs, 3, padding=2, dilation=2), outputs
    draw.size //= 2
    if choice == "stride above kernel":
        return conv(width, outputs, 1, stride=2), outputs
    small, large = (
        conv(width, outputs, 3, stride=2, padding=1),
        TRANSPOSED[draw.dims](outputs, outputs, 3, 2, 1, output_padding=1),
    )
    draw.size *= 2
    return nn.Sequential(small, large), outputs


def _cross_attention(draw: Draw, width: int) -> tuple[nn.Module, int]:
    heads = draw.rng.choice([h for h in (1, 2, 4) if width % h == 0])
    return CrossAttention(width, heads, TOKENS), width


def _token_mixing(draw: Draw, width: int) -> tuple[nn.Module, int]:
    return TokenMixing(TOKENS, draw.channels()), width


def _time_first(draw: Draw, width: int) -> tuple[nn.Module, int]:
    hidden = draw.rng.choice((4, 6, 8))
    return TimeFirst(
        draw.rng.choice((nn.GRU, nn.LSTM, nn.RNN))(width, hidden, num_layers=draw.rng.choice((1, 2)))
    ), hidden


def _tied(draw: Draw, width: int) -> tuple[nn.Module, int]:
    return Tied(width, draw.channels()), width


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
    _gated,
    _summed,
    _sliced,
    _channels_last,
    _up_and_down,
    _linear_excited,
    _maxout,
    _scaled,
    _shuffled,
    _padded,
    _function,
    _prelu,
    _odd_conv,
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
    _gated,
    _summed,
    _sliced,
    _scaled,
    _function,
    _cross_attention,
    _token_mixing,
    _time_first,
    _tied,
)
_SEQUENTIAL = (_attention, _recurrent, _cross_attention, _token_mixing, _time_first)  # of tokens only
VECTOR: tuple[Block, ...] = tuple(block for block in TOKEN if block not in _SEQUENTIAL)


def sequence(draw: Draw, width: int, length: int) -> tuple[nn.Sequential, int]:
    """A sequence of random blocks and its number of output channels."""
    blocks = (IMAGE if draw.dims == 2 else SPATIAL) if draw.dims else (TOKEN if draw.tokens else VECTOR)
    if draw.depth:  # branches are plain: no branches in branches, and sizes stay
        nested = (_residual, _concatenated, _halves, _sliced, _up_and_down, _recurrent, _time_first)
        blocks = tuple(b for b in blocks if b not in nested)
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
            if norm.affine:
                norm.weight.uniform_(-1.5, 1.5)
                norm.bias.normal_(0, 0.3)


def random_network(seed: int) -> tuple[nn.Module, Tensor]:
    """A random network in evaluation mode, and an example of two samples; the same for the same seed."""
    model, x = _draw_network(seed)
    _keep_signals(model)
    with torch.no_grad():
        model(x)  # else weights that torch.nn.utils.prune computes have a gradient, and cannot be copied
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
        x = torch.randn(2, TOKENS, inputs) if draw.tokens else torch.randn(2, inputs)
        body, width = sequence(draw, inputs, length)
        end: list[nn.Module] = [TakeMean()] if draw.tokens else []
        return nn.Sequential(body, *end, nn.Linear(width, CLASSES)).eval(), x
    dims, size = {"image": (2, rng.choice((8, 9))), "signal": (1, 12), "volume": (3, 4)}[kind]
    draw = Draw(rng, dims, size=size)
    x = torch.randn(2, inputs, *(size,) * dims)
    stem = CONVS[dims](inputs, first := draw.channels(), 3, padding=1)
    body, width = sequence(draw, first, length)
    left = rng.choice((1, 1, 2))  # positions of each dim that the last layer reads
    head = [ADAPTIVE_POOLS[dims](left), nn.Flatten(), nn.Linear(width * left**dims, CLASSES)]
    return nn.Sequential(stem, body, *head).eval(), x
