"""Which structure each layer's mask has, and how large its blocks are: by rules.

Y. Gong et al., "Automatic Mapping of the Best-Suited DNN Pruning Schemes for Real-Time Mobile Acceleration", ACM TODAES
2022, arXiv:2111.11581.

| layer | scheme | here |
|---|---|---|
| depthwise, or a weight without a module of its own | dense | |
| 3 x 3 convolution, hard task | one of four patterns per kernel | `pattern` |
| 3 x 3 convolution, easy task; other kernels | block-punched, b filters x b channels | `punched:BxB` |
| 1 x 1 convolution, linear | columns of blocks of b rows | `block:Bx1` |

    b = the smallest with ms(b) <= (1 + tolerance) * ms(coarsest), both at the same density

Hard is a task of more than 100 classes, or with images above 64 pixels; which way round is our choice, the paper's text
is not public in numbers. A gate that cannot take patterns gets block-punched layers, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor

from jpq.costs.latency import NS
from jpq.costs.latency_table import MODELLED
from jpq.methods.gates.fixed_count import kept_of_rows, topk_rows
from jpq.methods.structures import KernelPattern, Structure, parse
from jpq.tracing.forward import tensors
from jpq.tracing.network import Layer, Network
from jpq.tracing.sites import can_mask, layout
from jpq.types import DENSE, JpqError, Units, Weight

SIDES = (1, 2, 4, 8, 16, 32)  # of blocks, below the one that spans the layer

TOLERANCE = 0.2  # how much slower than the coarsest variant a finer one may be

CLASSES, PIXELS = 100, 64  # a task with more is hard

Latency = Callable[[Layer, str, float], float]  # (layer, structure, share of weights that stays) -> ms of one sample

Legal = Callable[[str], bool]  # whether the method takes this structure

MACS_A_MS = 8e6  # eight a nanosecond
BYTES_A_MS = 4e6
LANES = 8.0  # multiply-accumulates that one look-up takes the time of
INDEX = 2.0  # bytes of one index; a weight has one byte


def modelled(layer: Layer, structure: str, share: float) -> float:
    """Milliseconds by `costs.roofline`."""
    own = None if structure == DENSE else parse(structure, layout(layer))
    return roofline(layer.macs, Size(layer.weight_shape), own, share)


def timed(layer: Layer, structure: str, share: float) -> float:
    """Milliseconds by the layer's table of latencies, at 8 bits; by the roofline where it has none.

    Of masks that the table has no measured lines for: the dense layer's time, times what the roofline says they gain.
    """
    if layer.clock is None:
        return modelled(layer, structure, share)
    known = layer.clock.measured(structure)
    dense = layer.clock(1, 1, Fraction(share) if known else 1, 8, 8, structure if known else DENSE)
    gain = 1.0 if known else modelled(layer, structure, share) / modelled(layer, DENSE, 1.0)
    return float(dense) / NS * gain


def source(network: Network, mapping: Mapping[str, str]) -> str:
    """Where the milliseconds of a mapping are from: "measured", "modelled", or "measured layers, modelled masks"."""
    clocks = [(layer.clock, mapping.get(layer.name, DENSE)) for layer in network.layers]
    if any(clock is None for clock, _ in clocks):
        return MODELLED
    known = all(clock is not None and clock.measured(structure) for clock, structure in clocks)
    return "measured" if known else "measured layers, modelled masks"


def kept_share(layer: Layer, structure: str, density: float) -> float:
    """Share of the weights that stays where `density` is asked for: whole units (5 of 9), or what a pattern says."""
    if structure == DENSE:
        return 1.0
    own, size = parse(structure, layout(layer)), Size(layer.weight_shape)
    sizes = own.sizes(size)
    share = (_counts(own, sizes, density) / (sizes > 0).sum(1)).mean()
    return float(share * sizes.sum() / size.numel())


def variants(layer: Layer, legal: Legal = lambda structure: True) -> dict[str, tuple[str, ...]]:
    """Scheme -> the structures that this layer may have, small blocks first; `dense` is always there.

    The last of several block sizes spans the layer; sizes that say the same as a larger one are left out.
    """
    found: dict[str, tuple[str, ...]] = {DENSE: (DENSE,)}
    size = Size(layer.weight_shape)
    if not can_mask(layer) or layer.depthwise:
        return found
    flat = all(n == 1 for n in size[2:])
    form = "block:{0}x1" if flat else "punched:{0}x{0}"
    _, outputs, inputs, _ = layout(layer).sides(size)
    most = outputs if flat else max(outputs, inputs)
    sizes = [form.format(b) for b in SIDES if b < most] + [form.format("*")]
    if legal(sizes[0]):
        found["block" if flat else "punched"] = tuple(sizes)
    if tuple(size[2:]) == (3, 3) and legal("pattern"):
        found["pattern"] = ("pattern",)
    return found


def is_hard_task(network: Network, example: Any) -> bool:
    """Whether the task has more than 100 classes (outputs of the last layer) or images above 64 pixels a side."""
    sides = [n for x in tensors(example) if x.dim() >= 4 for n in x.shape[2:]]
    return len(network.layers[-1].outputs) > CLASSES or max(sides, default=0) > PIXELS


def rules(
    network: Network,
    density: float,
    difficult: bool,
    *,
    legal: Legal = lambda structure: True,
    skip: Collection[str] = (),
    tolerance: float = TOLERANCE,
    latency: Latency = timed,
) -> dict[str, str]:
    """{layer: structure} by the rules above, every layer named.

    Raises JpqError for a tolerance below 0.
    """
    if not 0 <= tolerance < float("inf"):
        raise JpqError(f"A tolerance of {tolerance} makes no sense: 0.2 lets a block be 20 % slower than the coarsest.")
    return {
        layer.name: DENSE if layer.name in skip else _rule(layer, density, difficult, legal, tolerance, latency)
        for layer in network.layers
    }


def _rule(layer: Layer, density: float, difficult: bool, legal: Legal, tolerance: float, latency: Latency) -> str:
    found = variants(layer, legal)
    blocks = found.get("punched", found.get("block", ()))
    if "pattern" in found and (difficult or not blocks):
        return "pattern"
    return smallest_within(blocks, [latency(layer, b, density) for b in blocks], tolerance) if blocks else DENSE


def smallest_within(blocks: Collection[str], ms: Collection[float], tolerance: float) -> str:
    """The first of the blocks (small ones first) that is at most `1 + tolerance` times as slow as the last."""
    *_, coarsest = ms
    return next(b for b, t in zip(blocks, ms, strict=True) if t <= (1 + tolerance) * coarsest)


def cheapest_mapping(network: Network, density: float, *, legal: Legal, skip: Collection[str] = ()) -> dict[str, str]:
    """{layer: structure} of the least weights, the finest of equal ones: no mapping can cost less."""
    out = {}
    for layer in network.layers:
        each = [s for kind in variants(layer, legal).values() for s in kind if s != DENSE and layer.name not in skip]
        out[layer.name] = min(each, key=partial(kept_share, layer, density=density), default=DENSE)
    return out


def milliseconds(
    network: Network, mapping: Mapping[str, str], density: float | Mapping[str, float], latency: Latency = timed
) -> dict[str, float]:
    """What each layer takes under a mapping; layers that it leaves out are dense.

    `density`: the share that is asked for, or by layer the share that stayed.
    """
    out = {}
    for layer in network.layers:
        structure = mapping.get(layer.name, DENSE)
        share = density[layer.name] if isinstance(density, Mapping) else kept_share(layer, structure, density)
        out[layer.name] = latency(layer, structure, share)
    return out


def best(weight: Weight, structure: Structure, density: float) -> Units:
    """The units that the nearest weight of this structure keeps, 0 or 1: of each row those of the largest norm.

    As many as the structure says, else `density` of them, at least one. Units at ragged edges rank by their mean square
    (then the point is not always the nearest).
    """
    sizes = structure.sizes(weight.shape).to(weight.device)
    scores = structure.pool(weight.square()) / sizes.clamp_min(1)
    return topk_rows(scores, _counts(structure, sizes, density), sizes > 0)


def _counts(structure: Structure, sizes: Units, density: float) -> Tensor:
    """Units that stay in each row, `[rows]`."""
    quota, real = structure.quota(), (sizes > 0).sum(1)
    return kept_of_rows(density, real).clamp_min(1) if quota is None else real.clamp_max(quota)


@torch.no_grad()
def project(weight: Weight, structure: Structure, density: float) -> Tensor:
    """The weight with all units but the `best` zeroed."""
    return weight * structure.expand(best(weight, structure, density), weight.shape)


def weights_per_lookup(structure: Structure, weight: Size) -> float:
    """w: weights that one look-up serves, on average.

    Of a partition the weights of a unit. A kernel's pattern serves its positions in all filters that have the same one:
    kernels that read one channel are sorted by pattern (W. Niu et al., PatDNN, arXiv:2001.00138).
    """
    sizes = structure.sizes(weight)
    mean = float(sizes.sum() / (sizes > 0).sum())
    if isinstance(structure, KernelPattern):
        _, outputs, _, _ = structure.layout.sides(weight)
        return mean * max(1.0, outputs / len(structure.patterns))
    return mean


def roofline(macs: int, weight: Size, structure: Structure | None, density: float) -> float:
    """Milliseconds of one sample. `density`: the share of the weights that stays; 1 is meant without a structure."""
    w = float("inf") if structure is None else weights_per_lookup(structure, weight)
    share = 1.0 if structure is None else density
    compute = macs * share * (1 + LANES / w) / MACS_A_MS
    return max(compute, weight.numel() * share * (1 + INDEX / w) / BYTES_A_MS)
