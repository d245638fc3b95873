"""How keep or drop is relaxed."""

from jpq.gates.admm import Admm
from jpq.gates.annealed import Annealed
from jpq.gates.base import Gate
from jpq.gates.counted import Counted
from jpq.gates.decided import Decided
from jpq.gates.feedback import Feedback
from jpq.gates.given import Given
from jpq.gates.gumbel_topk import GumbelTopK
from jpq.gates.hard_concrete import HardConcrete
from jpq.gates.hyper import Hyper
from jpq.gates.lasso import Lasso
from jpq.gates.learned_topk import LearnedTopK
from jpq.gates.polarized import Polarized
from jpq.gates.ranked import Ranked
from jpq.gates.reweighted import Reweighted
from jpq.gates.soft_threshold import SoftThreshold
from jpq.gates.stochastic import Stochastic
from jpq.gates.vib import VIB
from jpq.gates.zero_bin import ZeroBin

GATES: dict[str, type[Gate]] = {
    "vib": VIB,
    "hard_concrete": HardConcrete,
    "polarized": Polarized,
    "annealed": Annealed,
    "gumbel_topk": GumbelTopK,
    "soft_threshold": SoftThreshold,
    "learned_topk": LearnedTopK,
    "feedback": Feedback,
    "admm": Admm,
    "zero_bin": ZeroBin,
    "stochastic": Stochastic,
    "hyper": Hyper,
    "lasso": Lasso,
    "reweighted": Reweighted,
    "ranked": Ranked,
}

__all__ = [
    "GATES",
    "VIB",
    "Admm",
    "Annealed",
    "Counted",
    "Decided",
    "Feedback",
    "Gate",
    "Given",
    "GumbelTopK",
    "HardConcrete",
    "Hyper",
    "Lasso",
    "LearnedTopK",
    "Polarized",
    "Ranked",
    "Reweighted",
    "SoftThreshold",
    "Stochastic",
    "ZeroBin",
]
