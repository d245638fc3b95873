"""A study's settings: as a file to start from, and as what all its workers must agree on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import optuna
import tomli_w
from optuna.study import StudyDirection

from jpq.config import Config, to_tree
from jpq.files import replace_file
from jpq.settings import filled, from_tree, tables
from jpq.trials.settings import Study
from jpq.trials.storage import stored
from jpq.types import JpqError

NAME = "study.toml"
SETTINGS, WEIGHTS, CHANCE = "settings", "float weights", "accuracy of guessing"  # user attributes of the study
OWN = ("name", "trials", "storage", "dead_after", "pictures")  # settings that each worker may choose


def write(config: Config, study: Study, path: Path) -> None:
    """Save the settings as TOML: those of the task, and a table [study]; they hold from any folder, and no password."""
    task, weights = config.task, config.task.weights
    task = replace(task, weights=weights and weights.resolve(), data_root=task.data_root.resolve())
    table = config.budget.latency_table
    config = replace(config, task=task, budget=replace(config.budget, latency_table=table and table.resolve()))
    own = asdict(replace(study, storage=stored(study.storage)))
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in own.items() if v is not None}
    replace_file(path, lambda part: part.write_text(tomli_w.dumps({**to_tree(config), "study": plain})))


def read(path: Path) -> tuple[Config, Study]:
    """The settings in a study's file, or in a run's config.toml.

    A file that lies in its study's own folder says with it where that study is.
    """
    tree = tables(path)
    table = tree.pop("study", {})
    if not isinstance(table, dict):
        raise JpqError(f"{path}: 'study' must be a table of settings, such as [study].")
    config, study = from_tree(tree, str(path)), filled(Study(), "study", table, str(path))
    folder = path.resolve().parent
    own = path.name == NAME and folder.name == study.name
    return replace(config, run=replace(config.run, out=folder.parent if own else config.run.out, resume=False)), study


def begun(shared: optuna.Study) -> bool:
    """Whether a worker has noted all that the others need."""
    noted = shared.user_attrs.get(SETTINGS)
    return isinstance(noted, dict) and "study" in noted and WEIGHTS in shared.user_attrs


def require_own(shared: optuna.Study, directions: Sequence[StudyDirection]) -> None:
    """Raises JpqError for a study of somebody else's; one whose first worker has only begun is ours."""
    other = shared.directions != list(directions)
    if not begun(shared) and (other or (WEIGHTS not in shared.user_attrs and shared.get_trials(deepcopy=False))):
        raise JpqError(f"The storage holds a study '{shared.study_name}' that is not of jpq study. Choose another "
                       "--name.")  # fmt: skip


def note(config: Config, study: Study, shared: optuna.Study) -> None:
    """Note the settings in the storage. They come last: a study that has them has all else (`begun`)."""
    shared.set_user_attr(SETTINGS, _shared(config, study))


def _shared(config: Config, study: Study) -> dict[str, dict[str, Any]]:
    """The settings that all workers must agree on."""
    tree: dict[str, Any] = {s: dict(t) for s, t in to_tree(config).items()}
    tree["run"] = {"seed": config.run.seed}
    for name in ("weights", "data_root"):  # where they lie on this machine
        tree["task"].pop(name, None)
    if config.budget.latency_table is not None:  # what it says, not where it lies
        tree["budget"]["latency_table"] = hashlib.sha256(config.budget.latency_table.read_bytes()).hexdigest()[:12]
    tree["study"] = {f.name: getattr(study, f.name) for f in fields(study) if f.name not in OWN}
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(tree))
    return plain


def agree(config: Config, study: Study, weights: str, shared: optuna.Study) -> None:
    """Raises JpqError where other workers have noted other settings or float weights in the storage."""
    ours = _shared(config, study)
    theirs = shared.user_attrs[SETTINGS]
    for section in ours:
        for key in sorted({*ours[section], *theirs.get(section, {})}):
            mine, other = ours[section].get(key), theirs.get(section, {}).get(key)
            if mine != other:
                raise JpqError(
                    f"Study '{study.name}' was begun with --{key.replace('_', '-')} {_said(other)}, and here it is "
                    f"{_said(mine)}. Go on with the study's own settings (--config with its {NAME}), or choose another "
                    "--name."
                )
    if shared.user_attrs[WEIGHTS] != weights:
        raise JpqError(
            f"Study '{study.name}' was begun with other float weights. Copy its float.safetensors into this folder, or "
            "name the same file with --weights."
        )


def _said(value: Any) -> str:
    return "left out" if value in (None, "") else " ".join(map(str, value)) if isinstance(value, list) else str(value)
