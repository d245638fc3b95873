"""CATRO score: the set of channels that separates the classes best (trace ratio).

W. Hu, Z. Che, N. Liu, M. Li, J. Tang, C. Zhang, J. Wang, "CATRO: Channel Pruning via Class-Aware Trace Ratio
Optimization", IEEE TNNLS 2023, arXiv:2110.10921. With X the mean of each unit's map, per sample,

    w_c = sum over classes k, samples i of k of (X[i, c] - mean_k[c])^2 + eps     within classes
    b_c = sum over classes k of n_k (mean_k[c] - mean[c])^2                       between classes
    goal: the set I of d units with the largest sum_I b / sum_I w
    solve: r = 0; repeat I = the d largest of b - r w, r = sum_I b / sum_I w, until I is unchanged

r never falls and the end is the global optimum (Nie et al., Trace Ratio Criterion for Feature Selection, AAAI 2008).
The score is b - r w at the optimum of as many units as are about to stay (`SiteView.kept_count`): its d best are I.
b and w of units that several layers read are summed over these layers.

The paper's own formulas were not available; the ratio is the classical one of the same name. Units without any scatter
are removed before all others: with eps alone they would beat every unit with b < r w, live ones included.

We differ: this is the second stage, the set of each layer. The first, how many units each layer keeps, is the allocator
`greedy` of `--method two-stage`, which takes these scores, at the ratio of the set that stays, for its gains (a lower
ratio would tell more units apart); `--method catro` keeps the same share of every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jpq.methods.scores.base import Evidence, Score, SiteView
from jpq.types import JpqError, Units

EPS, DEAD = 1e-8, 1e-6  # shares of the mean scatter: added to w, and below which a unit is dead

ROUNDS = 100  # largest number of iterations


def scatters(means: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scatter of each unit between and within classes, two `[n]` tensors from `[samples, n]`, eps left out."""
    x = means.double()
    middle = x.mean(0)
    between, within = torch.zeros_like(middle), torch.zeros_like(middle)
    for k in labels.unique():
        members = x[labels == k]
        between += len(members) * (members.mean(0) - middle).square()
        within += (members - members.mean(0)).square().sum(0)
    return between, within


def best_set(between: Tensor, within: Tensor, d: int) -> tuple[Tensor, list[float]]:
    """Gain b - r w of each unit at the best set of d units, `[n]`, and the ratios r of all iterations.

    Args:
        between, within: b and w, `[n]`; w > 0.
        d: how many units, from 1 to n.
    """
    chosen, ratio, path = None, 0.0, [0.0]
    for _ in range(ROUNDS):
        gain = between - ratio * within
        best = gain.argsort(descending=True, stable=True)[:d].sort().values
        if chosen is not None and torch.equal(best, chosen):
            break
        chosen = best
        ratio = float(between[best].sum() / within[best].sum())
        path.append(ratio)
    return between - ratio * within, path


@dataclass(frozen=True)
class Catro(Score):
    """Gain b - r w of each unit; `classes` are those that the network must tell apart (all if empty)."""

    needs: ClassVar[frozenset[str]] = frozenset({"means", "labels"})
    batches: ClassVar[int] = 8
    classes: Sequence[int] = ()

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """Importance, `[1, n]`. Raises JpqError where there are fewer than two classes of two samples."""
        if evidence.means is None or evidence.labels is None:
            raise JpqError(f"CATRO needs labelled batches; give it the means of the units of '{site.name}'.")
        means, labels = evidence.means, evidence.labels
        if self.classes:
            named = torch.isin(labels, torch.tensor(list(self.classes), device=labels.device))
            means, labels = means[:, named], labels[named]
        if int((labels.unique(return_counts=True)[1] > 1).sum()) < 2:
            raise JpqError(
                f"CATRO found {len(labels)} samples of {len(labels.unique())} classes in its batches and needs two of "
                "two classes at least. Name more --classes, or use a larger --batch-size."
            )
        pairs = [scatters(x, labels) for x in means]
        between, within = (torch.stack(parts).sum(0) for parts in zip(*pairs, strict=True))
        total = between + within
        active = total > DEAD * total.mean()
        score = torch.full_like(total, -torch.inf)
        if not bool(active.any()):
            return score[None]
        b, w = between[active], within[active] + EPS * total.mean()
        staying = min(site.kept_count or len(total), int(active.sum()))
        score[active] = best_set(b, w, max(1, staying))[0]
        return score[None]
