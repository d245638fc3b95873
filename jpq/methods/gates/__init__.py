"""GATES: how the decision to keep or drop a unit is relaxed for training, one member a file."""

from __future__ import annotations

from jpq.methods.gates.admm import Admm
from jpq.methods.gates.annealed import Annealed
from jpq.methods.gates.base import Gate
from jpq.methods.gates.dead_zone import DeadZone
from jpq.methods.gates.feedback import Feedback
from jpq.methods.gates.fixed_count import FixedCount
from jpq.methods.gates.frozen import FixedMask, Frozen
from jpq.methods.gates.gumbel_topk import GumbelTopK
from jpq.methods.gates.hard_concrete import HardConcrete
from jpq.methods.gates.lasso import Lasso
from jpq.methods.gates.latent import Latent
from jpq.methods.gates.learned_topk import LearnedTopK
from jpq.methods.gates.polarized import Polarized
from jpq.methods.gates.ranked import Ranked
from jpq.methods.gates.reweighted import Reweighted
from jpq.methods.gates.soft_threshold import SoftThreshold
from jpq.methods.gates.stochastic import Stochastic
from jpq.methods.gates.vib import VIB

__all__ = [
    "GATES",
    "VIB",
    "Admm",
    "Annealed",
    "DeadZone",
    "Feedback",
    "FixedCount",
    "FixedMask",
    "Frozen",
    "Gate",
    "GumbelTopK",
    "HardConcrete",
    "Lasso",
    "Latent",
    "LearnedTopK",
    "Polarized",
    "Ranked",
    "Reweighted",
    "SoftThreshold",
    "Stochastic",
]

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
    "zero_bin": DeadZone,
    "stochastic": Stochastic,
    "hyper": Latent,
    "lasso": Lasso,
    "reweighted": Reweighted,
    "ranked": Ranked,
}
