"""The scale of a unit's normalisation."""

from __future__ import annotations

from typing import ClassVar

from jpq.scores.base import Evidence, Score, SiteView
from jpq.types import JpqError, Units


class NormScale(Score):
    """|gamma|, summed over the normalisations that a unit passes; comparable between layers.

    Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017, arXiv:1708.06519. We do
    not press on gamma while training.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"scales"})
    everywhere: ClassVar[bool] = True

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """`[1, n]`. Raises JpqError where no normalisation has a scale for these units."""
        if evidence.scales is None:
            raise JpqError(
                f"The channels of '{site.name}' pass no normalisation with a scale. Choose another --score, or exclude "
                "the layer that makes them with --skip."
            )
        return evidence.scales[None]
