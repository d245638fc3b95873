"""Many runs by Optuna (`jpq study`): settings, search space, trials, status."""

from typing import TYPE_CHECKING

from jpq.lazy import lazy_names

if TYPE_CHECKING:
    from jpq.trials.accuracy_target import AccuracyResult, Attempt, NullAccuracyTargetObserver
    from jpq.trials.attributes import is_counted
    from jpq.trials.preview import Preview, prepare_float_weights
    from jpq.trials.samplers import build_sampler
    from jpq.trials.settings import Study, read_study, write_study
    from jpq.trials.space import Space
    from jpq.trials.status import StudyStatus
    from jpq.trials.storage import open_storage
    from jpq.trials.trial import NullStudyObserver, StudyObserver

__all__ = [
    "AccuracyResult",
    "Attempt",
    "NullAccuracyTargetObserver",
    "NullStudyObserver",
    "Preview",
    "Space",
    "Study",
    "StudyObserver",
    "StudyStatus",
    "build_sampler",
    "is_counted",
    "open_storage",
    "prepare_float_weights",
    "read_study",
    "write_study",
]

_HOMES = {
    "AccuracyResult": "accuracy_target",
    "Attempt": "accuracy_target",
    "NullAccuracyTargetObserver": "accuracy_target",
    "NullStudyObserver": "trial",
    "Preview": "preview",
    "Space": "space",
    "Study": "settings",
    "StudyObserver": "trial",
    "StudyStatus": "status",
    "build_sampler": "samplers",
    "is_counted": "attributes",
    "open_storage": "storage",
    "prepare_float_weights": "preview",
    "read_study": "settings",
    "write_study": "settings",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
