"""Small networks in which several layers of different kinds read one tensor: READERS[name] makes the network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jpq.tracing.pad_channels import PadChannels
from zoo import conv

IMAGE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(5))


class Readers(nn.Module):
    """A conv, a transposed conv and a linear layer after flatten (or only the first few) read what `made` returns."""

    def __init__(self, n: int, readers: int = 3, size: int = 4) -> None:
        super().__init__()
        kinds = nn.Conv2d(n, 3, 3, padding=1), nn.ConvTranspose2d(n, 4, 2, 2), nn.Linear(n * size * size, 5)
        self.readers = nn.ModuleList(kinds[:readers])

    def made(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.made(x)
        return tuple(r(x.flatten(1) if isinstance(r, nn.Linear) else x) for r in self.readers)


class Body(Readers):
    def __init__(self, body: nn.Module, n: int, readers: int = 3, size: int = 4) -> None:
        super().__init__(n, readers, size)
        self.body = body

    def made(self, x: Tensor) -> Tensor:
        return self.body(x)


class Added(Readers):  # residual sum; the branch reads the trunk too
    def __init__(self) -> None:
        super().__init__(10)
        self.a, self.b = conv(3, 10), conv(10, 10)

    def made(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return x + self.b(x)


class Joined(Readers):  # concat, as in DenseNet
    def __init__(self) -> None:
        super().__init__(11)
        self.a, self.b = conv(3, 6), conv(6, 5)

    def made(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return torch.cat([x, self.b(x)], 1)


class Flipped(Readers):  # one producer runs backward through the other's channels
    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.b = conv(3, 8), conv(8, 8)

    def made(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return x + self.b(x).flip(1)


class Palindrome(Readers):  # a tensor and its own mirror image
    def __init__(self) -> None:
        super().__init__(10)
        self.a = conv(3, 10)

    def made(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return x + x.flip(1)


class Halves(Readers):
    def __init__(self) -> None:
        super().__init__(6)
        self.a = conv(3, 12)

    def made(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, 1)
        return left * right


class Rows(Readers):  # channel shuffle behind a grouped conv; a grouped conv reads, too
    def __init__(self) -> None:
        super().__init__(12)
        self.a, self.b, self.c = conv(3, 8), conv(8, 12, groups=2), conv(12, 6, groups=2)

    def made(self, x: Tensor) -> Tensor:
        x = F.channel_shuffle(self.b(self.a(x)), 2)
        return x + self.c(x).repeat(1, 2, 1, 1)


class Padded(Readers):
    def __init__(self) -> None:
        super().__init__(9)
        self.a, self.b, self.pad = conv(3, 5), conv(5, 9), PadChannels(2, 2)

    def made(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.pad(x) + self.b(x)


class Again(Readers):  # a layer that reads what it makes
    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.b = conv(3, 8), conv(8, 8)

    def made(self, x: Tensor) -> Tensor:
        return self.b(self.b(self.a(x)))


class Excited(Readers):
    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.down, self.up = conv(3, 8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def made(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


READERS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: Body(conv(3, 12), 12),
    "two": lambda: Body(conv(3, 12), 12, 2),
    "depthwise": lambda: Body(nn.Sequential(conv(3, 9), conv(9, 9, groups=9)), 9),
    "multiplier": lambda: Body(nn.Sequential(conv(3, 5), conv(5, 15, groups=5)), 15),
    "transposed": lambda: Body(nn.Sequential(conv(3, 6), nn.ConvTranspose2d(6, 8, 3, padding=1), nn.PReLU(8)), 8),
    "pixels": lambda: Body(nn.Sequential(conv(3, 24), nn.PixelShuffle(2)), 6, 3, 8),
    "unpixels": lambda: Body(nn.Sequential(conv(3, 5), nn.PixelUnshuffle(2)), 20, 3, 2),
    "added": Added,
    "joined": Joined,
    "flipped": Flipped,
    "palindrome": Palindrome,
    "halves": Halves,
    "rows": Rows,
    "padded": Padded,
    "again": Again,
    "excited": Excited,
}
