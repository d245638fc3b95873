"""Decisions said by hand (`--bits`, `--densities`): no search and no target, the cost is what comes out.

    --bits       4/4,conv1=8/8,layer1=4/3     weight bits / activation bits, by layer
    --densities  0.75,layer1.0=0.5            share of the channels that stay, by site (`jpq inspect` lists both)

A name stands for the layer or site of that name and for all whose names it begins (`layer1` for `layer1.0.conv1`);
of several names the longest counts. A value without a name is for all the rest, which otherwise keep the widest bits
that `--w-bits` and `--a-bits` allow, and every channel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TypeVar

from jpq.allocation.ranking.evidence import Batches
from jpq.allocation.ranking.rank import rank
from jpq.compression.channel_counts import nearest
from jpq.compression.discretize import soft_decisions
from jpq.compression.model import CompressedModel
from jpq.config import Decide
from jpq.costs.target import Target, all_met, parse_share, used_share
from jpq.methods.scores import Score
from jpq.plan import Plan
from jpq.types import JpqError, unknown

T = TypeVar("T")


def parse_named_values(flag: str, text: str, known: Sequence[str], value: Callable[[str], T], rest: T) -> dict[str, T]:
    """Every known name -> the value that `text` gives it, or `rest`.

    Args:
        flag: for messages.
        text: `[VALUE,][NAME=VALUE,...]`.
        known: names of layers or sites.
        value: reads one value; raises ValueError with what was expected.

    Raises JpqError for values that cannot be read, names that are said twice and names that fit nothing.
    """
    named: dict[str, T] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, shown = entry.rpartition("=")
        name = name.strip()
        if name in named:
            raise JpqError(f"{flag} says {name or 'the value for all the rest'} twice. Leave one of them out.")
        if equals and not any(name_matches(one, name) for one in known):
            raise unknown(f"name in {flag}", name, {*known, *_beginnings(known)})
        try:
            named[name] = value(shown.strip())
        except ValueError as error:
            raise JpqError(f"{flag} {entry}: {error}") from error
    default = named.pop("", rest)
    found = {}
    for one in known:
        fitting = [name for name in named if name_matches(one, name)]
        found[one] = named[max(fitting, key=len)] if fitting else default
    return found


def name_matches(one: str, name: str) -> bool:
    """Whether a layer or site has this name, or lies below it."""
    return one == name or one.startswith((f"{name}.", f"{name}->"))


def _beginnings(known: Collection[str]) -> set[str]:
    """Names of modules that hold some of them."""
    return {one[:i] for one in known for i, letter in enumerate(one) if letter == "."}


def parse_widths(text: str) -> tuple[int, int]:
    """`4/3` as (weight bits, activation bits)."""
    parts = text.split("/")
    if len(parts) == 2 and all(p.strip().isdigit() and 2 <= int(p) <= 8 for p in parts):
        return int(parts[0]), int(parts[1])
    raise ValueError("give weight bits / activation bits, each from 2 to 8, such as 4/3")


def parse_density(text: str) -> float:
    """`0.5` or `50%` as a density in (0, 1]. Raises ValueError for any other text."""
    share = parse_share(text)
    if not share:
        raise ValueError("give the share that stays, above 0 and at most 1, such as 0.5 or 50%")
    return float(share)


def kept_count(density: float, counts: Sequence[int]) -> int:
    """How many units a density leaves, of a site that may keep so many or so many: the nearest."""
    return nearest(counts, round(density * counts[-1]))


def ranked(net: CompressedModel, decide: Decide, score: Score, batches: Batches) -> Plan:
    """The plan of `decide`, with the units of each site in the order of a score; as `allocators.rank` has it."""
    rank(net, score, batches)
    return plan(net, decide)


def plan(net: CompressedModel, decide: Decide) -> Plan:
    """The plan that `--bits` and `--densities` describe: of each site the units that are ranked best.

    Args:
        net: attached with `Ranked` gates; the image keeps its own width.
        decide: its bits and densities; layers that bits leave out have the widest.
    """
    decisions = soft_decisions(net)
    now = decisions.plan
    shares = parse_named_values(
        "--densities", decide.densities or "", [site.name for site in net.sites], parse_density, 1.0
    )
    widest = (decide.w_bits[1], decide.a_bits[1])
    pairs = parse_named_values("--bits", decide.bits or "", list(now.layers), parse_widths, widest)
    kept = {}
    for name, margins in decisions.margins.items():
        best = set(decisions.order[name][: kept_count(shares[name], decisions.counts[name])])
        kept[name] = tuple(u in best for u in range(len(margins)))
    image = {layer.name for layer in net.network.layers if layer.reads_input}
    layers = {
        name: replace(layer, w_bits=pairs[name][0], a_bits=layer.a_bits if name in image else pairs[name][1])
        for name, layer in now.layers.items()
    }
    return replace(now, layers=layers, kept={**now.kept, **kept})


def check_targets(net: CompressedModel, decided: Plan, targets: Sequence[Target]) -> None:
    """Raise JpqError where a target is given beside the decisions, and they cost more."""
    uses = net.exact_usage(decided)
    for goal in targets:
        if not all_met([goal], uses):
            cost = goal.format_cost(used_share(goal, uses) * goal.limit)
            raise JpqError(
                f"{goal.flag} {goal.text} ({goal.format_cost(goal.limit)}): the decisions of --bits and --densities "
                f"cost {cost}. Give fewer bits, lower densities, or no target."
            )
