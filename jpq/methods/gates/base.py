"""How keep-or-drop is relaxed: the decision of one site, soft while training, exact afterwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from jpq.methods.structures.base import Structure
from jpq.types import Units, Weight

Holds = Literal["never", "at the end", "always"]


class Gate(nn.Module, ABC):
    """Relaxed keep-or-drop decision over the `[rows, n]` units of one site. `keep` decides; the rest relaxes it."""

    fixed_count: ClassVar[bool] = False  # how many units stay is given: landing leaves them, and they need no pressure
    needs_weights: ClassVar[bool] = False  # wants `see` called before every draw
    elementwise_only: ClassVar[bool] = False  # a unit must be one weight
    channels_only: ClassVar[bool] = False  # a unit must be a channel
    enforces_quota: ClassVar[Holds] = "never"  # when rows keep as many units as the structure says
    straight_through: ClassVar[bool] = False  # dropped weights get the gradient of kept ones, and may come back
    self_updating: ClassVar[bool] = False  # `after_step` moves its parameters; no optimiser does
    bilevel: ClassVar[bool] = False  # decisions learn on other batches than the weights (bi-level)

    def __init__(self, rows: int, n: int):
        super().__init__()
        self.rows, self.n = rows, n

    @abstractmethod
    def relaxed(self) -> Units:
        """z in training: multiplies the weights; drawn once per forward pass and shared by all taps."""

    @abstractmethod
    def margin(self) -> Units:
        """Distance from the threshold in nats: > 0 kept, <= 0 dropped; landing closes the smallest first."""

    def set_site(self, sizes: Units, quota: int | None) -> None:
        """What the site is like: weights that each unit stands for (0: padding), and units per row that must stay."""

    def observe_weights(self, weights: Sequence[tuple[Weight, Structure]]) -> None:
        """The float weights of the site's taps as they stand, and how units lie in them; before every draw."""

    def link(self, gates: Sequence[Gate]) -> None:
        """All gates of the network, once, at the start: for methods that rank units of all sites together."""

    def own_loss(self) -> Tensor | None:
        """What the method itself adds to the loss, unscaled (an augmented Lagrangian); None for nothing."""
        return None

    def metrics(self) -> dict[str, float]:
        """What the report says about this gate's decisions beside how many units stay."""
        return {}

    def keep(self) -> Units:
        """Exactly 0 or 1."""
        margin = self.margin().detach()
        return (margin > 0).to(margin.dtype)

    def keep_probability(self) -> Units:
        """Differentiable P(kept), what a cost counts."""
        return self.keep()

    def scale(self) -> Units:
        """Multiplier of kept units, folded into the weights at landing."""
        return torch.ones_like(self.keep())

    def input_noise(self, batch: int) -> Tensor | None:
        """`[batch, n]` noise of mean 1 that multiplies what consumers read (gates with noise per sample)."""
        return None

    def penalty(self) -> Tensor | None:
        """Own regulariser per unit, `[rows, n]` in nats; None for none."""
        return None

    def after_step(self, progress: float) -> None:
        """Anneal, project or re-rank after an optimiser step; progress of the search in [0, 1]."""

    def multiplier(self) -> Units | None:
        """What multiplies the weights now: relaxed in training, `keep * scale` in evaluation; None: they stay dense."""
        return self.relaxed() if self.training else self.keep() * self.scale()


def squares(weights: Sequence[tuple[Weight, Structure]]) -> Units:
    """`[rows, n]`: the weights of each unit, squared and summed over all taps; differentiable."""
    parts = [structure.pool(weight.square()) for weight, structure in weights]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
