"""Heads of grouped and multi-query attention in many ways of writing them: free, and masked == rebuilt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jpq.export.float_equivalence import check_equivalence, randomize
from jpq.tracing import own_calls
from jpq.tracing.decompose import decompose
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace

WIDTH, HEADS, GROUPS, SIZE = 16, 8, 2, 4  # GROUPS: heads of keys and values in grouped attention

TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))

Attend = Callable[["Grouped", Tensor], Tensor]


class Grouped(nn.Module):
    """Attention with `groups` heads of keys and values, written as `attend` does."""

    def __init__(self, attend: Attend, groups: int) -> None:
        super().__init__()
        self.attend, self.heads_of_keys, self.num_heads = attend, groups, HEADS
        self.first, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * SIZE) for n in (HEADS, groups, groups))
        self.qkv, self.o = nn.Linear(WIDTH, (HEADS + 2 * groups) * SIZE), nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x + self.o(self.attend(self, x)))

    def split(self, x: Tensor) -> Tensor:
        """[B, T, heads * size] -> [B, heads, T, size]."""
        return x.view(*x.shape[:-1], -1, SIZE).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """[B, heads, T, size] -> [B, T, heads * size]."""
    return x.transpose(1, 2).flatten(2)


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def five_dims(s: Grouped, x: Tensor) -> Tensor:
    b, t, _ = x.shape
    q = s.q(x).view(b, t, s.heads_of_keys, s.num_heads // s.heads_of_keys, SIZE).permute(0, 2, 3, 1, 4)
    k, v = (s.split(y)[:, :, None] for y in (s.k(x), s.v(x)))
    return products(q, k, v).permute(0, 3, 1, 2, 4).reshape(b, t, -1)


def five_dims_by_einsum(s: Grouped, x: Tensor) -> Tensor:
    b, t, _ = x.shape
    q = s.q(x).view(b, t, s.heads_of_keys, s.num_heads // s.heads_of_keys, SIZE)
    k, v = (y.view(b, t, s.heads_of_keys, SIZE) for y in (s.k(x), s.v(x)))
    scores = torch.einsum("bqgnd,bkgd->bgnqk", q, k).softmax(-1)
    return torch.einsum("bgnqk,bkgd->bqgnd", scores, v).reshape(b, t, -1)


def packed_by_groups(s: Grouped, x: Tensor) -> Tensor:
    """Falcon: each group's queries, key and value lie side by side."""
    b, t, _ = x.shape
    qkv = s.qkv(x).view(b, t, -1, s.num_heads // s.heads_of_keys + 2, SIZE)
    q, k, v = qkv[:, :, :, :-2], qkv[:, :, :, [-2]], qkv[:, :, :, [-1]]
    k, v = torch.broadcast_to(k, q.shape), torch.broadcast_to(v, q.shape)
    q, k, v = (y.flatten(2, 3).transpose(1, 2) for y in (q, k, v))
    return merge(F.scaled_dot_product_attention(q, k, v))


def packed_in_a_row(s: Grouped, x: Tensor) -> Tensor:
    q, k, v = s.qkv(x).split([HEADS * SIZE, GROUPS * SIZE, GROUPS * SIZE], -1)
    return merge(F.scaled_dot_product_attention(s.split(q), s.split(k), s.split(v), enable_gqa=True))


def broadcast(s: Grouped, x: Tensor) -> Tensor:
    return merge(F.scaled_dot_product_attention(s.split(s.q(x)), s.k(x)[:, None], s.v(x)[:, None]))


def grouped_flag(s: Grouped, x: Tensor) -> Tensor:
    return merge(F.scaled_dot_product_attention(*(s.split(p(x)) for p in (s.q, s.k, s.v)), enable_gqa=True))


def by_einsum(s: Grouped, x: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bkd->bhqk", s.split(s.q(x)), s.k(x)).softmax(-1)
    return merge(torch.einsum("bhqk,bkd->bhqd", scores, s.v(x)))


def rows_of_heads(s: Grouped, x: Tensor) -> Tensor:
    """GPT-BigCode: heads and tokens of queries are rows of one matrix."""
    b, t, _ = x.shape
    q = s.q(x).view(b, t, s.num_heads, SIZE).reshape(b, t * s.num_heads, SIZE)
    scores = torch.bmm(q, s.k(x).transpose(1, 2)).view(b, t, s.num_heads, t).softmax(-1)
    return torch.bmm(scores.view(b, t * s.num_heads, t), s.v(x)).view(b, t, s.num_heads * SIZE)


def expanded(s: Grouped, x: Tensor) -> Tensor:
    """Gemma: LLaMA's repetition of one head of keys."""

    def repeat(y: Tensor) -> Tensor:
        b, n, t, size = y.shape
        return y[:, :, None].expand(b, n, HEADS // n, t, size).reshape(b, HEADS, t, size)

    return merge(products(s.split(s.q(x)), repeat(s.split(s.k(x))), repeat(s.split(s.v(x)))))


def interleaved(s: Grouped, x: Tensor) -> Tensor:
    times = s.num_heads // s.heads_of_keys
    k, v = (s.split(y).repeat_interleave(times, dim=1) for y in (s.k(x), s.v(x)))
    return merge(products(s.split(s.q(x)), k, v))


def repeated(s: Grouped, x: Tensor) -> Tensor:
    k, v = (s.split(y).repeat(1, HEADS, 1, 1) for y in (s.k(x), s.v(x)))
    return merge(products(s.split(s.q(x)), k, v))


def tiled(s: Grouped, x: Tensor) -> Tensor:
    k, v = (torch.tile(s.split(y), (1, HEADS, 1, 1)) for y in (s.k(x), s.v(x)))
    return merge(products(s.split(s.q(x)), k, v))


def expanded_as(s: Grouped, x: Tensor) -> Tensor:
    q = s.split(s.q(x))
    return merge(products(q, s.split(s.k(x)).expand_as(q), s.split(s.v(x)).expand_as(q)))


def masked(s: Grouped, x: Tensor) -> Tensor:
    """A mask that is expanded to the number of heads."""
    b, t, _ = x.shape
    hidden = torch.ones(t, t).tril().bool()[None, None].expand(b, HEADS, t, t)
    return merge(F.scaled_dot_product_attention(*(s.split(p(x)) for p in (s.q, s.k, s.v)), hidden, enable_gqa=True))


WRITINGS: dict[str, tuple[Attend, int, tuple[str, int]]] = {
    "five dims": (five_dims, GROUPS, ("q", GROUPS)),
    "five dims by einsum": (five_dims_by_einsum, GROUPS, ("q", GROUPS)),
    "packed by groups": (packed_by_groups, GROUPS, ("qkv", GROUPS)),
    "packed in a row": (packed_in_a_row, GROUPS, ("qkv", GROUPS)),
    "grouped flag": (grouped_flag, GROUPS, ("q", GROUPS)),
    "masked": (masked, GROUPS, ("q", GROUPS)),
    "interleaved": (interleaved, GROUPS, ("k", GROUPS)),
    "one: broadcast": (broadcast, 1, ("q", HEADS)),
    "one: grouped flag": (grouped_flag, 1, ("q", HEADS)),
    "one: by einsum": (by_einsum, 1, ("q", HEADS)),
    "one: rows of heads": (rows_of_heads, 1, ("q", HEADS)),
    "one: expanded": (expanded, 1, ("q", HEADS)),
    "one: interleaved": (interleaved, 1, ("q", HEADS)),
    "one: repeated": (repeated, 1, ("q", HEADS)),
    "one: tiled": (tiled, 1, ("q", HEADS)),
    "one: expanded as": (expanded_as, 1, ("q", HEADS)),
}


@pytest.mark.parametrize("name", WRITINGS)
def test_heads_are_free_and_masked_is_rebuilt(name: str) -> None:
    attend, groups, (site, units) = WRITINGS[name]
    torch.manual_seed(0)
    model = Grouped(attend, groups)
    network = trace(model, TOKENS)
    sites = channels(network)
    assert {s.name: s.n for s in sites} == {"first": WIDTH, site: units}
    randomize(model, TOKENS)
    for seed in range(3):
        result = check_equivalence(model, network, sites, TOKENS, seed)
        assert result.difference < 1e-12 < 1e-3 < result.sensitivity


class Projected(nn.Module):
    """Projections, attention and output by einsum, with any dims before the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(WIDTH, 4, SIZE)) for _ in range(3))
        self.o = nn.Parameter(torch.randn(4, SIZE, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        q, k, v = (torch.einsum("...d,dhk->...hk", x, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("...qhd,...khd->...hqk", q, k).softmax(-1)
        return self.head(x + torch.einsum("...hk,hkd->...d", torch.einsum("...hqk,...khd->...qhd", scores, v), self.o))


class Biased(nn.Module):
    """Attention whose bias a method of another module makes, to a shape that is a tuple of the constructor's (timm)."""

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.bias_shape = HEADS, (5, 5, HEADS)
            self.mlp = nn.Linear(2, HEADS)
            self.register_buffer("places", torch.randn(25, 2))

        def get_bias(self) -> Tensor:
            return self.mlp(self.places).view(-1, self.heads).view(self.bias_shape).permute(2, 0, 1)[None]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.qkv, self.o = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3 * HEADS * SIZE), nn.Linear(32, WIDTH)
        self.bias, self.head = self.Bias(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, SIZE)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.head(x + self.o(merge(F.scaled_dot_product_attention(q, k, v, self.bias.get_bias()))))


@pytest.mark.parametrize(("make", "site", "units"), [(Projected, "q_layer", 4), (Biased, "qkv", HEADS)])
def test_heads_of_projections_by_einsum_and_of_biases(make: type[nn.Module], site: str, units: int) -> None:
    torch.manual_seed(0)
    model = randomize(make(), TOKENS)
    model = decompose(model.float(), TOKENS)
    network = trace(model, TOKENS)
    sites = channels(network)
    assert {s.name: s.n for s in sites} == {"first": WIDTH, site: units}
    result = check_equivalence(model.double(), network, sites, TOKENS, 0)
    assert result.difference < 1e-12 < 1e-3 < result.sensitivity


def test_calls_in_a_method_of_another_module_belong_to_the_forward_that_runs() -> None:
    model, found = Biased().eval(), []

    def note(call: own_calls.OwnCall | None, function: object, *_: object) -> None:
        if getattr(function, "__name__", "") == "view":
            found.append(call)

    with own_calls.observe_calls(model, note):
        model(TOKENS)
    assert found == [own_calls.OwnCall("", "view:0"), own_calls.OwnCall("", "view:1")]


def test_of_two_merged_dims_with_channels_the_first_that_is_free_can_go() -> None:
    """Global context: a map of one channel is merged with positions, the channels beside it are not held by it."""

    class Context(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.weigh, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 1, 1), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            weights = self.weigh(x).reshape(x.shape[0], 1, -1).softmax(-1)[..., None]
            return self.b((x.reshape(x.shape[0], 8, -1)[:, None] @ weights).view(x.shape[0], 8))

    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    model = Context()
    network = trace(model, x)
    sites = channels(network)
    assert {s.name: s.n for s in sites} == {"a": 8}
    assert check_equivalence(randomize(model, x), network, sites, x, 0).difference < 1e-12
