"""`LayerUse` of all that a network computes: differentiable during the search, exact under a plan; densities of masks.

Layers come first, in order; products of computed tensors and tables of parameters, which stay at 32 bits, follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Size, Tensor

from jpq.costs import LayerUse
from jpq.methods.structures import mask_encoding
from jpq.plan import MaskPlan, Plan
from jpq.tracing.channel_shares import ChannelShares, Shares
from jpq.tracing.network import Layer, Network
from jpq.tracing.sites import Site
from jpq.types import DENSE, Units

FLOAT_BITS = 32  # width of layers that stay in floating point


def exact_usage(
    network: Network, shares: ChannelShares, plan: Plan, densities: Densities | None = None
) -> list[LayerUse]:
    """The use of each layer, product and table under a plan, in whole numbers and fractions."""
    inputs, outputs = shares.exact_shares(plan.kept)
    masked = densities.exact_densities(plan.masks) if densities else {}
    work = shares.exact_work(plan.kept)
    uses = []
    for i, layer in enumerate(network.layers):
        bits = plan.layers.get(layer.name)
        w_bits, a_bits = (bits.w_bits, bits.a_bits) if bits else (FLOAT_BITS, FLOAT_BITS)
        density = masked.get(layer.name, NO_MASK)
        sides = Fraction(*inputs[i]), Fraction(*outputs[i])
        uses.append(layer_use(layer, *sides, density, w_bits, a_bits, work.positions[i]))
    return uses + other_uses(network, work)


def layer_use(
    layer: Layer, inputs: Any, outputs: Any, density: Density, w_bits: Any, a_bits: Any, positions: Any = 1
) -> LayerUse:
    """The use of one layer at these shares of channels and positions, this density and these widths."""
    return LayerUse(
        layer.name,
        layer.macs,
        layer.weights,
        len(layer.outputs),
        inputs,
        outputs,
        density.share,
        w_bits,
        a_bits,
        density.bits,
        density.regular,
        density.scheme,
        layer.clock,
        positions,
    )


def other_uses(network: Network, work: Shares) -> list[LayerUse]:
    """The uses of products of computed tensors and of tables, all of them at 32 bits."""
    products = [
        LayerUse(p.name, p.macs, 0, 0, share, 1, 1, FLOAT_BITS, FLOAT_BITS, part="product")
        for p, share in zip(network.products, work.products, strict=True)
    ]
    tables = [
        LayerUse(t.name, 0, t.numbers, 0, share, 1, 1, FLOAT_BITS, FLOAT_BITS, part="table")
        for t, share in zip(network.tables, work.tables, strict=True)
    ]
    return products + tables


def straight_through(keep: Tensor, keep_probability: Tensor) -> Tensor:
    """The hard decisions `keep` with the gradient of their probabilities `keep_probability` (straight-through)."""
    return keep + (keep_probability - keep_probability.detach())


@dataclass(frozen=True)
class Density:
    """The part of one layer's weights that a mask keeps, and the bits that store the mask."""

    share: Any = 1  # of the weights, in [0, 1]; a Tensor while training, a Fraction in a report
    bits: int = 0  # of the mask on disk
    regular: bool = True  # whether known devices skip the dropped weights
    scheme: str = DENSE  # structure of the mask, as text


NO_MASK = Density()


class Densities:
    """The densities of all masked layers, computed from the units of their mask sites."""

    def __init__(self, network: Network, sites: Sequence[Site]):
        self.places = {s.taps[0].layer: i for i, s in enumerate(sites) if s.is_mask}  # masked layer -> site's index
        self.sizes: dict[str, Tensor] = {}  # layer -> [rows, n]: weights of each unit
        self.all: dict[str, int] = {}  # layer -> number of weights
        self.overlapping: set[str] = set()
        self.regular: dict[str, bool] = {}
        self.schemes: dict[str, str] = {}
        self._counted: dict[tuple[str, MaskPlan], Density] = {}  # discretization counts the same masks repeatedly
        for name, i in self.places.items():
            shape = Size(network.layer(name).weight_shape)
            structure = sites[i].taps[0].structure
            self.sizes[name] = structure.sizes(shape)
            self.all[name] = shape.numel()
            self.regular[name] = structure.regular
            self.schemes[name] = structure.spec()
            if not structure.partition:  # at most one of its overlapping units stays; weights outside it are dropped
                self.overlapping.add(name)

    def soft_densities(self, keep_probabilities: Sequence[Tensor]) -> dict[str, Density]:
        """Layer -> density whose share is a differentiable scalar.

        Args:
            keep_probabilities: of the units of every site, `[rows, n]` each.
        """
        densities = {}
        for name, i in self.places.items():
            units = keep_probabilities[i]
            if self.sizes[name].device != units.device:
                self.sizes[name] = self.sizes[name].to(units.device)
            sizes = self.sizes[name].to(units)
            if name in self.overlapping:
                share = (sizes * units).sum() / self.all[name]
            else:  # weights in no unit always stay
                share = 1 - (sizes * (1 - units)).sum() / self.all[name]
            bits = self._mask_bits(name, units.detach() > 0)
            densities[name] = Density(share, bits, self.regular[name], self.schemes[name])
        return densities

    def exact_densities(self, masks: Mapping[str, MaskPlan]) -> dict[str, Density]:
        """Layer -> density under the masks of a plan, as a fraction."""
        return {name: self._exact_density(name, mask) for name, mask in masks.items()}

    def _exact_density(self, name: str, mask: MaskPlan) -> Density:
        if (name, mask) not in self._counted:
            sizes = self.sizes[name].to("cpu", torch.float64)
            keep = mask.units()
            if name in self.overlapping:
                kept = int((sizes * keep).sum())
            else:
                kept = self.all[name] - int((sizes * ~keep).sum())
            if len(self._counted) > 4 * len(self.places) + 64:
                self._counted.clear()
            share, bits = Fraction(kept, self.all[name]), self._mask_bits(name, keep)
            self._counted[name, mask] = Density(share, bits, self.regular[name], self.schemes[name])
        return self._counted[name, mask]

    def _mask_bits(self, name: str, keep: Units) -> int:
        """Bits of the mask on disk."""
        valid = self.sizes[name].to(keep.device) > 0
        counts = torch.stack([valid.sum(1), (keep & valid).sum(1)]).cpu().numpy()
        return mask_encoding.choose(keep.shape[1], counts[0], counts[1]).bits
