"""SCORES: how the channels of a site are ranked, one family of papers a file."""

from __future__ import annotations

from dataclasses import replace

from jpq.methods.scores.base import Chain, Evidence, Score, SiteView
from jpq.methods.scores.catro import Catro
from jpq.methods.scores.hrank import HRank
from jpq.methods.scores.lookahead import Backward, Forward, Lookahead, Next, Previous
from jpq.methods.scores.magnitude import FPGM, L1, L2, LAMP, NormScale, Random
from jpq.methods.scores.taylor import FullTaylor, SecondTaylor, Taylor
from jpq.types import JpqError, unknown

__all__ = [
    "FPGM",
    "L1",
    "L2",
    "LAMP",
    "SCORES",
    "Backward",
    "Catro",
    "Chain",
    "Evidence",
    "Forward",
    "FullTaylor",
    "HRank",
    "Lookahead",
    "Next",
    "NormScale",
    "Previous",
    "Random",
    "Score",
    "SecondTaylor",
    "SiteView",
    "Taylor",
    "pick_score",
]

# scores for any network; saliency needs a detector's outputs (jpq.detection.detector)
SCORES: dict[str, Score] = {
    "l1": L1(),
    "l2": L2(),
    "fpgm": FPGM(),
    "lamp": LAMP(),
    "hrank": HRank(),
    "taylor": Taylor(),
    "taylor-full": FullTaylor(),
    "taylor2": SecondTaylor(),
    "lookahead": Lookahead(),
    "lookahead-forward": Forward(),
    "lookahead-backward": Backward(),
    "lfp": Next(),
    "lbp": Previous(),
    "catro": Catro(),
    "bn-scale": NormScale(),
    "random": Random(),
}


def pick_score(name: str, classes: str = "") -> Score:
    """Score of that name; `classes`, such as "0,3,5", are the only ones that it has to tell apart.

    Raises JpqError for an unknown name, for classes that are no list of numbers, and where the score knows no classes.
    """
    if name not in SCORES:
        raise unknown("score", name, SCORES)
    score = SCORES[name]
    if not classes:
        return score
    takes = [taker for taker, s in SCORES.items() if "labels" in s.needs]
    if name not in takes:
        raise JpqError(
            f"--classes {classes}: score {name} does not look at classes. Choose --score {' or '.join(takes)}."
        )
    parts = [part.strip() for part in classes.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < 2:
        raise JpqError(f"--classes '{classes}' must name two classes at least, by their numbers: --classes 0,3,5.")
    return replace(score, classes=tuple(sorted(set(map(int, parts)))))  # type: ignore[type-var]
