"""No ranking at all: what every score must beat."""

from __future__ import annotations

from typing import ClassVar

import torch

from jpq.scores.base import Evidence, Score, SiteView
from jpq.types import Units


class Random(Score):
    """Uniform in [0, 1), from the evidence's generator."""

    needs: ClassVar[frozenset[str]] = frozenset({"generator"})

    def __call__(self, site: SiteView, evidence: Evidence) -> Units:
        """`[1, n]`."""
        return torch.rand(1, len(site.weights), generator=evidence.generator).to(site.weights.device)
