"""How keep or drop is relaxed."""

from jpq.gates.base import Gate
from jpq.gates.decided import Decided
from jpq.gates.hard_concrete import HardConcrete
from jpq.gates.ranked import Ranked
from jpq.gates.vib import VIB

GATES: dict[str, type[Gate]] = {"vib": VIB, "hard_concrete": HardConcrete}

__all__ = ["GATES", "VIB", "Decided", "Gate", "HardConcrete", "Ranked"]
