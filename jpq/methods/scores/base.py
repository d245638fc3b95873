"""The contract of a score: a number for each channel of a site, larger is more important."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from jpq.types import Units


@dataclass(frozen=True, eq=False)
class SiteView:
    """Weights and counts of the n units that a score ranks, which compete with each other."""

    name: str
    weights: Tensor  # [n, rest]: all weights that read a unit, of every layer that the units' gate masks, as used
    uses: int = 1  # number of layers that read the units through one gate
    kept_count: int | None = None  # number of units that are about to stay, where that is known


@dataclass(frozen=True, eq=False)
class Chain:
    """Squared norms of the layers before and after each unit; a link is one layer that produces the unit.

    Sums over the weights of connected channels only; see `allocation/ranking/neighbour_norms.py`.
    """

    filter_norms: Tensor  # [links, n]: squared norm of the unit's filter
    producer_norms: Tensor  # [links, n]: squared norm of the filter, each weight times its producer's norm
    consumer_norms: Tensor  # [links, n]: squared norm of the unit's consumers, times the filter's squared norm scale


@dataclass(frozen=True, eq=False)
class Evidence:
    """Measurements of the running model; a score names the ones that it needs in `needs`."""

    activations: Tensor | None = None  # [batch, n, height, width]: the units as the first layer reads them
    means: Tensor | None = None  # [consumers, samples, n]: their mean over all places, as each layer reads them
    labels: Tensor | None = None  # [samples]: class of each sample of `means`
    gradients: tuple[Tensor, ...] = ()  # a batch: [samples, n], z * dL/dz of each sample's gate z = 1 and loss
    curvature: tuple[Tensor, ...] = ()  # a batch: [n], z * z * d2L/dz2 of the batch's shared gate and mean loss
    scales: Tensor | None = None  # [n]: |gamma| of the normalisations that the units pass
    chain: Chain | None = None
    generator: torch.Generator | None = None
    activation_gradients: Tensor | None = None  # like activations: gradient of a sum over the batch


class Score(ABC):
    """Ranking of the units of one site."""

    needs: ClassVar[frozenset[str]] = frozenset()  # names of Evidence's fields
    everywhere: ClassVar[bool] = False  # whether scores of units in different layers are comparable
    batches: ClassVar[int] = 1  # number of batches of evidence
    order: ClassVar[Literal["together", "forward", "backward"]] = "together"  # in which order sites lose units

    @abstractmethod
    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """Importance of each unit, `[1, n]`; larger is more important."""
