"""Targets ("1%", "12M", "50KB", "3ms") and the controller that drives the cost to them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from jpq.costs import COSTS, LayerUse, baseline, dense, latency_ns
from jpq.types import JpqError

_NUMBER = r"[0-9]{0,20}\.?[0-9]{1,20}(?:[eE][-+]?[0-9]{1,2})?"  # of a size that can be reckoned with exactly

_FORM = re.compile(rf"\s*({_NUMBER})\s*(%|[kKMGT]?)(B?)\s*")

_TIME = re.compile(rf"\s*({_NUMBER})\s*(%|ns|us|ms|s)\s*")

_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}

_FACTOR = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

FULL_USE = Fraction(97, 100)  # a landed model uses at least this much of its tightest target


@dataclass(frozen=True)
class Target:
    """An upper limit for one cost, in its own unit (bit-operations, MACs, bytes, nanoseconds)."""

    cost: str  # a name in COSTS
    text: str
    limit: int

    @property
    def flag(self) -> str:
        """The command line's name for it."""
        return f"--target-{self.cost.removesuffix('-structured')}"

    def format_cost(self, cost: float | Fraction) -> str:
        """A cost of this kind as a message has it, rounded up: "1,234", or "0.5123 ms"."""
        up = math.ceil(cost)
        return f"{math.ceil(up / 100) / 10**4:.4f} ms" if self.cost == "latency" else f"{up:,}"


def parse_target(cost: str, text: str, full: float, most: float | None = None) -> Target:
    """The target that `text` names: a percentage of `full` (the fp32 model's cost), or an amount with k, M, G or T.

    Amounts of time have ns, us, ms or s. Raises JpqError for text of another form, for 0, and for more than the model
    costs: `most`, where that is more than the fp32 model does (quantized layers may be slower).
    """
    flag = Target(cost, "", 0).flag
    limit = parse_amount(cost, text, full, flag)
    if limit > max(full, most or 0):
        dear = Target(cost, "", 0).format_cost(max(full, most or 0))
        which = "fp32" if (most or 0) <= full else "whole quantized"
        raise JpqError(f"{flag} {text} is more than the {which} model costs ({dear}): nothing would have to be done.")
    return Target(cost, str(text), math.floor(limit))


def parse_amount(cost: str, text: str, full: float, flag: str) -> Fraction:
    """What `text` allows of a cost, in its unit. Raises JpqError, naming the flag, for another form and for nothing."""
    time = cost == "latency"
    match = (_TIME if time else _FORM).fullmatch(str(text))
    if not match or (not time and match[3] and (cost != "size" or match[2] == "%")):
        example = "50KB or 5%" if cost == "size" else "3ms, 250us or 50%" if time else "1%, 12M or 1.2G"
        raise JpqError(f"{flag} '{text}' is not an amount. Write it like {example}.")
    number = Fraction(match[1])
    limit = number / 100 * Fraction(full) if match[2] == "%" else number * (_NS if time else _FACTOR)[match[2]]
    if limit < 1:
        raise JpqError(f"{flag} {text} allows nothing. Give an amount above 0.")
    return limit


def parse_targets(asked: Mapping[str, str | None], uses: Sequence[LayerUse]) -> tuple[Target, ...]:
    """Every target that was asked for, by cost name. `uses` give the fp32 baseline."""
    full = baseline(uses)
    if asked.get("latency") is not None and "latency" not in full:
        raise JpqError(
            f"--target-latency {asked['latency']} needs measured layers: run jpq bench --table FILE.csv --model NAME, "
            "then add --latency-table FILE.csv."
        )
    most = {"latency": float(latency_ns([dense(u, 8) for u in uses]))} if "latency" in full else {}
    return tuple(
        parse_target(cost, text, full[cost], most.get(cost)) for cost, text in asked.items() if text is not None
    )


def used_share(target: Target, uses: Sequence[LayerUse]) -> Fraction:
    """Cost over limit, exactly; `uses` hold whole numbers and fractions."""
    return Fraction(COSTS[target.cost](uses)) / target.limit


def all_met(targets: Sequence[Target], uses: Sequence[LayerUse]) -> bool:
    """Whether every target holds."""
    return all(used_share(t, uses) <= 1 for t in targets)


@dataclass
class Controller:
    """Drives costs down a geometric ramp to their targets and holds them there.

    Each target has its own multiplier lambda. While the cost (whole bits, whole units) is above the ramp the loss gets
    `lambda * ln(cost / aim)`; at or below the ramp it gets nothing. The multiplier grows by `rate * ln(cost / aim)` (in
    logs, clipped) while above and shrinks while below.

    Why one-sided: dual ascent on `ln(cost / target)` keeps pushing until its multiplier has unwound, and closed
    channels do not return: it lands far below the target (asked 0.10, got 0.047). Here the push ends with the excess,
    and what remains on the boundary is a sliding mode whose time average is the constraint's true multiplier.
    """

    targets: tuple[Target, ...]
    ramp: float = 0.7  # share of the search after which the aim is the target itself
    rate: float = 0.05  # growth of ln lambda per step and unit of ln(cost / aim)
    clip: float = 0.5  # largest |ln(cost / aim)| that moves lambda
    low: float = 1e-2
    high: float = 1e2
    start: dict[str, float] = field(default_factory=dict)  # cost over limit when the search began
    pressure: dict[str, float] = field(default_factory=dict)  # the multipliers
    seen: dict[str, tuple[float, float]] = field(default_factory=dict)  # (cost, aim) when the loss was last asked for

    def begin(self, uses: Sequence[LayerUse], force: float = 0.1) -> None:
        """Take the costs as they stand for the top of the ramp."""
        with torch.no_grad():
            self.start = {t.cost: max(1.0, float(COSTS[t.cost](uses)) / t.limit) for t in self.targets}
        self.pressure = {t.cost: force for t in self.targets}

    def ramped_limit(self, target: Target, progress: float) -> float:
        """What the cost may be now: from its start geometrically to the limit, then the limit."""
        left = max(0.0, 1.0 - progress / self.ramp)
        return target.limit * self.start[target.cost] ** left

    def loss(self, uses: Sequence[LayerUse], progress: float) -> Tensor:
        """What is added to the loss; advances the multipliers. `uses` hold tensors with whole values."""
        total = torch.zeros(())
        for target in self.targets:
            cost = COSTS[target.cost](uses)
            aim = self.ramped_limit(target, progress)
            moves = isinstance(cost, Tensor)  # not where only channels cost and none can go
            excess = torch.log(cost / aim) if moves else torch.tensor(math.log(cost / aim))
            over = float(excess.detach())
            self.seen[target.cost] = (aim * math.exp(over), aim)
            step = self.rate * max(-self.clip, min(self.clip, over))
            force = self.pressure[target.cost]
            self.pressure[target.cost] = min(max(force * math.exp(step), self.low), self.high)
            if over > 0:
                total = total.to(excess.device) + force * excess
        return total

    def multiplier(self) -> float:
        """The largest multiplier: what one unit of ln(cost) is worth now, in nats of the task's loss."""
        return max(self.pressure.values(), default=0.0)

    def state(self) -> dict[str, dict[str, float]]:
        """What a checkpoint keeps."""
        return {"start": dict(self.start), "pressure": dict(self.pressure)}

    def restore(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Go on from `state()`. Raises ValueError for that of other targets."""
        costs = {target.cost for target in self.targets}
        for part in (state["start"], state["pressure"]):
            if part.keys() != costs or not all(0 < value < math.inf for value in part.values()):
                raise ValueError("a controller of other targets")
        self.start, self.pressure = dict(state["start"]), dict(state["pressure"])
