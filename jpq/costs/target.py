"""The budget: amounts that a user writes ("1%", "12M", "50KB", "3ms"), targets, and the controller that meets them."""

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

FULL_USE = Fraction(97, 100)  # a discretized model uses at least this share of its tightest target

_NUMBER = r"[0-9]{0,20}\.?[0-9]{1,20}(?:[eE][-+]?[0-9]{1,2})?"  # a number short enough for exact arithmetic
_SHARE = re.compile(rf"\s*({_NUMBER})\s*(%?)\s*")
_AMOUNT = re.compile(rf"\s*({_NUMBER})\s*(%|[kKMGT]?)(B?)\s*")
_TIME = re.compile(rf"\s*({_NUMBER})\s*(%|ns|us|ms|s)\s*")
_FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_NANOSECONDS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}


def parse_share(text: str) -> Fraction | None:
    """The exact share in [0, 1] that a text such as `50%` or `0.5` names; None for any other text."""
    match = _SHARE.fullmatch(text)
    share = Fraction(match[1]) / (100 if match[2] else 1) if match else Fraction(2)
    return share if share <= 1 else None


def parse_amount(cost: str, text: str, full: float, flag: str) -> Fraction:
    """The limit of a cost, in the cost's unit, that a text names: a percentage of `full`, or an absolute amount.

    Raises JpqError, naming the flag, for text of another form and for less than 1.
    """
    is_time = cost == "latency"
    match = (_TIME if is_time else _AMOUNT).fullmatch(str(text))
    if not match or (not is_time and match[3] and (cost != "size" or match[2] == "%")):
        example = "50KB or 5%" if cost == "size" else "3ms, 250us or 50%" if is_time else "1%, 12M or 1.2G"
        raise JpqError(f"{flag} '{text}' is not an amount. Write it like {example}.")
    number, unit = Fraction(match[1]), match[2]
    limit = number / 100 * Fraction(full) if unit == "%" else number * (_NANOSECONDS if is_time else _FACTORS)[unit]
    if limit < 1:
        raise JpqError(f"{flag} {text} allows nothing. Give an amount above 0, or a share such as 5%.")
    return limit


@dataclass(frozen=True)
class Target:
    """An upper limit for one cost, in the cost's unit (bit-operations, MACs, bytes, nanoseconds)."""

    cost: str  # a name in COSTS
    text: str  # the amount as the user wrote it
    limit: int

    @property
    def flag(self) -> str:
        """The flag of the command line that sets it."""
        return f"--target-{self.cost.removesuffix('-structured')}"

    def format_cost(self, cost: float | Fraction) -> str:
        """A cost of this kind for a message, rounded up: "1,234", or "0.5123 ms"."""
        rounded_up = math.ceil(cost)
        return f"{math.ceil(rounded_up / 100) / 10**4:.4f} ms" if self.cost == "latency" else f"{rounded_up:,}"


def parse_target(cost: str, text: str, full: float, quantized: float | None = None) -> Target:
    """The target that a text names for one cost.

    Args:
        cost: a name in COSTS.
        text: a percentage of `full`, or an amount with k, M, G or T (bytes: also B; time: ns, us, ms or s).
        full: cost of the fp32 model.
        quantized: cost of the whole model at 8 bits, where it is known; quantized layers may be slower than fp32.

    Raises JpqError for text of another form, for 0, and for more than the model costs in either form.
    """
    flag = Target(cost, "", 0).flag
    limit = parse_amount(cost, text, full, flag)
    highest = max(full, quantized or 0)
    if limit > highest:
        which = "fp32" if highest == full else "whole quantized"
        raise JpqError(
            f"{flag} {text} is more than the {which} model costs ({Target(cost, '', 0).format_cost(highest)}): "
            "nothing would have to be done."
        )
    return Target(cost, str(text), math.floor(limit))


def parse_targets(texts: Mapping[str, str | None], uses: Sequence[LayerUse]) -> tuple[Target, ...]:
    """The targets that texts name, by cost; None sets no target. `uses` give the cost of the fp32 model."""
    full = baseline(uses)
    if texts.get("latency") is not None and "latency" not in full:
        raise JpqError(
            f"--target-latency {texts['latency']} needs measured layers: run "
            "`jpq bench --table FILE.csv --model NAME`, then add --latency-table FILE.csv."
        )
    quantized = {"latency": float(latency_ns([dense(u, 8) for u in uses]))} if "latency" in full else {}
    return tuple(
        parse_target(cost, text, full[cost], quantized.get(cost)) for cost, text in texts.items() if text is not None
    )


def used_share(target: Target, uses: Sequence[LayerUse]) -> Fraction:
    """Cost over limit, exactly; `uses` hold whole numbers and fractions."""
    return Fraction(COSTS[target.cost](uses)) / target.limit


def all_met(targets: Sequence[Target], uses: Sequence[LayerUse]) -> bool:
    """Whether no cost exceeds its target."""
    return all(used_share(t, uses) <= 1 for t in targets)


@dataclass
class Controller:
    """Adaptive weights of the budget in the loss: they drive each cost down a geometric ramp to its target.

        ramped_limit(p) = limit * (start / limit) ^ max(0, 1 - p / ramp)        p: progress of the search, in [0, 1]

    Each target has its own multiplier lambda. While the cost (whole bits, whole units) exceeds the ramped limit, the
    loss gets `lambda * ln(cost / ramped_limit)`; otherwise it gets nothing. ln lambda grows by
    `rate * ln(cost / ramped_limit)` (clipped) in a step above the ramped limit and falls in a step below it.

    The penalty is one-sided because dual ascent on `ln(cost / target)` keeps pushing until its multiplier has unwound,
    and closed channels do not return: it ends far below the target (0.047 where 0.10 was the target). Here the push
    ends with the excess, and at the boundary the time average of the push is the multiplier of the constraint.
    """

    targets: tuple[Target, ...]
    ramp: float = 0.7  # share of the search after which the ramped limit is the target itself
    rate: float = 0.05  # growth of ln lambda per step and unit of ln(cost / ramped_limit)
    clip: float = 0.5  # largest |ln(cost / ramped_limit)| that moves lambda
    low: float = 1e-2  # smallest multiplier
    high: float = 1e2  # largest multiplier
    start: dict[str, float] = field(default_factory=dict)  # cost -> cost over limit at the start of the search
    pressure: dict[str, float] = field(default_factory=dict)  # cost -> multiplier
    last_costs: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # cost -> (cost, ramped limit) at the last loss

    def begin(self, uses: Sequence[LayerUse], multiplier: float = 0.1) -> None:
        """Start the ramp at the present costs, with the same multiplier for every target."""
        with torch.no_grad():
            self.start = {t.cost: max(1.0, float(COSTS[t.cost](uses)) / t.limit) for t in self.targets}
        self.pressure = {t.cost: multiplier for t in self.targets}

    def ramped_limit(self, target: Target, progress: float) -> float:
        """The limit at this progress of the search, in the cost's unit: it falls geometrically to the target."""
        left = max(0.0, 1.0 - progress / self.ramp)
        return target.limit * self.start[target.cost] ** left

    def loss(self, uses: Sequence[LayerUse], progress: float) -> Tensor:
        """The budget's term of the loss, a scalar; updates the multipliers. `uses` hold tensors with whole values."""
        total = torch.zeros(())
        for target in self.targets:
            cost = COSTS[target.cost](uses)
            limit = self.ramped_limit(target, progress)
            # a cost without a gradient is a number: no decision of this method changes it
            excess = torch.log(cost / limit) if isinstance(cost, Tensor) else torch.tensor(math.log(cost / limit))
            over = float(excess.detach())
            self.last_costs[target.cost] = (limit * math.exp(over), limit)
            multiplier = self.pressure[target.cost]
            growth = math.exp(self.rate * max(-self.clip, min(self.clip, over)))
            self.pressure[target.cost] = min(max(multiplier * growth, self.low), self.high)
            if over > 0:
                total = total.to(excess.device) + multiplier * excess
        return total

    def weighted_cost(self, uses: Sequence[LayerUse]) -> Tensor:
        """Sum of multiplier * ln(cost) over the targets, a scalar: the budget's term without its limits.

        A cost below 1, where all channels are closed, counts as 1.

        Its derivative by a decision is what that decision costs, in nats of the task's loss.
        """
        total = torch.zeros(())
        for target in self.targets:
            cost = COSTS[target.cost](uses)
            if isinstance(cost, Tensor):
                total = total.to(cost.device) + self.pressure[target.cost] * cost.clamp_min(1.0).log()
        return total

    def multiplier(self) -> float:
        """The largest multiplier: the price of one unit of ln(cost), in nats of the task's loss."""
        return max(self.pressure.values(), default=0.0)

    def state(self) -> dict[str, dict[str, float]]:
        """The controller's state for a checkpoint."""
        return {"start": dict(self.start), "pressure": dict(self.pressure)}

    def restore(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Continue from a `state()`. Raises ValueError for the state of other targets."""
        costs = {target.cost for target in self.targets}
        for part in (state["start"], state["pressure"]):
            if part.keys() != costs or not all(0 < value < math.inf for value in part.values()):
                raise ValueError("a controller of other targets")
        self.start, self.pressure = dict(state["start"]), dict(state["pressure"])
