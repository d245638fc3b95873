"""The training loop, its observers, and a run's checkpoints and phases."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.training.epochs import Phase, all_phases, split_epochs
    from jpq.training.history import EpochRecord, NullObserver, TensorBoardObserver, TrainingObserver
    from jpq.training.loop import Objective, build_optimizer, fit

__all__ = [
    "EpochRecord",
    "NullObserver",
    "Objective",
    "Phase",
    "TensorBoardObserver",
    "TrainingObserver",
    "all_phases",
    "build_optimizer",
    "fit",
    "split_epochs",
]

_HOMES = {
    "EpochRecord": "history",
    "NullObserver": "history",
    "Objective": "loop",
    "Phase": "epochs",
    "TensorBoardObserver": "history",
    "TrainingObserver": "history",
    "all_phases": "epochs",
    "build_optimizer": "loop",
    "fit": "loop",
    "split_epochs": "epochs",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
