"""What ranks units: the larger its score, the longer a unit stays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from jpq.types import Units


@dataclass(frozen=True, eq=False)
class SiteView:
    """What a score may know of the n units that compete with each other."""

    name: str
    weights: Tensor  # [n, rest]: all weights that read a unit, of every layer that the units' gate masks, as used
    uses: int = 1  # layers that read the units through one gate
    stay: int | None = None  # how many of them are about to stay, where that is known


@dataclass(frozen=True, eq=False)
class Chain:
    """Squared norms along the layers on both sides of each unit; a link is one layer that makes it.

    Sums over the weights of what the network really connects; see `network/chains.py`.
    """

    own: Tensor  # [links, n]: of the unit's filter
    reached: Tensor  # [links, n]: the same, each weight times the squared norm of what makes its input
    after: Tensor  # [links, n]: of what reads the unit, times the squared scale of the filter's normalisation


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was seen when the model ran; a score names what it needs in `needs`."""

    activations: Tensor | None = None  # [batch, n, height, width]: the units as the first layer reads them
    means: Tensor | None = None  # [readers, samples, n]: their mean over all places, as each layer reads them
    labels: Tensor | None = None  # [samples]: class of each sample of `means`
    gradients: tuple[Tensor, ...] = ()  # a batch: [samples, n], z * dL/dz of each sample's own gate z = 1 and own loss
    curvature: tuple[Tensor, ...] = ()  # a batch: [n], z * z * d2L/dz2 of the batch's shared gate and mean loss
    scales: Tensor | None = None  # [n]: |gamma| of the normalisations that the units pass
    chain: Chain | None = None
    generator: torch.Generator | None = None
    activation_gradients: Tensor | None = None  # like activations: of what is to be kept, a sum over the batch


class Score(ABC):
    """Ranks the units of one site."""

    needs: ClassVar[frozenset[str]] = frozenset()  # names of Evidence's fields
    everywhere: ClassVar[bool] = False  # whether units of different layers may be compared by it
    batches: ClassVar[int] = 1  # how many batches of evidence it wants
    order: ClassVar[Literal["together", "forward", "backward"]] = "together"  # whether sites see what others lose

    @abstractmethod
    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """`[1, n]`, larger is more important."""
