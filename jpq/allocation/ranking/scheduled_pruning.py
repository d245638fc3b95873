"""Scheduled pruning by a score: channels close at the decisions of a schedule while weights and bits are learned.

At each decision the score ranks the open channels of the network as it stands, on batches of training data, and the
lowest close until the schedule's share of the MACs is left: one threshold on the ranking, by bisection on that cost.
Closed channels stay closed until discretization, which meets the budget with the last ranking as margins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from jpq import costs
from jpq.allocation.ranking.evidence import Batches, Loss
from jpq.allocation.ranking.rank import rank_units
from jpq.compression.feasibility import density_target
from jpq.compression.model import CompressedModel
from jpq.methods.schedules import Schedule
from jpq.methods.scores import Score

Fits = Callable[[Sequence[costs.LayerUse]], bool]  # whether a cost of these layers is within its limit

BatchSupply = Callable[[int], Batches]  # number of the decision -> batches of (inputs, labels)


class ScheduledPruning:
    """Pruning of a network's channels at the decisions of a schedule; call it with the progress after every step.

    Args:
        net: attached with `Ranked` gates.
        score: larger is more important.
        schedule: when decisions are taken, and how the density falls.
        density: share of the dense network's MACs that stays after the last decision.
        draw_batches: training batches for the score, never held-out or test data.
        loss: for scores that need gradients.

    Raises JpqError for a density that even one channel at each site exceeds.
    """

    def __init__(
        self,
        net: CompressedModel,
        score: Score,
        schedule: Schedule,
        density: float,
        draw_batches: BatchSupply,
        loss: Loss = F.cross_entropy,
    ):
        density_target(net, density)
        self.net, self.score, self.schedule, self.density = net, score, schedule, density
        self.draw_batches, self.loss = draw_batches, loss

    def __call__(self, progress: float) -> None:
        """Take the decision that is due, if any; of several only the last."""
        due = self.schedule.due(progress)
        if not self.net.gates or due <= int(self.net.gates[0].decisions):
            return
        fits = macs_limit(self.net, self.schedule.density(due, self.density))
        margins = [gate.margins.clone() for gate in self.net.gates]
        rank_units(self.net, self.score, self.draw_batches(due), uniform_keep_share(self.net, fits), self.loss)
        level = find_threshold(self.net, [gate.margins for gate in self.net.gates], fits)
        for gate, before in zip(self.net.gates, margins, strict=True):
            gate.margins.sub_(level)
            # closed channels stay closed, also where the last channel of a site was spared
            gate.margins.copy_(torch.where(before > 0, gate.margins, gate.margins.clamp_max(-1e-6)))
            _keep_best_open(gate.margins)
            gate.decisions.fill_(due)
        for draw in self.net.draws:
            draw.resample()


def _keep_best_open(margins: Tensor) -> None:
    """Raise the margin of a site's best channel above 0, in place."""
    best = margins.view(-1).argmax()
    margins.view(-1)[best] = margins.view(-1)[best].clamp_min(1e-6)


def macs_limit(net: CompressedModel, density: float) -> Fits:
    """A limit of MACs as a predicate: at most `density` of the dense network's MACs is left."""
    limit = density * costs.baseline(net.exact_usage())["macs"] * (1 + 1e-9)
    return lambda uses: float(costs.macs(uses)) <= limit


def uniform_keep_share(net: CompressedModel, fits: Fits) -> float:
    """The largest share of units that all sites alike can keep within a limit."""
    return 1 - find_threshold(net, [torch.arange(1, site.n + 1)[None] / site.n for site in net.sites], fits)


def find_threshold(net: CompressedModel, quantiles: Sequence[Tensor], fits: Fits) -> float:
    """Find the lowest threshold on a ranking at which a cost fits; every site keeps its best unit at any threshold.

    Args:
        net: the sites, costs and bits.
        quantiles: `[1, n]` a site in (0, 1]; units above the threshold stay.
        fits: monotone: holds for all thresholds above one for which it holds; the highest is given where none does.
    """
    plan = net.plan()
    levels = [0.0, *sorted({v for q in quantiles for v in q.flatten().tolist()})]

    def fits_at(level: float) -> bool:
        kept = {}
        for site, q in zip(net.sites, quantiles, strict=True):
            keep = (q[0] > level).cpu()
            keep[q[0].argmax().cpu()] = True
            kept[site.name] = tuple(keep.tolist())
        return fits(net.exact_usage(replace(plan, kept=kept)))

    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits_at(levels[middle]) else (middle + 1, high)
    return levels[low]
