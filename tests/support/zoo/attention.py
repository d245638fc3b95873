"""Small networks that only `decompose` makes prunable: packed attention, and weights that norms compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from jpq.tracing.decompose import decompose
from zoo.tokens import Transformer


class Translate(nn.Module):  # encoder and decoder, a causal mask made on the way, attention weights that nobody reads
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.first, self.last, self.time = nn.Linear(6, 8), nn.Linear(8, 4), int(batch_first)
        self.both = nn.Transformer(8, 4, 1, 1, 10, batch_first=batch_first)
        self.more = nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True, kdim=6, vdim=6, batch_first=True)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        y = self.first(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[self.time], dtype=x.dtype)
        y = self.both(y, y, tgt_mask=mask, memory_key_padding_mask=hidden)
        return self.last(self.more(y, x, x)[0])


class Weighing(nn.Module):  # weights averaged over heads are an output: heads stay
    def __init__(self) -> None:
        super().__init__()
        self.first, self.attend, self.last = nn.Linear(6, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x).relu()
        y, weights = self.attend(x, x, x)
        return self.last(y), weights


class OneHead(nn.Module):  # a single head's values are ordinary channels
    def __init__(self) -> None:
        super().__init__()
        self.first, self.attend, self.last = nn.Linear(6, 8), nn.MultiheadAttention(8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.attend(x, x, x, need_weights=False)[0])


class Windows(nn.Module):  # shifted windows and a map that they do not fit
    def __init__(self, kind: type[ShiftedWindowAttention] = ShiftedWindowAttention) -> None:
        super().__init__()
        self.patch, self.norm, self.last = nn.Conv2d(3, 12, 1), nn.LayerNorm(12), nn.Linear(12, 4)
        self.plain, self.shifted = kind(12, [3, 3], [0, 0], 3), kind(12, [3, 3], [1, 2], 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        x = x + self.plain(self.norm(x))
        return self.last((x + self.shifted(self.norm(x))).mean((1, 2)))


class WindowsV2(Windows):
    def __init__(self) -> None:
        super().__init__(ShiftedWindowAttentionV2)


class Video(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.last = nn.Conv3d(2, 12, 1), nn.LayerNorm(12), nn.Linear(12, 4)
        self.shifted = ShiftedWindowAttention3d(12, [4, 3, 3], [2, 1, 1], 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 4, 1)
        return self.last((x + self.shifted(self.norm(x))).mean((1, 2, 3)))


class Relative(nn.Module):  # MaxViT's
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.last = nn.Conv2d(3, 12, 1), nn.LayerNorm(12), nn.Linear(12, 4)
        self.attend = RelativePositionalMultiHeadAttention(12, 4, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patch(x).flatten(2).transpose(1, 2))[:, None]
        return self.last((x + self.attend(x)).mean((1, 2)))


class Gated(nn.Module):  # halves that meet again: GLU, and SwiGLU by chunk
    def __init__(self) -> None:
        super().__init__()
        self.a, self.glu, self.b = nn.Conv2d(3, 12, 1), nn.GLU(1), nn.Conv2d(6, 10, 3)
        self.c, self.last = nn.Linear(5, 6), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.b(self.glu(self.a(x))).chunk(2, 1)
        x = (nn.functional.silu(left) * right).mean((2, 3))
        return self.last(nn.functional.glu(self.c(x)))


class Normed(nn.Sequential):  # weights that norms compute
    def __init__(self) -> None:
        w, s = parametrizations.weight_norm, parametrizations.spectral_norm
        first = w(nn.Conv2d(3, 8, 3)), nn.ReLU(), s(nn.ConvTranspose2d(8, 6, 2)), nn.Tanh()
        super().__init__(
            *first, nn.Flatten(), w(nn.Linear(54, 7), dim=1), nn.ELU(), nn.utils.weight_norm(nn.Linear(7, 4))
        )


class Vision(nn.Module):  # a small ViT of torch.nn's parts, for images of 8x8
    def __init__(self, classes: int, channels: int, depth: int = 2) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(16, 4, 32, 0.0, "gelu", batch_first=True, norm_first=True)
        self.patch, self.place = nn.Conv2d(channels, 16, 2, 2), nn.Parameter(torch.randn(1, 16, 16) * 0.1)
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(16), enable_nested_tensor=False)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.blocks(x).mean(1))


def fresh(make: Callable[[], nn.Module]) -> nn.Module:
    return decompose(make())


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


HIDDEN = torch.tensor([[False, False, True, False, True], [False, True, False, False, False]])
PACKED: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "transformer": (Transformer, noise(2, 3, 4, 4)),
    "translate": (Translate, (noise(2, 5, 6), HIDDEN)),
    "translate_by_position": (partial(Translate, batch_first=False), (noise(5, 2, 6), HIDDEN)),
    "weighing": (Weighing, noise(5, 2, 6)),
    "one_head": (OneHead, noise(5, 2, 6)),
    "windows": (Windows, noise(2, 3, 4, 5)),
    "windows_v2": (WindowsV2, noise(2, 3, 4, 5)),
    "video": (Video, noise(2, 2, 3, 4, 5)),
    "relative": (Relative, noise(2, 3, 4, 4)),
    "gated": (Gated, noise(2, 3, 4, 4)),
    "normed": (Normed, noise(2, 3, 4, 4)),
}
UNPACKED = {f"{name}_unpacked": (partial(fresh, make), example) for name, (make, example) in PACKED.items()}
