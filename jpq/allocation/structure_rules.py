"""Rule-based choice of each layer's mask structure and block size.

Y. Gong et al., "Automatic Mapping of the Best-Suited DNN Pruning Schemes for Real-Time Mobile Acceleration", ACM TODAES
2022, arXiv:2111.11581.

| layer | scheme | here |
|---|---|---|
| depthwise, or a weight without a module of its own | dense | |
| 3 x 3 convolution, hard task | one of four patterns per kernel | `pattern` |
| 3 x 3 convolution, easy task; other kernels | block-punched, b filters x b channels | `punched:BxB` |
| 1 x 1 convolution, linear | columns of blocks of b rows | `block:Bx1` |

    b = the smallest with ms(b) <= (1 + tolerance) * ms(coarsest), both at the same density

We differ: a hard task is one of more than 100 classes, or with images above 64 pixels, and hard tasks get the finer
scheme; the paper gives no numbers for either. A gate that cannot take patterns gets block-punched layers, and the other
way round. Of 1 x 1 and linear layers only columns of blocks go, never rows or both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import Size

from jpq.allocation.structure_latency import Latency, layer_ms
from jpq.allocation.structure_projection import kept_share
from jpq.tracing.forward import collect_tensors
from jpq.tracing.network import Layer, Network
from jpq.tracing.sites import can_mask, weight_layout
from jpq.types import DENSE, JpqError

BLOCK_SIDES = (1, 2, 4, 8, 16, 32)  # sides of blocks, below the block that spans the layer

TOLERANCE = 0.2  # relative extra latency of a finer structure over the coarsest

EASY_CLASSES, EASY_PIXELS = 100, 64  # a task with more classes, or larger images, is hard

IsAllowed = Callable[[str], bool]  # whether the method takes this structure


def apply_rules(
    network: Network,
    density: float,
    hard_task: bool,
    *,
    is_allowed: IsAllowed = lambda structure: True,
    skip: Collection[str] = (),
    tolerance: float = TOLERANCE,
    latency: Latency = layer_ms,
) -> dict[str, str]:
    """Choose the structure of every layer by the rules: {layer: structure}.

    Args:
        density: share of the weights that stays.
        is_allowed: whether the method takes a structure.
        skip: layers that stay dense.
        tolerance: relative extra latency of a finer block over the coarsest.

    Raises JpqError for a tolerance below 0.
    """
    if not 0 <= tolerance < float("inf"):
        raise JpqError(f"A tolerance of {tolerance} makes no sense: 0.2 lets a block be 20 % slower than the coarsest.")
    return {
        layer.name: DENSE if layer.name in skip else _rule(layer, density, hard_task, is_allowed, tolerance, latency)
        for layer in network.layers
    }


def _rule(
    layer: Layer, density: float, hard_task: bool, is_allowed: IsAllowed, tolerance: float, latency: Latency
) -> str:
    """The structure of one layer."""
    structures = allowed_structures(layer, is_allowed)
    blocks = structures.get("punched", structures.get("block", ()))
    if "pattern" in structures and (hard_task or not blocks):
        return "pattern"
    return smallest_fast_block(blocks, [latency(layer, b, density) for b in blocks], tolerance) if blocks else DENSE


def smallest_fast_block(blocks: Collection[str], latencies: Collection[float], tolerance: float) -> str:
    """The smallest block at most `1 + tolerance` times as slow as the largest; blocks: ascending by size."""
    *_, coarsest = latencies
    return next(b for b, t in zip(blocks, latencies, strict=True) if t <= (1 + tolerance) * coarsest)


def is_hard_task(network: Network, example: Any) -> bool:
    """Whether the task has more than 100 classes (outputs of the last layer) or images above 64 pixels a side."""
    sides = [n for x in collect_tensors(example) if x.dim() >= 4 for n in x.shape[2:]]
    return len(network.layers[-1].outputs) > EASY_CLASSES or max(sides, default=0) > EASY_PIXELS


def allowed_structures(layer: Layer, is_allowed: IsAllowed = lambda structure: True) -> dict[str, tuple[str, ...]]:
    """Scheme -> the structures that a layer may have, small blocks first; `dense` is always among them.

    The last of several block sizes spans the layer; sizes that equal a larger one are left out.
    """
    structures: dict[str, tuple[str, ...]] = {DENSE: (DENSE,)}
    size = Size(layer.weight_shape)
    if not can_mask(layer) or layer.depthwise:
        return structures
    flat = all(n == 1 for n in size[2:])
    template = "block:{0}x1" if flat else "punched:{0}x{0}"
    _, outputs, inputs, _ = weight_layout(layer).sides(size)
    largest = outputs if flat else max(outputs, inputs)
    sizes = [template.format(b) for b in BLOCK_SIDES if b < largest] + [template.format("*")]
    if is_allowed(sizes[0]):
        structures["block" if flat else "punched"] = tuple(sizes)
    if tuple(size[2:]) == (3, 3) and is_allowed("pattern"):
        structures["pattern"] = ("pattern",)
    return structures


def cheapest_mapping(
    network: Network, density: float, *, is_allowed: IsAllowed, skip: Collection[str] = ()
) -> dict[str, str]:
    """{layer: structure} that keeps the fewest weights, the finest of equal ones: no mapping can cost less."""
    mapping = {}
    for layer in network.layers:
        schemes = {} if layer.name in skip else allowed_structures(layer, is_allowed)
        structures = [s for scheme in schemes.values() for s in scheme if s != DENSE]
        mapping[layer.name] = min(structures, key=partial(kept_share, layer, density=density), default=DENSE)
    return mapping
