"""HRank score: the rank of a channel's feature map."""

from __future__ import annotations

from typing import ClassVar

import torch

from jpq.methods.scores.base import Evidence, Score, SiteView
from jpq.types import JpqError, Units


class HRank(Score):
    """Rank of a unit's feature map, averaged over one batch; units of equal rank keep their order.

    Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020, arXiv:2002.10179. We rank the map as
    the layer reads it, after normalisation and activation.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"activations"})

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """Mean rank, `[1, n]`, at most min(height, width)."""
        if evidence.activations is None:
            raise JpqError(f"HRank ranks feature maps; give it the activations of '{site.name}'.")
        return torch.linalg.matrix_rank(evidence.activations.float()).float().mean(0)[None]
