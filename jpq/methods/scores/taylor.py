"""Taylor scores: the change of the loss when a channel is removed, from the gradient of its gate.

P. Molchanov, A. Mallya, S. Tyree, I. Frosio, J. Kautz, "Importance Estimation for Neural Network Pruning", CVPR 2019,
arXiv:1906.10771.

With a gate z = 1 on a unit, its importance is I = (L(z = 1) - L(z = 0))^2, and from the expansion at 1

    first order    I1 = g^2                 g = dL/dz = sum of w * dL/dw over the weights that read the unit
    second order   I2 = (g - H / 2)^2       H = d2L/dz2; exact for a quadratic loss

of the mean loss of one batch, averaged over batches. The gate stands where readers take the unit in, behind norm and
activation, on their quantized input: with ReLU the same as behind the norm (the paper's place), and exact for every
other activation. A gate that several layers share collects the gradients of all; the score is divided by their number.

We differ: gradients are taken in evaluation mode, on separate batches at each decision, not during training steps;
no moving average (the paper's authors found that it did not matter). H comes from a second backward pass for each unit.
`--method taylor` closes the same share of the MACs in each of ten decisions, not 100 gates every 30 batches, and the
optimizer keeps what it remembers of closed channels (their weights are masked).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from jpq.methods.scores.base import Evidence, Score, SiteView
from jpq.types import JpqError, Units


def _gradients(site: SiteView, evidence: Evidence) -> tuple[Tensor, ...]:
    if not evidence.gradients:
        raise JpqError(f"Taylor scores need labelled batches; give them gradients of the gates of '{site.name}'.")
    return evidence.gradients


class Taylor(Score):
    """First-order score: mean over batches of g^2, with g of the batch's mean loss."""

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    everywhere: ClassVar[bool] = True
    batches: ClassVar[int] = 8

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """Squared change of the loss per use (nats^2), `[1, n]`."""
        parts = [g.mean(0).square() for g in _gradients(site, evidence)]
        return (torch.stack(parts).mean(0) / site.uses)[None]


class FullTaylor(Score):
    """First-order score per sample: mean of g_n^2, g_n of one sample's loss; opposite signs do not cancel."""

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    everywhere: ClassVar[bool] = True
    batches: ClassVar[int] = 8

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """Squared change of the loss per use (nats^2), `[1, n]`."""
        return (torch.cat(_gradients(site, evidence)).square().mean(0) / site.uses)[None]


class SecondTaylor(Score):
    """Second-order score: mean over batches of (g - H / 2)^2."""

    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "curvature"})
    everywhere: ClassVar[bool] = True

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """Squared change of the loss per use (nats^2), `[1, n]`."""
        pairs = zip(_gradients(site, evidence), evidence.curvature, strict=True)
        return (torch.stack([(g.mean(0) - h / 2).square() for g, h in pairs]).mean(0) / site.uses)[None]
