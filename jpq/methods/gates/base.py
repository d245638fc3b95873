"""The contract of a gate: the keep-or-drop decision over the units of one site, soft in training and exact afterwards.

A gate that is added touches its own file, the family's table and one row of METHODS: what the rest of the code must
know of it is asked through the members here, never by its class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from jpq.methods.structures.base import Structure
from jpq.types import JpqError, Units, Weight

Holds = Literal["never", "at the end", "always"]

LevelRange = Callable[[], tuple[Tensor, Tensor]]  # gives (largest level, width of the zero bin), scalars


class WeightQuantizer(Protocol):
    """The weight quantizer that a gate may act on, as far as gates know it."""

    def use_dead_zone(self, ends: LevelRange) -> None:
        """Round weights on a grid with this zero bin while training; JpqError where the width has a grid already."""


class Gate(nn.Module, ABC):
    """Relaxed keep-or-drop decision over the `[rows, n]` units of one site; `keep` is the exact decision."""

    # how it fits into a method
    fixed_count: ClassVar[bool] = False  # the number of kept units is set in advance: no budget pressure
    takes_density: ClassVar[bool] = False  # the constructor takes `density=`, the share of the weights that stays
    ranks_units: ClassVar[bool] = False  # a score writes the buffer `margins`, by which a schedule closes units
    decided_outside: ClassVar[bool] = False  # the decision comes from outside by `take` (--mask) and is not learned
    least_text: ClassVar[str] = ""  # fewest units that can stay, for error messages; "": a unit (or more) of each site
    bilevel: ClassVar[bool] = False  # decisions learn on other batches than the weights
    self_updating: ClassVar[bool] = False  # `after_step` moves its parameters; no optimizer does
    reads_gradients: ClassVar[bool] = False  # takes gradients as the backward pass gives them: the loss is not scaled

    # what it needs, and the structures that suit it
    needs_weights: ClassVar[bool] = False  # `observe_weights` is called before every draw
    generates_weights: ClassVar[bool] = False  # a hypernetwork generates the layers' weights from `latent`
    elementwise_only: ClassVar[bool] = False  # a unit must be one weight
    channels_only: ClassVar[bool] = False  # a unit must be a channel
    enforces_quota: ClassVar[Holds] = "never"  # when each row keeps as many units as its structure prescribes
    straight_through: ClassVar[bool] = False  # dropped weights get the gradient of kept ones, and may come back
    priced_penalty: ClassVar[bool] = False  # `penalty` counts for what the unit costs, not as a mean over units

    def __init__(self, rows: int, n: int):
        super().__init__()
        self.rows, self.n = rows, n

    @abstractmethod
    def relaxed(self) -> Units:
        """Multiplier z of the weights in training, drawn once per forward pass and shared by all taps."""

    @abstractmethod
    def margin(self) -> Units:
        """Distance from the threshold in nats: above 0 kept, else dropped; discretization closes the smallest first."""

    def set_site(self, sizes: Units, quota: int | None) -> None:
        """Set the number of weights in each unit (0: padding), and the units that must stay per row if prescribed."""

    def attach_quantizer(self, quantizer: WeightQuantizer) -> None:
        """Act on the quantizer of the weight that the site's first tap masks; by default nothing."""

    def observe_weights(self, weights: Sequence[tuple[Weight, Structure]]) -> None:
        """Receive the current float weights of the site's taps and how units lie in them, before every draw."""

    def link(self, gates: Sequence[Gate]) -> None:
        """Receive all gates of the network once at the start, for methods that rank units of all sites together."""

    def take(self, keep: Units) -> None:
        """Take over a decision from outside, `[rows, n]` of 0 and 1; JpqError unless `decided_outside`."""
        raise JpqError(f"A {type(self).__name__} gate learns its decision and cannot take one from a mask.")

    def latent(self) -> Units:
        """Vector from which the weights of the site's layers are generated (`generates_weights`), `[rows, n]`."""
        return torch.ones_like(self.keep())

    def own_loss(self) -> Tensor | None:
        """Term that the method itself adds to the loss, unscaled (an augmented Lagrangian); None for nothing."""
        return None

    def metrics(self) -> dict[str, float]:
        """Named numbers about this gate's decisions for the report, beside how many units stay."""
        return {}

    def keep(self) -> Units:
        """Decision for each unit: exactly 0 or 1."""
        margin = self.margin().detach()
        return (margin > 0).to(margin.dtype)

    def keep_probability(self) -> Units:
        """Differentiable probability that each unit is kept, which costs are computed from."""
        return self.keep()

    def scale(self) -> Units:
        """Multiplier of kept units, folded into the weights by discretization."""
        return torch.ones_like(self.keep())

    def input_noise(self, batch: int) -> Tensor | None:
        """Noise of mean 1 per sample, `[batch, n]`, that multiplies the consumers' inputs; None for none."""
        return None

    def penalty(self) -> Tensor | None:
        """Regulariser of each unit, `[rows, n]` in nats; None for none.

        The loss holds its mean over units, times the gate weight and the budget's multiplier. With `priced_penalty` it
        holds the sum over units instead, each times what its cost weighs in the loss (`jpq.training.loop.pressure`).
        """
        return None

    def after_step(self, progress: float) -> None:
        """Anneal, project or re-rank after an optimizer step; progress of the search in [0, 1]."""

    def finish(self) -> None:
        """Take the final decision once the search has ended; by default the present one stands."""

    def multiplier(self) -> Units | None:
        """Multiplier of the weights: relaxed in training, `keep * scale` in evaluation; None: weights stay dense."""
        return self.relaxed() if self.training else self.keep() * self.scale()


def squared_norms(weights: Sequence[tuple[Weight, Structure]]) -> Units:
    """Sum of the squared weights of each unit over all taps, `[rows, n]`; differentiable."""
    parts = [structure.pool(weight.square()) for weight, structure in weights]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
