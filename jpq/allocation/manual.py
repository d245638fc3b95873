"""Manual decisions (`--bits`, `--densities`): bits and densities by name, without search or target.

    --bits       4/4,conv1=8/8,layer1=4/3     weight bits / activation bits, by layer
    --densities  0.75,layer1.0=0.5            share of the channels that stay, by site (`jpq inspect` lists both)

A name stands for the layer or site of that name and for all whose names it begins (`layer1` for `layer1.0.conv1`);
of several names the longest counts. A value without a name holds for all the rest, which otherwise keep the widest bits
that `--w-bits` and `--a-bits` allow, and every channel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

from jpq.allocation.ranking.evidence import Batches
from jpq.allocation.ranking.rank import rank_units
from jpq.compression.channel_counts import nearest_count
from jpq.compression.model import CompressedModel
from jpq.compression.soft_decisions import soft_decisions
from jpq.config import Decide
from jpq.costs.target import Target, all_met, parse_share, used_share
from jpq.methods.gates.fixed_count import kept_count
from jpq.methods.scores import Score
from jpq.plan import Plan
from jpq.tracing.network import Network
from jpq.types import JpqError, unknown

T = TypeVar("T")

Key = tuple[str, Literal["w", "a"]]  # (layer, its weight or its input)

FLOAT_BITS = 32  # in --bits: a layer that stays in floating point


def parse_named_values(flag: str, text: str, known: Sequence[str], parse: Callable[[str], T], rest: T) -> dict[str, T]:
    """Parse values by name: every known name -> its value in `text`, or `rest`.

    Args:
        flag: the flag that messages name.
        text: `[VALUE,][NAME=VALUE,...]`.
        known: names of layers or sites.
        parse: parses one value; raises ValueError with what was expected.
        rest: the value of names that `text` leaves out.

    Raises JpqError for values that cannot be parsed, names that stand there twice and names that fit nothing.
    """
    named: dict[str, T] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = entry.rpartition("=")
        name = name.strip()
        if name in named:
            raise JpqError(f"{flag} says {name or 'the value for all the rest'} twice. Leave one of them out.")
        if equals and not any(name_matches(item, name) for item in known):
            raise unknown(f"name in {flag}", name, {*known, *_parent_names(known)})
        try:
            named[name] = parse(value.strip())
        except ValueError as error:
            raise JpqError(f"{flag} {entry}: {error}") from error
    default = named.pop("", rest)
    values = {}
    for item in known:
        matches = [name for name in named if name_matches(item, name)]
        values[item] = named[max(matches, key=len)] if matches else default
    return values


def name_matches(item: str, name: str) -> bool:
    """Whether a layer or site has this name, or lies below it."""
    return item == name or item.startswith((f"{name}.", f"{name}->"))


def _parent_names(known: Collection[str]) -> set[str]:
    """Names of the modules that hold some of these layers or sites."""
    return {item[:i] for item in known for i, letter in enumerate(item) if letter == "."}


def parse_widths(text: str) -> tuple[int, int]:
    """`4/3` as (weight bits, activation bits), `32/32` for floating point. Raises ValueError for any other text."""
    parts = [part.strip() for part in text.split("/")]
    if parts == [str(FLOAT_BITS)] * 2:
        return FLOAT_BITS, FLOAT_BITS
    if len(parts) == 2 and all(p.strip().isdigit() and 2 <= int(p) <= 8 for p in parts):
        return int(parts[0]), int(parts[1])
    raise ValueError("give weight bits / activation bits, each from 2 to 8, such as 4/3, or 32/32 for floating point")


def float_layers(network: Network, decide: Decide) -> set[str]:
    """The layers that `--keep-float` and `--bits NAME=32/32` keep in floating point.

    Raises JpqError for names that fit no layer.
    """
    names = [layer.name for layer in network.layers if not layer.float_reason]
    kept: set[str] = set()
    for name in decide.keep_float:
        matching = {item for item in names if name_matches(item, name)}
        if not matching:
            raise unknown("layer in --keep-float", name, {*names, *_parent_names(names)})
        kept |= matching
    widths = parse_named_values("--bits", decide.bits or "", names, parse_widths, (0, 0))
    return kept | {name for name, (w, _) in widths.items() if w == FLOAT_BITS}


def pinned_widths(net: CompressedModel, decide: Decide) -> dict[Key, int]:
    """The widths that `--bits` fixes beside a method that decides the others; the image keeps its own.

    Raises JpqError for a value without a name, which would leave nothing to decide.
    """
    names = [layer.name for layer in net.network.layers if not layer.float_reason]
    entries = [part.strip() for part in (decide.bits or "").split(",")]
    if any(entry and "=" not in entry for entry in entries):
        raise JpqError(
            f"--bits {decide.bits} with --method {net.method}: name the layers whose bits are given, as conv1=8/8; the "
            "method decides the others."
        )
    widths = parse_named_values("--bits", decide.bits or "", names, parse_widths, (0, 0))
    image = {layer.name for layer in net.network.layers if layer.reads_input}
    pinned: dict[Key, int] = {}
    for name, (w, a) in widths.items():
        if w and net.quantizers(name):
            pinned[name, "w"] = w
            if name not in image:
                pinned[name, "a"] = a
    return pinned


def parse_density(text: str) -> float:
    """`0.5` or `50%` as a density in (0, 1]. Raises ValueError for any other text."""
    share = parse_share(text)
    if not share:
        raise ValueError("give the share that stays, above 0 and at most 1, such as 0.5 or 50%")
    return float(share)


def rank_and_plan(net: CompressedModel, decide: Decide, score: Score, batches: Batches) -> Plan:
    """Rank the units of each site by a score on training batches, and give the plan of `decide`."""
    rank_units(net, score, batches)
    return manual_plan(net, decide)


def manual_plan(net: CompressedModel, decide: Decide) -> Plan:
    """The plan that `--bits` and `--densities` describe; each site keeps its best-ranked units.

    Args:
        net: attached with `Ranked` gates; the image keeps its own width.
        decide: bits and densities by name; layers that they leave out have the widest bits.
    """
    decisions = soft_decisions(net)
    current = decisions.plan
    densities = parse_named_values(
        "--densities", decide.densities or "", [site.name for site in net.sites], parse_density, 1.0
    )
    widest = (decide.w_bits[1], decide.a_bits[1])
    quantizable = [layer.name for layer in net.network.layers if not layer.float_reason]
    widths = parse_named_values("--bits", decide.bits or "", quantizable, parse_widths, widest)
    kept = {}
    for name, margins in decisions.margins.items():
        counts = decisions.counts[name]
        best = set(decisions.order[name][: nearest_count(counts, kept_count(densities[name], counts[-1]))])
        kept[name] = tuple(u in best for u in range(len(margins)))
    image = {layer.name for layer in net.network.layers if layer.reads_input}
    layers = {
        name: replace(layer, w_bits=widths[name][0], a_bits=layer.a_bits if name in image else widths[name][1])
        for name, layer in current.layers.items()
    }
    return replace(current, layers=layers, kept={**current.kept, **kept})


def check_targets(net: CompressedModel, plan: Plan, targets: Sequence[Target]) -> None:
    """Raise JpqError where the plan of manual decisions exceeds a target that was given beside them."""
    uses = net.exact_usage(plan)
    for target in targets:
        if not all_met([target], uses):
            cost = target.format_cost(used_share(target, uses) * target.limit)
            raise JpqError(
                f"{target.flag} {target.text} ({target.format_cost(target.limit)}): the decisions of --bits and "
                f"--densities cost {cost}. Give fewer bits, lower densities, or no target."
            )
