"""A study's settings: as a file to start from, and as what all its workers must agree on."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import optuna
import tomli_w

from jpq.config import Config, to_tree
from jpq.files import replace_file
from jpq.settings import filled, from_tree, tables
from jpq.trials.settings import Study
from jpq.trials.storage import without_password
from jpq.types import JpqError

NAME = "study.toml"
SETTINGS, WEIGHTS, CHANCE = "settings", "float weights", "accuracy of guessing"  # user attributes of the study
OWN = ("name", "trials", "storage", "dead_after", "pictures")  # settings that each worker may choose


def write(config: Config, study: Study, path: Path) -> None:
    """Save the settings as TOML: those of the task, and a table [study]."""
    table = asdict(replace(study, storage=without_password(study.storage)))
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in table.items() if v is not None}
    replace_file(path, lambda part: part.write_text(tomli_w.dumps({**to_tree(config), "study": plain})))


def read(path: Path) -> tuple[Config, Study]:
    """The settings in a study's file, or in a run's config.toml."""
    tree = tables(path)
    table = tree.pop("study", {})
    if not isinstance(table, dict):
        raise JpqError(f"{path}: 'study' must be a table of settings, such as [study].")
    return from_tree(tree, str(path)), filled(Study(), "study", table, str(path))


def agree(config: Config, study: Study, weights: str, classes: int, shared: optuna.Study) -> None:
    """Note the settings in the storage, or raise JpqError where other workers have other ones there."""
    tree: dict[str, Any] = {s: dict(t) for s, t in to_tree(config).items()}
    tree["run"] = {"seed": config.run.seed}
    for name in ("weights", "data_root"):  # where they lie on this machine
        tree["task"].pop(name, None)
    tree["study"] = {f.name: getattr(study, f.name) for f in fields(study) if f.name not in OWN}
    ours: dict[str, dict[str, Any]] = json.loads(json.dumps(tree))
    if SETTINGS not in shared.user_attrs:
        shared.set_user_attr(SETTINGS, ours)
        shared.set_user_attr(WEIGHTS, weights)
        shared.set_user_attr(CHANCE, 1 / classes)
        return
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
