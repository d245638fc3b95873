"""Which part of a layer's weights a mask keeps: soft while training, exact in a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Size, Tensor

from jpq.network.record import Network
from jpq.network.sites import Site
from jpq.plan import MaskPlan


class Densities:
    """The share of weights that the mask sites keep, by layer."""

    def __init__(self, network: Network, sites: Sequence[Site]):
        self.places = {s.taps[0].layer: i for i, s in enumerate(sites) if s.is_mask}
        self.sizes: dict[str, Tensor] = {}  # layer -> [rows, n]: weights of each unit
        self.all: dict[str, int] = {}
        self.overlapping: set[str] = set()
        for name, i in self.places.items():
            shape = Size(network.layer(name).weight_shape)
            structure = sites[i].taps[0].structure
            self.sizes[name] = structure.sizes(shape)
            self.all[name] = shape.numel()
            if not structure.partition:  # of overlapping units at most one stays: what they all leave out is dropped
                self.overlapping.add(name)

    def soft(self, alive: Sequence[Tensor]) -> dict[str, Tensor]:
        """Layer -> share kept, a scalar in [0, 1], differentiable; from the `[rows, n]` units of every site."""
        out = {}
        for name, i in self.places.items():
            units = alive[i]
            if self.sizes[name].device != units.device:
                self.sizes[name] = self.sizes[name].to(units.device)
            sizes = self.sizes[name].to(units)
            if name in self.overlapping:
                out[name] = (sizes * units).sum() / self.all[name]
            else:  # weights in no unit always stay
                out[name] = 1 - (sizes * (1 - units)).sum() / self.all[name]
        return out

    def exact(self, masks: Mapping[str, MaskPlan]) -> dict[str, Fraction]:
        """Layer -> share kept under a plan, counted."""
        out = {}
        for name, mask in masks.items():
            sizes = self.sizes[name].to("cpu", torch.float64)
            keep = mask.units()
            if name in self.overlapping:
                kept = int((sizes * keep).sum())
            else:
                kept = self.all[name] - int((sizes * ~keep).sum())
            out[name] = Fraction(kept, self.all[name])
        return out
