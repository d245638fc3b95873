"""What ranks units."""

from jpq.scores.base import Evidence, Score, SiteView
from jpq.scores.feature_maps import HRank
from jpq.scores.magnitude import FPGM, L1, L2, LAMP
from jpq.scores.saliency import CamSaliency, Saliency

# what ranks any network; saliency needs a detector's scores (jpq.detection)
SCORES: dict[str, Score] = {"l1": L1(), "l2": L2(), "fpgm": FPGM(), "lamp": LAMP(), "hrank": HRank()}

__all__ = [
    "FPGM", "L1", "L2", "LAMP", "SCORES", "CamSaliency", "Evidence", "HRank", "Saliency", "Score", "SiteView",
]  # fmt: skip
