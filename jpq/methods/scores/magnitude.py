"""Scores that need no data: from the weights x_i that read unit i (a row each), norm scales, or random numbers.

We differ: the papers rank the filter that makes a channel. A channel goes from the layers that read it, each of which
may have its own set (`--method upscale`), so it is ranked by the weights that go with it there.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from jpq.methods.scores.base import Evidence, Score, SiteView
from jpq.types import JpqError, Units


class L1(Score):
    """L1 norm sum |x_i|.

    Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710.
    """

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """L1 norms, `[1, n]`."""
        return site.weights.abs().sum(1)[None]


class L2(Score):
    """L2 norm ||x_i||."""

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """L2 norms, `[1, n]`."""
        return site.weights.norm(dim=1)[None]


class FPGM(Score):
    """Distance from the geometric median: sum_j ||x_i - x_j||, small for units that lie near all others.

    He et al., Filter Pruning via Geometric Median, CVPR 2019, arXiv:1811.00250.
    """

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """Sums of distances, `[1, n]`."""
        return torch.cdist(site.weights, site.weights, compute_mode="donot_use_mm_for_euclid_dist").sum(1)[None]


class LAMP(Score):
    """LAMP score: n_i / sum of n_j over the units not smaller than i, with n = ||x||; comparable between layers.

    The first of equal units counts as the smallest. Lee et al., Layer-adaptive sparsity for the magnitude-based
    pruning, ICLR 2021, arXiv:2010.07611; for channels as UPSCALE (arXiv:2307.08771) uses it, on norms.
    """

    everywhere: ClassVar[bool] = True

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """Shares, `[1, n]`; the largest unit of a site has 1."""
        norms, order = site.weights.norm(dim=1).sort(stable=True)
        rest = norms.flip(0).cumsum(0).flip(0)
        scores = torch.empty_like(norms)
        scores[order] = norms / rest.clamp_min(torch.finfo(norms.dtype).tiny)  # undoes the sort
        return scores[None]


class Random(Score):
    """Uniform random numbers in [0, 1), from the evidence's generator: a baseline."""

    needs: ClassVar[frozenset[str]] = frozenset({"generator"})

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """Random numbers, `[1, n]`."""
        return torch.rand(1, len(site.weights), generator=evidence.generator).to(site.weights.device)


class NormScale(Score):
    """Scale |gamma| of a unit's normalisations, summed over all that it passes; comparable between layers.

    Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017, arXiv:1708.06519. We add
    no penalty on gamma while training.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"scales"})
    everywhere: ClassVar[bool] = True

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """Scales, `[1, n]`. Raises JpqError where no normalisation has a scale for these units."""
        if evidence.scales is None:
            raise JpqError(
                f"The channels of '{site.name}' pass no normalisation with a scale. Choose another --score, or exclude "
                "the layer that makes them with --skip."
            )
        return evidence.scales[None]
