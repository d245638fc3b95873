"""Which part of a layer's weights a mask keeps, and what storing it takes: soft while training, exact in reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch import Size, Tensor

from jpq import costs
from jpq.costs import LayerUse
from jpq.methods.structures import mask_encoding
from jpq.plan import MaskPlan, Plan
from jpq.tracing.channel_shares import ChannelShares
from jpq.tracing.network import Layer, Network
from jpq.tracing.sites import Site
from jpq.types import Units

FLOAT_BITS = 32  # of layers that cannot be quantized


def hard_bits(keep: Tensor, alive: Tensor) -> Tensor:
    """The hard decision with the gradient of its probability (straight-through)."""
    return keep + (alive - alive.detach())


def layer_use(layer: Layer, inputs: Any, outputs: Any, density: Density, w_bits: Any, a_bits: Any) -> LayerUse:
    """What one layer spends under these shares and widths."""
    return LayerUse(
        layer.name,
        layer.macs,
        prod(layer.weight_shape),
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
    )


def exact_usage(
    network: Network, shares: ChannelShares, plan: Plan, densities: Densities | None = None
) -> list[LayerUse]:
    """What each layer uses under a plan, in whole numbers and fractions."""
    inputs, outputs = shares.exact(plan.kept)
    density = densities.exact(plan.masks) if densities else {}
    uses = []
    for i, layer in enumerate(network.layers):
        bits = plan.layers.get(layer.name)
        w, a = (bits.w_bits, bits.a_bits) if bits else (FLOAT_BITS, FLOAT_BITS)
        left = density.get(layer.name, DENSE)
        uses.append(layer_use(layer, Fraction(*inputs[i]), Fraction(*outputs[i]), left, w, a))
    return uses


@dataclass(frozen=True)
class Density:
    """What a mask leaves of one layer."""

    share: Any = 1  # of the weights, in [0, 1]; a Tensor while training, a Fraction in a report
    bits: int = 0  # that say which
    regular: bool = True  # whether devices are known that skip the others
    scheme: str = costs.DENSE  # the structure of its units, as text


DENSE = Density()


class Densities:
    """The share of weights that the mask sites keep, by layer."""

    def __init__(self, network: Network, sites: Sequence[Site]):
        self.places = {s.taps[0].layer: i for i, s in enumerate(sites) if s.is_mask}
        self.sizes: dict[str, Tensor] = {}  # layer -> [rows, n]: weights of each unit
        self.all: dict[str, int] = {}
        self.overlapping: set[str] = set()
        self.regular: dict[str, bool] = {}
        self.schemes: dict[str, str] = {}
        self._known: dict[tuple[str, MaskPlan], Density] = {}  # landing asks for the same masks again and again
        for name, i in self.places.items():
            shape = Size(network.layer(name).weight_shape)
            structure = sites[i].taps[0].structure
            self.sizes[name] = structure.sizes(shape)
            self.all[name] = shape.numel()
            self.regular[name] = structure.regular
            self.schemes[name] = structure.spec()
            if not structure.partition:  # of overlapping units at most one stays: what they all leave out is dropped
                self.overlapping.add(name)

    def soft(self, alive: Sequence[Tensor]) -> dict[str, Density]:
        """By layer, the share a differentiable scalar; from the `[rows, n]` units of every site."""
        out = {}
        for name, i in self.places.items():
            units = alive[i]
            if self.sizes[name].device != units.device:
                self.sizes[name] = self.sizes[name].to(units.device)
            sizes = self.sizes[name].to(units)
            if name in self.overlapping:
                share = (sizes * units).sum() / self.all[name]
            else:  # weights in no unit always stay
                share = 1 - (sizes * (1 - units)).sum() / self.all[name]
            stored = self._stored(name, units.detach() > 0)
            out[name] = Density(share, stored, self.regular[name], self.schemes[name])
        return out

    def exact(self, masks: Mapping[str, MaskPlan]) -> dict[str, Density]:
        """By layer, under a plan, counted."""
        return {name: self._counted(name, mask) for name, mask in masks.items()}

    def _counted(self, name: str, mask: MaskPlan) -> Density:
        if (name, mask) not in self._known:
            sizes = self.sizes[name].to("cpu", torch.float64)
            keep = mask.units()
            if name in self.overlapping:
                kept = int((sizes * keep).sum())
            else:
                kept = self.all[name] - int((sizes * ~keep).sum())
            if len(self._known) > 4 * len(self.places) + 64:
                self._known.clear()
            share = Fraction(kept, self.all[name])
            self._known[name, mask] = Density(share, self._stored(name, keep), self.regular[name], self.schemes[name])
        return self._known[name, mask]

    def _stored(self, name: str, keep: Units) -> int:
        """Bits of the mask on disk."""
        valid = self.sizes[name].to(keep.device) > 0
        counts = torch.stack([valid.sum(1), (keep & valid).sum(1)]).cpu().numpy()
        return mask_encoding.choose(keep.shape[1], counts[0], counts[1]).bits
