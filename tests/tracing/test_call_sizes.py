"""Sizes that the model's code names: they follow the kept channels, and masked == rebuilt at every batch size."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import Head, conv

import jpq
from jpq.export.float_equivalence import (
    check_equivalence,
    draw_decisions,
    dropped_labels,
    float64_outputs,
    masked_weights,
    randomize,
    relative_difference,
)
from jpq.plan import Plan, from_json
from jpq.tracing.call_sizes import CallSizes, is_call_size, name_size, parse_size, resize_calls
from jpq.tracing.own_calls import OwnCall
from jpq.tracing.shrink import apply_slices, compute_slices, freeze_unshrinkable
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace
from jpq.types import JpqError

TOKENS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Heads(nn.Module):
    """ViT's attention as timm writes it: the width of the result is that of the input."""

    def __init__(self, d: int = 24, h: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = h, d // h
        self.first, self.qkv, self.proj = nn.Linear(8, d), nn.Linear(d, 3 * d), nn.Linear(d, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class RigidHeads(Heads):
    """The older form: the size of a head is computed from the number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attention = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(b, n, c))


class GroupedHeads(nn.Module):
    """LLaMA's attention: rotated queries and keys, and fewer keys and values than queries."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.groups = 4, 2
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 24), nn.Linear(8, 12), nn.Linear(8, 12)
        self.o_proj, self.head = nn.Linear(24, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[:-1]
        q = self.q_proj(x).view(*shape, -1, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(*shape, -1, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(*shape, -1, self.head_dim).transpose(1, 2)
        angle = torch.arange(shape[1])[:, None] / torch.tensor([1.0, 9.0, 1.0, 9.0])
        q, k = (y * angle.cos() + rotate_half(y) * angle.sin() for y in (q, k))
        y = F.scaled_dot_product_attention(q, repeat_kv(k, self.groups), repeat_kv(v, self.groups), is_causal=True)
        return self.head(self.o_proj(y.transpose(1, 2).reshape(*shape, -1)))


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def repeat_kv(x: Tensor, times: int) -> Tensor:
    b, heads, n, size = x.shape
    return x[:, :, None, :, :].expand(b, heads, times, n, size).reshape(b, heads * times, n, size)


class Gated(nn.Module):
    """A gated convolution with unequal parts from an attribute, as MambaOut has it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (12, 7, 5)
        self.fc1, self.conv, self.fc2 = nn.Linear(8, 24), nn.Conv1d(5, 5, 3, padding=1, groups=5), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        g, i, c = torch.split(self.fc1(x), self.sizes, dim=-1)
        c = self.conv(c.transpose(1, 2)).transpose(1, 2)
        return self.fc2(F.gelu(g) * torch.cat((i, c), dim=-1))


class Res2(nn.Module):
    """Res2Net: parts of a width that the constructor fixes."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.a, self.convs, self.head = conv(3, 12), nn.ModuleList(conv(4, 4) for _ in range(2)), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.a(x), self.width, 1)
        y = self.convs[0](parts[0])
        return self.head(torch.cat([y, self.convs[1](y + parts[1]), parts[2]], 1))


class Mixed(nn.Module):
    """MixNet: a list of kernel sizes for unequal parts; the last part by its rest."""

    def __init__(self) -> None:
        super().__init__()
        self.splits = [5, 3, 2]
        self.a, self.head = conv(3, 10), Head(10)
        self.convs = nn.ModuleList(nn.Conv2d(n, n, k, padding=k // 2, groups=n) for n, k in ((5, 3), (3, 5), (2, 1)))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.a(x).split(self.splits, 1)
        return self.head(torch.cat([c(p) for c, p in zip(self.convs, parts, strict=True)], 1))


class Rest(nn.Module):
    """A split by one number that does not divide the width, and a chunk likewise."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 10), conv(6, 6), conv(4, 4), Head(10)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = self.a(x).split(6, dim=1)
        y = torch.cat([self.b(first), self.c(rest)], 1)
        parts = torch.chunk(y, 4, dim=1)  # 3, 3, 3 and 1
        return self.head(torch.cat(parts[::-1], 1))


class Blurred(nn.Module):
    """BlurPool: one fixed kernel for each of a number of channels that is an attribute."""

    class Blur(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.channels = channels
            self.register_buffer("filt", torch.tensor([1.0, 2, 1]).outer(torch.ones(3)).repeat(channels, 1, 1, 1) / 9)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.filt, stride=2, padding=1, groups=self.channels)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.blur, self.head = conv(3, 8), self.Blur(8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blur(self.a(x)))


class Sliced(nn.Module):
    """DPN: a residual part and a dense part, cut at fixed places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 10), conv(6, 6), conv(2, 3), Head(9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x1, x2, x3 = x[:, :6, :, :], x[:, 6:8], x.narrow(1, 8, 2)
        return self.head(torch.cat([x1 + self.b(x1), self.c(x2 * x3)], dim=1))


class Shortcut(nn.Module):
    """A shortcut padded by zero channels, in numbers of the code (the shape of ResNet on CIFAR)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 4), conv(4, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(F.pad(x, (0, 0, 0, 0, 1, 3)) + self.b(x))


class Folded(nn.Module):
    """Channels that are merged with the batch and taken apart again, by numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), nn.Conv2d(1, 1, 3, padding=1), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x.reshape(x.shape[0] * 6, 1, 6, 6))
        return self.head(y.view(-1, 6, 6, 6))


class MergedHeads(nn.Module):
    """BoTNet's attention: batch and heads are one dim, so its size is no number of channels alone."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.a, self.qkv, self.head = 3, conv(3, 4), nn.Conv2d(4, 36, 1), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        q, k, v = (y.reshape(n * self.heads, 4, -1) for y in self.qkv(self.a(x)).split(12, 1))
        y = (q.transpose(1, 2) @ k).softmax(-1) @ v.transpose(1, 2)
        return self.head(y.transpose(1, 2).reshape(n, 12, 6, 6))


FOLLOWING: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, int]]] = {
    "heads": (Heads, TOKENS, {"first": 24, "qkv": 4}),
    "rigid heads": (RigidHeads, TOKENS, {"first": 24, "qkv": 4}),
    "grouped heads": (GroupedHeads, TOKENS, {"q_proj": 3, "o_proj": 8}),
    "gated": (Gated, TOKENS, {"fc1": 7, "fc1->fc2": 5}),
    "res2": (Res2, IMAGES, {"a.0": 4, "convs.1.0": 4}),
    "mixed": (Mixed, IMAGES, {"a.0": 5, "a.0->head.2": 3, "a.0->head.2'": 2}),
    "rest": (Rest, IMAGES, {"a.0": 6, "a.0->c.0": 4, "b.0": 6, "c.0": 4}),
    "blurred": (Blurred, IMAGES, {"a.0": 8}),
    "sliced": (Sliced, IMAGES, {"a.0": 6, "a.0->c.0": 2, "c.0": 3}),
    "shortcut": (Shortcut, IMAGES, {"a.0": 4, "b.0": 4}),
    "folded": (Folded, IMAGES, {"a.0": 6}),
    "merged heads": (MergedHeads, IMAGES, {"a.0": 4}),
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_sites(name: str) -> None:
    make, x, expected = FOLLOWING[name]
    assert {s.name: s.n for s in channels(trace(make(), x))} == expected


@pytest.mark.parametrize("name", FOLLOWING)
def test_masked_is_rebuilt_at_every_batch_size(name: str) -> None:
    make, x, _ = FOLLOWING[name]
    torch.manual_seed(0)
    model = make()
    network = trace(model, x)
    sites = channels(network)
    randomize(model, x)
    for seed in range(4):
        result = check_equivalence(model, network, sites, x, seed)
        assert result.difference < 1e-12 < 1e-3 < result.sensitivity
    keep = draw_decisions(sites, 0)
    small = jpq.tracing.remove_channels(model, network, dropped_labels(sites, keep))
    more = torch.cat([x, x.flip(0), x[:1]])
    again = pickle.loads(pickle.dumps(copy.deepcopy(small))) if "<locals>" not in type(model).__qualname__ else small
    with masked_weights(model, network, sites, keep) as masked:
        expected = float64_outputs(masked, more)
        for smaller in (small, again):
            assert relative_difference(expected, float64_outputs(smaller, more)) < 1e-12
    exported = torch.export.export(small, (x.double(),)).module()
    assert relative_difference(float64_outputs(small, x), float64_outputs(exported, x)) < 1e-12


@pytest.mark.parametrize("name", ["heads", "gated", "blurred"])
def test_a_plan_in_a_file_rebuilds_without_the_example(name: str) -> None:
    make, x, _ = FOLLOWING[name]
    model = make().double().eval()
    network = trace(model, x.double())
    slices = compute_slices(network, dropped_labels(channels(network), draw_decisions(channels(network), 1)))
    plan = Plan("djpq", {}, {}, slices=slices)
    read = from_json(plan.to_json(), "plan.json")
    assert read.slices == slices
    assert any(map(is_call_size, slices))
    one, other = (apply_slices(copy.deepcopy(model), s) for s in (slices, json.loads(json.dumps(read.slices))))
    assert torch.equal(one(x.double()), other(x.double()))
    twice = compute_slices(trace(one, x.double()), [])
    assert not twice, "nothing more is dropped"


def test_a_size_is_held_where_only_the_code_s_source_of_it_shrinks() -> None:
    torch.manual_seed(0)
    model = randomize(Heads(), TOKENS)
    network = trace(model.float(), TOKENS)
    model.double()
    first, heads = channels(network)
    keep = {first.name: torch.tensor([[0.0] * 5 + [1.0] * 19]), heads.name: torch.ones(1, 4)}
    small = jpq.tracing.remove_channels(model, network, first.labels[:5].tolist())
    with masked_weights(model, network, [first, heads], keep) as masked:
        assert relative_difference(float64_outputs(masked, TOKENS), float64_outputs(small, TOKENS)) < 1e-12
    assert compute_slices(network, []) == {}


def test_a_smaller_model_can_be_made_smaller() -> None:
    torch.manual_seed(0)
    model = randomize(Heads(), TOKENS)
    for _ in range(2):
        network = trace(model.float(), TOKENS)
        model.double()
        sites = channels(network)
        assert "qkv" in [s.name for s in sites]
        dropped = [int(s.labels[0]) for s in sites]
        keep = {s.name: torch.tensor([[0.0] + [1.0] * (s.n - 1)]) for s in sites}
        small = jpq.tracing.remove_channels(model, network, dropped)
        with masked_weights(model, network, sites, keep) as masked:
            expected = float64_outputs(masked, TOKENS)
        assert relative_difference(expected, float64_outputs(small, TOKENS)) < 1e-12
        model = small
    assert model.qkv.out_features == 3 * 2 * 6


class Wrong(nn.Module):
    """A size that cannot follow: it is used as a number, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).reshape(-1, 6, 12)
        return self.head(y * (y.shape[-1] / 12))


def test_a_size_that_is_also_a_number_stays_frozen() -> None:
    network = trace(Wrong(), TOKENS)
    assert channels(network) == ()
    assert "fixed sizes" in network.frozen[int(network.layer("a").outputs[0])]
    assert not network.attributes


@dataclass
class Outcome:
    values: Tensor


class WrongInADataclass(Wrong):
    def forward(self, x: Tensor) -> Outcome:  # type: ignore[override]
        return Outcome(super().forward(x))


def test_outputs_in_a_dataclass_are_compared_too() -> None:
    model = WrongInADataclass()
    network = trace(model, TOKENS)
    assert channels(network) == (), "the smaller copy runs, and computes something else"
    free = nn.Sequential(nn.Linear(8, 12), WrongInADataclass())
    free[1].a = nn.Linear(12, 12)
    network = trace(free, TOKENS)
    assert [s.n for s in channels(network)] == [12]
    randomize(free, TOKENS)
    assert check_equivalence(free, network, channels(network), TOKENS, 0).difference < 1e-12


def test_sizes_that_the_code_computes_itself_are_left_alone() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.head(y.reshape(-1, y.shape[-1]))

    network = trace(Own(), TOKENS)
    assert [s.n for s in channels(network)] == [12]
    assert not network.attributes


def test_names() -> None:
    name = name_size(OwnCall("blocks.0.attn", "reshape:1"), ["*", "*", 3, "n", -1])
    assert name == "blocks.0.attn@reshape:1[*, *, 3, n, -1]"
    assert parse_size(name) == (OwnCall("blocks.0.attn", "reshape:1"), ["*", "*", 3, "n", -1])
    assert is_call_size(name)
    for other in ("blocks.0.attn.num_heads", "a@reshape[n]", "a@reshape:1", "a@reshape:0[m]"):
        assert not is_call_size(other)
        with pytest.raises(JpqError, match="names no size of a call"):
            parse_size(other)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere@reshape:0[*, n]", "which this Heads has not"),
        ("@eval:0[n]", "cannot rewrite"),
        ("@reshape:0[--1]", "names no size of a call"),
    ],
)
def test_a_plan_of_another_model_is_refused(name: str, says: str) -> None:
    with pytest.raises(JpqError, match=says):
        resize_calls(Heads(), {name: 3})


class Forms(nn.Module):
    """Every way to write a call with sizes, for `n` channels of which the last part has `n` - 1."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, x: Tensor) -> list[Tensor]:
        n, w = self.n, x.new_ones(x.shape[1], 1, 1)
        y = x.flatten(1)  # [2, 3 n]
        return [
            y.reshape(2, n, 3), y.reshape((2, n, 3)), torch.reshape(y, (2, n, 3)), torch.reshape(y, shape=[2, n, 3]),
            y.view(size=(2, n, 3)), y.view(-1, n, 3), y.unflatten(1, (n, 3)), torch.unflatten(y, dim=1, sizes=(n, 3)),
            x[:, 1:n], x[..., 1:n, :], x[0, 1:n], x[None, :, 1:n], x[:, : n - 1],
            torch.narrow(x, dim=1, start=1, length=n - 1), x.narrow(1, n - 1, 1),
            F.conv1d(x, w, groups=n), F.conv1d(x, w, None, 1, 0, 1, n), F.conv_transpose1d(x, w, None, 1, 0, 0, n),
            F.pad(x, pad=(0, 0, n, 1)), F.pad(x, (0, 0, 1, n)), F.layer_norm(x.mT, (n,)), F.rms_norm(x.mT, [n]),
            x.expand(2, n, 3), x.expand((2, n, 3)), *x.split([1, n - 1], dim=1),
            *torch.split(tensor=x, split_size_or_sections=n - 1, dim=1),
        ]  # fmt: skip


def test_every_form_of_a_call_is_resized() -> None:
    sizes = {f"reshape:{k}[*, n, 3]": 5 for k in range(4)} | {f"view:{k}[*, n, *]": 5 for k in range(2)}
    sizes |= {"unflatten:0[n, 3]": 5, "unflatten:1[n, 3]": 5, "__getitem__:0[*, *, 1, n]": 5}
    sizes |= {"__getitem__:1[*, *, 1, n]": 5, "__getitem__:2[1, n]": 5, "__getitem__:3[*, *, *, *, 1, n]": 5}
    sizes |= {"__getitem__:4[*, *, *, n]": 4, "narrow:0[1, n]": 4, "narrow:1[n, 1]": 4, "conv1d:0[n]": 5}
    sizes |= {"conv1d:1[n]": 5, "conv_transpose1d:0[n]": 5, "pad:0[*, *, n, *]": 5, "pad:1[*, *, *, n]": 5}
    sizes |= {"layer_norm:0[n]": 5, "rms_norm:0[n]": 5, "expand:0[*, n, *]": 5, "expand:1[*, n, *]": 5}
    sizes |= {"split:0[1, n]": 4, "split:1[n, 1]": 4}
    model, x = Forms(4), torch.randn(2, 5, 3)
    resize_calls(model, {f"@{name}": count for name, count in sizes.items()})
    for y, expected in zip(model(x), Forms(5)(x), strict=True):
        assert torch.equal(y, expected)
    with pytest.raises(RuntimeError):
        Forms(4)(x)


def test_more_sites_never_fewer() -> None:
    """Where rewriting is wrong, what passes without it is still free."""
    model = Heads()
    network = trace(model, TOKENS)
    nonsense = CallSizes({"@reshape:0[*, *, 3, n, 7]": network.layer("first").outputs}, {})
    plain = trace(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)), TOKENS)
    again = freeze_unshrinkable(
        nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)), plain, (TOKENS,), {}, set(), nonsense
    )
    assert [s.n for s in channels(again)] == [6]


class AroundTheLast(nn.Module):
    """All channels but the last go around a branch, which takes that one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(torch.cat([y[:, :15], self.norm(y[:, 15:])], 1))


def test_no_part_of_a_cut_loses_all_of_its_channels() -> None:
    model, x = AroundTheLast().eval(), torch.randn(2, 3, 5, 5)
    network = trace(model, x)
    sites = channels(network)
    assert sorted(site.n for site in sites) == [1, 15]
    wide = randomize(model.double(), x.double())
    for seed in range(4):
        assert check_equivalence(wide, network, sites, x.double(), seed, share=0.1).difference <= 1e-9
