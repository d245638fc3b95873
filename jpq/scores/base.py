"""What ranks units: the larger its score, the longer a unit stays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from jpq.types import Units


@dataclass(frozen=True, eq=False)
class SiteView:
    """What a score may know of the n units that compete with each other."""

    name: str
    weights: Tensor  # [n, rest]: all weights that read a unit, of every layer that the units' gate masks


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was seen when the model ran; a score names what it needs in `needs`."""

    activations: Tensor | None = None  # [batch, n, height, width]: the units as the layer reads them
    activation_gradients: Tensor | None = None  # the same shape: of what is to be kept, a sum over the batch


class Score(ABC):
    """Ranks the units of one site."""

    needs: ClassVar[frozenset[str]] = frozenset()  # of the names "activations" and "activation_gradients"
    everywhere: ClassVar[bool] = False  # whether units of different layers may be compared by it

    @abstractmethod
    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """`[1, n]`, larger is more important."""
