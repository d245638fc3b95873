"""Work at 32 bits: the layers that no quantizer acts on, and the products of computed tensors, with their share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jpq import costs
from jpq.compression.model import CompressedModel
from jpq.costs import LayerUse
from jpq.tracing.network import Network

NOTEWORTHY = 0.01  # share of the MACs at 32 bits above which a run, and `compress`, warn

KEPT = "a layer that --keep-float keeps in floating point"
OTHER_CLASS = "a layer of a class that has no quantized form, or that its module does not apply itself"

PRODUCT = "a product of two computed tensors"

_NAMED = 3  # largest number of parts that a sentence names


@dataclass(frozen=True)
class FloatPart:
    """One layer, or product of computed tensors, at 32 bits."""

    name: str
    part: costs.Part  # "layer" or "product"
    macs: int  # of one sample
    share: float  # of the MACs of the whole model, in [0, 1]
    reason: str


@dataclass(frozen=True)
class FloatWork:
    """All that a model computes at 32 bits, with its share of the whole."""

    macs: int  # of one sample
    share: float  # of the MACs of the whole model, in [0, 1]
    bops_share: float  # of its bit-operations
    parts: tuple[FloatPart, ...]  # the largest first


def find_float_work(network: Network, uses: Sequence[LayerUse], quantized: Collection[str]) -> FloatWork:
    """The work at 32 bits under some decisions.

    Args:
        network: the layers and products.
        uses: their uses, in exact numbers.
        quantized: names of the layers that have quantizers.
    """
    reasons = {x.name: x.float_reason or (KEPT if x.kept_float else OTHER_CLASS) for x in network.layers}
    in_float = [u for u in uses if u.part == "product" or (u.part == "layer" and u.name not in quantized)]
    every, bops = max(1, costs.macs(uses)), max(1, costs.bops(uses))
    parts = [
        FloatPart(
            u.name,
            u.part,
            int(costs.layer_macs(u)),
            float(costs.layer_macs(u) / every),
            PRODUCT if u.part == "product" else reasons[u.name],
        )
        for u in in_float
    ]
    macs = costs.macs(in_float)
    ordered = tuple(sorted(parts, key=lambda part: -part.macs))
    return FloatWork(int(macs), float(macs / every), float(costs.bops(in_float) / bops), ordered)


def dense_float_work(net: CompressedModel) -> FloatWork:
    """The work at 32 bits of a model under compression, with nothing pruned and its widths as they stand."""
    uses = [replace(u, inputs=1, outputs=1, density=1, positions=1) for u in net.exact_usage()]
    return find_float_work(net.network, uses, net.plan().layers)


def describe_float_work(work: FloatWork | Mapping[str, Any]) -> str:
    """`3 products and 1 layer, 12.9 % of the MACs: attn.q@k, attn.weights@v ...`; empty where there is none."""
    if isinstance(work, FloatWork):
        kinds, names = [part.part for part in work.parts], [part.name for part in work.parts]
        share = work.share
    else:
        kinds, names = [part["part"] for part in work["parts"]], [part["name"] for part in work["parts"]]
        share = work["share"]
    if not names:
        return ""
    counts = [(sum(kind == word for kind in kinds), word) for word in ("product", "layer")]
    what = " and ".join(f"{n} {word}{'s' * (n > 1)}" for n, word in counts if n)
    more = " ..." if len(names) > _NAMED else ""
    return f"{what}, {100 * share:.1f} % of the MACs: {', '.join(names[:_NAMED])}{more}"


def float_work_warning(net: CompressedModel) -> str:
    """A sentence for the user where more than `NOTEWORTHY` of the MACs cannot be quantized; else empty."""
    work = dense_float_work(net)
    if work.share <= NOTEWORTHY:
        return ""
    return (
        f"Work that stays at 32 bits: {describe_float_work(work)}. It counts as such in the costs, "
        "and targets include it."
    )
