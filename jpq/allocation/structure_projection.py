"""Projection of a weight onto a mask structure at a density, and the share of the weights that it keeps."""

from __future__ import annotations

import torch
from torch import Size, Tensor

from jpq.methods.gates.fixed_count import kept_counts, topk_rows
from jpq.methods.structures import Structure, parse_structure
from jpq.tracing.network import Layer
from jpq.tracing.sites import weight_layout
from jpq.types import DENSE, Units, Weight


@torch.no_grad()
def project(weight: Weight, structure: Structure, density: float) -> Tensor:
    """Project a weight onto a structure: all units but the strongest are zero."""
    return weight * structure.expand(strongest_units(weight, structure, density), weight.shape)


def strongest_units(weight: Weight, structure: Structure, density: float) -> Units:
    """Keep mask, [rows, n], of the units with the largest norm in each row: those of the projected weight.

    As many as the structure's quota, else `density` of them, at least one. Units at ragged edges rank by their mean
    square (the projection then is not always the nearest point).
    """
    sizes = structure.sizes(weight.shape).to(weight.device)
    scores = structure.pool(weight.square()) / sizes.clamp_min(1)
    return topk_rows(scores, _kept_counts(structure, sizes, density), sizes > 0)


def kept_share(layer: Layer, structure: str, density: float) -> float:
    """Share of a layer's weights that stays at a density, after rounding to whole units or to a structure's quota."""
    if structure == DENSE:
        return 1.0
    mask_structure, size = parse_structure(structure, weight_layout(layer)), Size(layer.weight_shape)
    sizes = mask_structure.sizes(size)
    share = (_kept_counts(mask_structure, sizes, density) / (sizes > 0).sum(1)).mean()
    return float(share * sizes.sum() / size.numel())


def _kept_counts(structure: Structure, sizes: Units, density: float) -> Tensor:
    """`[rows]`: number of units that stay in each row."""
    quota, units = structure.quota(), (sizes > 0).sum(1)
    return kept_counts(density, units).clamp_min(1) if quota is None else units.clamp_max(quota)
