"""Small networks for tests, one topological feature each: ZOO[name] is (constructor, example)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jpq.tracing.pad_channels import PadChannels
from zoo.attention import UNPACKED
from zoo.tokens import Attention, AttentionByHand, AttentionRigid, Tokens, Transformer

Example = Tensor | tuple[Any, ...] | dict[str, Any]


def conv(i: int, o: int, k: int = 3, **kw: Any) -> nn.Sequential:
    """Convolution, batch norm, and an activation with f(0) != 0 so that dead channels are not zero."""
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **kw), nn.BatchNorm2d(o), nn.Softplus())


class Head(nn.Sequential):
    def __init__(self, n: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 4))


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 8), conv(8, 6), Head(6))


class Flat(nn.Sequential):  # one channel becomes 16 features
    def __init__(self) -> None:
        super().__init__(conv(3, 6), nn.Flatten(), nn.Linear(96, 10), nn.ReLU(), nn.Linear(10, 4))


class FlatView(nn.Module):  # the same by numbers in the code, which a smaller net cannot run
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 6), conv(6, 4), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)).view(-1, 64))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 8), conv(8, 5), conv(5, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.b(self.a(x)))


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), Head(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.body(F.relu(self.norm(x)))
        return self.head(F.relu(self.norm(x)))


class Concat(nn.Module):  # DenseNet's growth, and a concat with the image
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 4), conv(4, 5), conv(9, 6), Head(9)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        y = self.c(torch.cat([a, self.b(a)], 1))
        return self.head(torch.cat([x, y], 1))


class Chunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(4, 4), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, dim=1)
        return self.head(torch.cat([left, self.b(right)], 1))


class Split(nn.Module):  # sizes from the shape: whether that is so only running tells
    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self.a, self.b, self.head, self.size = conv(3, 8), conv(4, 6), Head(6), size

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        left, right = torch.split(x, self.size or x.shape[1] // 2, dim=1)
        return self.head(self.b(left * right))


class SplitFixed(Split):
    def __init__(self) -> None:
        super().__init__(4)


class Depthwise(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 8), conv(8, 8, groups=8), conv(8, 6, 1), Head(6))


class DepthMultiplier(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 5), conv(5, 15, groups=5), conv(15, 6, 1), Head(6))


class Grouped(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 8), conv(8, 12, groups=4), conv(12, 6, groups=2), Head(6))


class Transposed(nn.Sequential):
    def __init__(self) -> None:
        up = nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, 2, groups=2)
        super().__init__(conv(3, 8), *up, nn.ConvTranspose2d(4, 8, 2, groups=4), Head(8))


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 12, groups=2), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        b, c, h, w = x.shape
        return self.head(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))


class PixelShuffle(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 16), nn.PixelShuffle(2), conv(4, 6), nn.PixelUnshuffle(2), Head(24))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 8), Head(8)
        squeeze, excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), squeeze, nn.ReLU(), excite, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x * self.gate(x)))


class Shared(nn.Module):  # one layer called twice, another under two names
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 8), Head(8)
        self.again = self.b

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.b(self.b(self.a(x)))))


class Averages(nn.Module):  # GroupNorm and a mean over channels keep what they average
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c, self.head = conv(3, 8), nn.GroupNorm(1, 8), conv(8, 6), conv(6, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.norm(self.a(x)))
        y = self.c(x)
        return self.head(y * x.mean(1, keepdim=True).sigmoid())


class GroupNorms(nn.Module):  # whole groups can go, through a residual sum too
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), Head(8)
        self.n1, self.n2 = nn.GroupNorm(4, 8), nn.GroupNorm(2, 8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(x + self.n2(self.b(F.softplus(self.n1(x)))))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 6), conv(2, 6), nn.Linear(5, 6), Head(6)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return self.head(self.a(x) + self.b(y) * self.c(z)[..., None, None])


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 6), conv(6, 5), conv(6, 7), Head(7)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.a(x)
        return {"map": self.b(x), "class": self.head(self.c(x))}


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), nn.PReLU(6), Head(6)

    def forward(self, *, image: Tensor, scale: Tensor) -> Tensor:
        return self.head(self.b(self.a(image)) * scale)


class PaddedShortcut(nn.Module):  # option A of the CIFAR ResNets
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pad, self.head = conv(3, 4), PadChannels(2, 2), Head(8)
        self.a, self.b, self.c = conv(4, 6, stride=2), conv(6, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.pad(x[:, :, ::2, ::2]) + self.b(self.a(x))
        return self.head(x + self.c(x))


class PaddedByHand(PaddedShortcut):  # the same with numbers in the code
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + self.b(self.a(x))
        return self.head(x + self.c(x))


class Signal(nn.Sequential):  # one dimension, a batch norm without scale
    def __init__(self) -> None:
        first = nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6, affine=False), nn.ELU()
        super().__init__(*first, nn.Conv1d(6, 5, 3), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(30, 4))


class Volume(nn.Sequential):
    def __init__(self) -> None:
        first = nn.Conv3d(2, 5, 3), nn.BatchNorm3d(5), nn.ReLU()
        super().__init__(*first, nn.ConvTranspose3d(5, 4, 2), nn.InstanceNorm3d(4), nn.Flatten(2), nn.Linear(27, 3))


IMAGE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


class Interleaved(nn.Module):
    """Neighbouring channels share one learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 6), Head(6)
        self.scale = nn.Parameter(torch.rand(3) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x) * self.scale.repeat_interleave(2, 0)[:, None, None])


ZOO: dict[str, tuple[Callable[[], nn.Module], Example]] = {
    "interleaved": (Interleaved, IMAGE),
    "plain": (Plain, IMAGE),
    "flat": (Flat, IMAGE),
    "flat_view": (FlatView, IMAGE),
    "residual": (Residual, IMAGE),
    "pre_activation": (PreActivation, IMAGE),
    "concat": (Concat, IMAGE),
    "chunk": (Chunk, IMAGE),
    "split": (Split, IMAGE),
    "split_fixed": (SplitFixed, IMAGE),
    "depthwise": (Depthwise, IMAGE),
    "depth_multiplier": (DepthMultiplier, IMAGE),
    "grouped": (Grouped, IMAGE),
    "transposed": (Transposed, IMAGE),
    "shuffle": (Shuffle, IMAGE),
    "pixel_shuffle": (PixelShuffle, IMAGE),
    "squeeze_excite": (SqueezeExcite, IMAGE),
    "shared": (Shared, IMAGE),
    "attention": (Attention, TOKENS),
    "attention_rigid": (AttentionRigid, TOKENS),
    "attention_by_hand": (AttentionByHand, TOKENS),
    "transformer": (Transformer, IMAGE),
    "tokens": (Tokens, torch.tensor([[0, 1, 2], [3, 4, 6]])),
    "averages": (Averages, IMAGE),
    "group_norms": (GroupNorms, IMAGE),
    "two_inputs": (TwoInputs, (IMAGE, IMAGE[:, :2], TOKENS[:, 0, :5])),
    "two_outputs": (TwoOutputs, IMAGE),
    "keywords": (Keywords, {"image": IMAGE, "scale": torch.tensor(0.5)}),
    "padded_shortcut": (PaddedShortcut, IMAGE),
    "padded_by_hand": (PaddedByHand, IMAGE),
    "signal": (Signal, torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(2))),
    "volume": (Volume, torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(3))),
    **UNPACKED,
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Float64, with batch statistics and scales that no channel could hide behind; zero-initialised weights filled."""
    g = torch.Generator().manual_seed(seed)
    for p in model.double().parameters():
        with torch.no_grad():
            if p.dim() < 2 or not p.any():
                p.copy_(torch.rand(p.shape, generator=g, dtype=p.dtype) + 0.5)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            assert m.running_mean is not None
            assert m.running_var is not None
            m.running_mean.copy_(torch.randn(m.num_features, generator=g))
            m.running_var.copy_(torch.rand(m.num_features, generator=g) + 0.5)
    return model.eval()
