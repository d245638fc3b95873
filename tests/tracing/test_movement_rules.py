"""Rules for ops that move, pick or mix entries: masked == rebuilt, and which channels stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jpq.export.float_equivalence import check_equivalence, randomize
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))

PERMUTATION = torch.tensor([3, 1, 0, 5, 4, 2])


class Between(nn.Module):
    """A convolution to 8 channels, an op, pooling, and a linear layer that reads `width` channels."""

    def __init__(self, op: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.op, self.a, self.head = op, nn.Conv2d(3, 8, 3, padding=1), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.op(self.a(x).sigmoid() * 2)
        weights = torch.linspace(0.5, 1.5, y[0, 0].numel(), dtype=y.dtype)
        return self.head((y.flatten(2) * weights).mean(2))


def pick(x: Tensor) -> Tensor:
    """Random columns, the same for every row: [2, 8, 6, 6]."""
    return PERMUTATION.expand(x.shape[0], x.shape[1], x.shape[2], 6)


FREE: dict[str, tuple[Callable[[Tensor], Tensor], int, int]] = {  # op, channels after it, units
    "reshape_as": (lambda x: x.flatten(2).reshape_as(x), 8, 8),
    "view_as": (lambda x: x.flatten(1).view_as(x * 2), 8, 8),
    "im2col": (lambda x: F.unfold(x, 3, padding=1), 72, 8),
    "im2col, uneven": (lambda x: F.unfold(x, (1, 3), stride=2), 24, 8),
    "col2im": (lambda x: F.fold(x.flatten(2)[..., :25], (6, 6), 2), 2, 2),
    "unfold and fold": (lambda x: F.fold(F.unfold(x, 3) * 0.5, (6, 6), 3), 8, 8),
    "Tensor.unfold": (lambda x: x.unfold(2, 3, 1).unfold(3, 3, 2), 8, 8),
    "gather": (lambda x: x.gather(3, pick(x)), 8, 8),
    "take_along_dim": (lambda x: x.take_along_dim(PERMUTATION[None, None, None], 3), 8, 8),
    "index_select": (lambda x: x.index_select(2, PERMUTATION), 8, 8),
    "index": (lambda x: x[:, :, PERMUTATION], 8, 8),
    "index of two dims": (lambda x: x[:, :, PERMUTATION, torch.arange(6)], 8, 8),
    "index of each sample": (lambda x: x[torch.arange(2), :, torch.tensor([3, 1])], 8, 8),
    "rot90": (lambda x: torch.rot90(x, 1, (2, 3)), 8, 8),
    "rot90 with channels": (lambda x: torch.rot90(x, 3, (1, 2)).transpose(1, 2), 8, 8),
    "rot90 by half a turn": (lambda x: torch.rot90(x, 2, (1, 3)), 8, 8),
    "topk": (lambda x: x.topk(3, dim=2)[0], 8, 8),
    "sort": (lambda x: x.sort(dim=3)[0], 8, 8),
    "cumprod": (lambda x: x.cumprod(2), 8, 8),
    "cummax": (lambda x: x.cummax(3)[0], 8, 8),
    "cumsum": (lambda x: x.cumsum(-1), 8, 8),
    "roll": (lambda x: x.roll((1, 2), (2, 3)), 8, 8),
    "tile": (lambda x: x.tile(2, 1), 8, 8),
    "tile of channels": (lambda x: x.tile(2, 1, 1), 16, 8),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, dim=1), 24, 8),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), 2, 2),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), 32, 8),
    "channel_shuffle": (lambda x: torch.channel_shuffle(x, 4), 8, 2),
    "channel_shuffle of a signal": (lambda x: torch.channel_shuffle(x.flatten(2), 4), 8, 2),
    "channel_shuffle of a volume": (lambda x: torch.channel_shuffle(x.unflatten(2, (2, 3)), 2), 8, 4),
    "glu": (lambda x: F.glu(x, 1), 4, 4),
    "unflatten": (lambda x: x.unflatten(1, (2, 4)).flatten(1, 2), 8, 4),
    "moveaxis": (lambda x: x.moveaxis((1, 2), (3, 1)).moveaxis(3, 1), 8, 8),
    "grid_sample": (lambda x: F.grid_sample(x, x.new_zeros(2, 4, 4, 2) + 0.3, align_corners=False), 8, 8),
    "max_unpool": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), 8, 8),
    "outer": (lambda x: x * torch.outer(x.mean((0, 2, 3)), torch.linspace(0, 1, 36)).view(8, 6, 6), 8, 8),
    "pointwise": (lambda x: torch.asinh(x) + torch.nan_to_num(x).frac() + x.atan2(x + 1), 8, 8),
}


@pytest.mark.parametrize("name", FREE)
def test_masked_is_rebuilt(name: str) -> None:
    op, width, units = FREE[name]
    torch.manual_seed(0)
    model = Between(op, width)
    network = trace(model, IMAGES)
    assert network.unknown_ops == ()
    sites = channels(network)
    assert [s.n for s in sites] == [units]
    randomize(model, IMAGES)
    for seed in range(2):
        result = check_equivalence(model, network, sites, IMAGES, seed)
        assert result.difference < 1e-12 < 1e-6 < result.sensitivity


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (lambda x: F.affine_grid(x.amax((2, 3)).unflatten(1, (2, 4))[..., :3], [2, 1, 8, 9], False), "affine_grid"),
        (lambda x: x.roll(1, 1), "rolled"),
        (lambda x: x.roll(5), "rolled"),
        (lambda x: x.topk(8, dim=1)[0], "aten.topk"),
        (lambda x: x.index_select(1, torch.arange(7, -1, -1)), "picked by index"),
        (lambda x: x[:, [3, 1, 0, 2, 5, 4, 7, 6]], "picked by index"),
        (lambda x: x.gather(1, x.argsort(1)), "aten.argsort|picked by index"),
        (lambda x: x.take_along_dim(torch.arange(7, -1, -1)[None, :, None, None], 1), "picked by index"),
    ],
)
def test_channels_that_are_mixed_or_picked_stay(op: Callable[[Tensor], Tensor], reason: str) -> None:
    network = trace(Between(op, 8), IMAGES)
    assert channels(network) == ()
    assert network.unknown_ops == ()
    assert all(
        reason.partition("|")[0] in why or reason.partition("|")[2] in why
        for why in network.frozen.values()
        if "output" not in why
    )


class Bags(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(11, 6, mode=mode), nn.Linear(6, 3)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.table(index))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_columns_of_an_embedding_bag(mode: str) -> None:
    torch.manual_seed(0)
    model, index = Bags(mode), torch.randint(0, 11, (4, 5))
    network = trace(model, index)
    assert network.unknown_ops == ()
    sites = channels(network)
    assert [(s.name, s.n) for s in sites] == [("table", 6)]
    randomize(model, index)
    assert check_equivalence(model, network, sites, index, 0).difference < 1e-12


class Regions(nn.Module):
    """Regions without autocast and without gradient, which torch.export puts into subgraphs; one inside the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (nn.Linear(i, o) for i, o in ((6, 8), (8, 7), (7, 9), (9, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with torch.autocast("cpu", enabled=False):
            y = self.b(x.relu())
            with torch.no_grad():
                z = self.c(y).sigmoid()
        return self.head(z * 2) + y.sum(-1, keepdim=True) * 0


def test_layers_in_regions_of_their_own_are_read() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    model = Regions()
    network = trace(model, x)
    assert network.unknown_ops == ()
    assert [layer.name for layer in network.layers] == ["a", "b", "c", "head"]
    sites = channels(network)
    assert [s.name for s in sites] == ["a", "c"], "a sum over b's channels reaches the output"
    randomize(model, x)
    assert check_equivalence(model, network, sites, x, 0).difference < 1e-12


class Mixer(nn.Module):
    """A mixer whose products over tokens are convolutions with a kernel of one position, as in many implementations."""

    def __init__(self, kernel: int = 1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.up, self.down = nn.Conv1d(9, 12, kernel, padding=kernel // 2), nn.ConvTranspose1d(12, 9, 1)
        self.norm, self.wide, self.narrow, self.head = (
            nn.LayerNorm(8), nn.Linear(8, 10), nn.Linear(10, 8), nn.Linear(8, 4)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = y + self.down(self.up(y).relu())
        y = y + self.narrow(self.wide(self.norm(y)).sigmoid())
        return self.head(y.mean(1))


def test_a_kernel_of_one_position_passes_the_channels_behind() -> None:
    model = Mixer()
    network = trace(model, IMAGES)
    sites = channels(network)
    assert [(s.name, s.n) for s in sites] == [("up", 12), ("wide", 10)], "all features are in LayerNorm's averages"
    model.norm = nn.Identity()  # type: ignore[assignment]
    network = trace(model, IMAGES)
    sites = channels(network)
    assert [(s.name, s.n) for s in sites] == [("patches", 8), ("up", 12), ("wide", 10)]
    up = next(layer for layer in network.layers if layer.name == "up")
    assert len(up.positions) == 1, "its work falls with the features"
    randomize(model, IMAGES)
    for seed in range(2):
        result = check_equivalence(model, network, sites, IMAGES, seed)
        assert result.difference < 1e-12 < 1e-6 < result.sensitivity


def test_a_kernel_of_more_positions_keeps_the_channels_behind() -> None:
    model = Mixer(3)
    model.norm = nn.Identity()  # type: ignore[assignment]
    assert [s.name for s in channels(trace(model, IMAGES))] == ["up", "wide"]
