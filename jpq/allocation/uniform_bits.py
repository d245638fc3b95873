"""Uniform bit-widths: one width for all weights and one for all activations (plain quantization-aware training)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from jpq.compression.model import CompressedModel
from jpq.compression.usage import exact_usage
from jpq.costs import COSTS, LayerUse, bops
from jpq.costs.target import Target, all_met, used_share
from jpq.plan import LayerPlan, Plan
from jpq.tracing.channel_shares import ChannelShares
from jpq.tracing.network import Network
from jpq.types import JpqError

Kept = Mapping[str, tuple[bool, ...]]  # channel site -> unit -> whether it stays

Pinned = Mapping[tuple[str, Literal["w", "a"]], int]  # (layer, its weight or its input) -> width

Bounds = tuple[int, int]  # smallest and largest width, in bits

END_BITS = 8  # of what the last layer reads, and at most of the weights of both ends, where ends are wider
LEAST_END_BITS = 4  # of the weights of both ends there

LOWERED_BY_BITS = ("bops", "bops-structured", "size")  # MACs count no bits, and int8 kernels gain no time from fewer

HEADROOM = 1.25  # cost at the initial widths of a search, in multiples of the tightest target


def uniform_plan(net: CompressedModel, w: int, a: int, kept: Kept | None = None, pinned: Pinned | None = None) -> Plan:
    """The plan with one width for all weights and one for all activations; the image keeps its own width.

    Args:
        net: attached.
        w, a: the widths, in bits.
        kept: the units that stay; default: all.
        pinned: tensors with a width of their own.
    """
    current, own = net.plan(), pinned or {}
    image = {layer.name for layer in net.network.layers if layer.reads_input}
    layers = {
        n: replace(x, w_bits=own.get((n, "w"), w), a_bits=x.a_bits if n in image else own.get((n, "a"), a))
        for n, x in current.layers.items()
    }
    all_units = {site: (True,) * len(units) for site, units in current.kept.items()}
    return replace(current, layers=layers, kept=all_units if kept is None else dict(kept))


def decide_uniform_bits(
    net: CompressedModel,
    targets: Sequence[Target],
    w_bits: Sequence[int],
    a_bits: Sequence[int],
    kept: Kept | None = None,
    pinned: Pinned | None = None,
) -> Plan:
    """The plan of the costliest balanced widths (weight and activation bits at most 1 apart) that meet every target.

    Of pairs of equal cost the more balanced is taken; an unbalanced one (W2A5) only where no balanced one fits. The
    image keeps its width, and so do the tensors of `pinned`. All units stay, unless `kept` says which ones.
    Raises JpqError, naming the smallest possible cost, if no pair does.
    """
    return widest_uniform_plans(net, targets, w_bits, a_bits, kept, pinned)[0]


def widest_uniform_plans(
    net: CompressedModel,
    targets: Sequence[Target],
    w_bits: Sequence[int],
    a_bits: Sequence[int],
    kept: Kept | None = None,
    pinned: Pinned | None = None,
) -> list[Plan]:
    """The balanced plans that meet every target with neither width larger in another, the costliest first.

    Weights of 5 bits and inputs of 4 cost nearly as much as the reverse; which is better depends on the network.
    Arguments, choice of unbalanced ones and errors as in `decide_uniform_bits`.
    """
    return _widest(_fits(net, targets, w_bits, a_bits, kept, pinned))


def widest_plans_with_wider_ends(
    net: CompressedModel,
    targets: Sequence[Target],
    w_bits: Sequence[int],
    a_bits: Sequence[int],
    pinned: Pinned | None = None,
) -> list[Plan]:
    """The balanced plans with a wider first and last layer, no width larger in another, the costliest first.

    What the last layer reads has `END_BITS` bits, and the weights of both have one width from `LEAST_END_BITS` to
    `END_BITS` that is not below the body's, as far as `w_bits` and `a_bits` go. Published results of uniform bits
    mostly keep both ends at 8 bits, which takes a large share of a small budget; so narrower ends are tried too.

    Raises JpqError, naming the smallest possible cost, if no such plan meets the targets.
    """
    names = list(net.plan().layers)
    ends = [b for b in w_bits if LEAST_END_BITS <= b <= END_BITS] or [max(w_bits)]
    fits: list[_Fit] = []
    for end in ends:
        wider: dict[tuple[str, Literal["w", "a"]], int] = {(name, "w"): end for name in (*names[:1], *names[-1:])}
        wider |= {(name, "a"): min(END_BITS, max(a_bits)) for name in names[-1:]} | dict(pinned or {})
        try:
            found = _fits(net, targets, [b for b in w_bits if b <= end], a_bits, None, wider)
        except JpqError as error:
            if end == ends[0]:
                raise JpqError(f"{error.command_line} Or leave --wider-ends out: it costs more bits.") from error
            break  # neither do wider ends
        fits += [replace(fit, widths=(*fit.widths, end)) for fit in found]
    return _widest(fits)


@dataclass(frozen=True)
class _Fit:
    """A plan within the targets."""

    widths: tuple[int, ...]  # of weights and activations of the body, then of the ends where they have their own
    bops: float
    plan: Plan


def _fits(
    net: CompressedModel,
    targets: Sequence[Target],
    w_bits: Sequence[int],
    a_bits: Sequence[int],
    kept: Kept | None,
    pinned: Pinned | None,
) -> list[_Fit]:
    """The balanced pairs of widths that meet every target, or unbalanced ones where no balanced pair does."""
    smallest = uniform_plan(net, w_bits[0], a_bits[0], kept, pinned)
    _check_smallest(targets, net.exact_usage(smallest), w_bits[0], a_bits[0])

    def within(widths: Iterable[tuple[int, int]]) -> Iterator[_Fit]:
        for w, a in widths:
            plan = uniform_plan(net, w, a, kept, pinned)
            uses = net.exact_usage(plan)
            if all_met(targets, uses):
                yield _Fit((w, a), float(bops(uses)), plan)

    pairs = list(product(w_bits, a_bits))
    balanced = [(w, a) for w, a in pairs if abs(w - a) <= 1]
    return list(within(balanced)) or list(within(pair for pair in pairs if pair not in balanced))


def _widest(fits: Sequence[_Fit]) -> list[Plan]:
    """The costliest plan, the more balanced of two, and behind it those that no other one exceeds in its widths."""
    ordered = sorted(fits, key=lambda fit: (-fit.bops, abs(fit.widths[0] - fit.widths[1])))
    others = [fit for fit in ordered[1:] if not any(_exceeds(other, fit) for other in ordered)]
    return [ordered[0].plan, *(fit.plan for fit in others)]


def _exceeds(fit: _Fit, other: _Fit) -> bool:
    """Whether a plan has other widths than another, none of which is smaller."""
    return fit.widths != other.widths and all(x >= y for x, y in zip(fit.widths, other.widths, strict=True))


def _check_smallest(targets: Sequence[Target], uses: Sequence[LayerUse], w: int, a: int) -> None:
    """Raise JpqError where the smallest widths exceed a target; uses: the layers at these widths."""
    tightest = max(targets, key=lambda target: used_share(target, uses), default=None)
    if tightest is not None and used_share(tightest, uses) > 1:
        smallest_cost = tightest.format_cost(used_share(tightest, uses) * tightest.limit)
        raise JpqError(
            f"{tightest.flag} {tightest.text} ({tightest.format_cost(tightest.limit)}) cannot be met by uniform bits; "
            f"smallest possible: {smallest_cost}, at {w} and {a} bits. Choose a method that prunes too."
        )


def start_bits(
    network: Network,
    targets: Sequence[Target],
    w_bits: Bounds,
    a_bits: Bounds,
    image_bits: int,
    left: Mapping[str, float] | None = None,
    headroom: float = HEADROOM,
) -> tuple[float, float]:
    """Initial (weight, activation) widths of a search, where the network costs `headroom` times its tightest target.

    Real numbers, at least one bit above the smallest width, so that widths can fall, and at most the largest. With
    targets for MACs and latency alone: the largest.

    From 8 bits everywhere a short search spends its time reducing widths, and the weights learn for grids that they
    will not have. A little above the budget most widths start near their end, and bits move by exchange: the task's
    loss raises all of them, the budget lowers all of them. On CIFAR-10 with ResNet20 (0.9 %, one epoch of search of
    three, seed 0, one run each) the last training loss is lower with a headroom of 1.25 than with 2.

    left: cost -> the share of it that stays whatever is learned (masks of a fixed density).
    """
    shares = ChannelShares(network, ())
    shares_left = left or {}
    targets = [g for g in targets if g.cost in LOWERED_BY_BITS]
    if not targets:
        return float(w_bits[1]), float(a_bits[1])

    def excess(bits: float) -> float:
        return max(
            shares_left.get(g.cost, 1.0) * _cost(network, shares, bits, image_bits, g) / g.limit for g in targets
        )

    low, high = 1.0, 16.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < headroom else (low, middle)
    w, a = (min(max(low, bounds[0] + 1.0), float(bounds[1])) for bounds in (w_bits, a_bits))
    return w, a


def _cost(network: Network, shares: ChannelShares, bits: float, image_bits: int, target: Target) -> float:
    """A target's cost of the network at one real-valued width."""
    layers = [x for x in network.layers if not x.float_reason and not x.kept_float]
    plans = {x.name: LayerPlan(bits, image_bits if x.reads_input else bits, False) for x in layers}  # type: ignore[arg-type]
    return float(COSTS[target.cost](exact_usage(network, shares, Plan("", plans, {}))))
