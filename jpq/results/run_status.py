"""What a run's folder holds: begun, unfinished, finished or broken; what a new run there may do; and its removal.

No model or data is read, so that many folders can be looked at quickly.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jpq.config import Config, read_toml
from jpq.files import untrusted
from jpq.files.formats import FORMATS
from jpq.files.model_files import KEPT, KEPT_FILES, model_files
from jpq.files.paths import SETTINGS_FILE
from jpq.types import JpqError

EMPTY = "empty"  # no run
BEGUN = "begun"  # settings alone: it ended before its first checkpoint
UNFINISHED = "unfinished"  # has a checkpoint to go on from
FINISHED = "finished"
TRIAL = "trial"  # finished as a trial of a study: not exported, and its test split unread
BROKEN = "broken"  # settings or result that cannot be read

CHECKPOINT, RESULT, FRONT_TABLE = "checkpoint.pt", "result.json", "front.csv"
LADDER = "ladder.csv"  # table of the runs of an accuracy target

LARGEST_RESULT = 2**26  # bytes of result.json

FILES = (  # that runs write into their folders
    *(SETTINGS_FILE, CHECKPOINT, RESULT, FRONT_TABLE, "front.png", "float.safetensors", "history.csv", "layers.csv"),
    *("sizes.csv", "plan.json", "model.safetensors", "model.packed", "curves.png", "layers.png", "latency.csv"),
    *("schemes.json", "sensitivity.csv", "sensitivity.csv.part", "reconstruction.csv", "README.md"),
    *(LADDER, "pareto.csv", "pareto.png"),
)

EVENTS = "events.out.tfevents.*"  # of --tensorboard


@dataclass(frozen=True)
class RunStatus:
    """State of a run's folder, with the settings and the result in it, where these can be read."""

    folder: Path
    state: str
    config: Config | None = None
    result: dict[str, Any] | None = None  # content of result.json
    problem: str = ""  # why it is broken


def read_status(folder: Path) -> RunStatus:
    """The state of a folder; nothing is raised for damaged files."""
    if not (folder / SETTINGS_FILE).exists():
        return RunStatus(folder, EMPTY)
    try:
        config = read_toml(folder / SETTINGS_FILE)
    except JpqError as error:
        return RunStatus(folder, BROKEN, problem=str(error))
    if (folder / CHECKPOINT).exists():
        return RunStatus(folder, UNFINISHED, config)
    if not (folder / RESULT).exists():
        return RunStatus(folder, FINISHED if (folder / FRONT_TABLE).exists() else BEGUN, config)
    try:
        text = untrusted.read_text(folder / RESULT, "result", LARGEST_RESULT)
        result = untrusted.as_dict(untrusted.parse_json(text, RESULT))
        state = FINISHED if untrusted.as_bool(result.get("final", True)) else TRIAL
    except (JpqError, ValueError) as error:
        return RunStatus(folder, BROKEN, config, problem=f"{folder / RESULT} does not hold a result ({error}).")
    return RunStatus(folder, state, config, result)


def check_other_settings(config: Config) -> None:
    """Raise JpqError where the named folder of a run holds one of other settings, which is not to be overwritten."""
    status = read_status(config.folder())
    if not config.run.name or config.run.overwrite or status.state == EMPTY:
        return
    if status.config is None or status.config.hash() != config.hash():
        raise JpqError(
            f"{status.folder} holds a run of other settings. Give this one another --name, or --overwrite to remove "
            "that one first."
        )


def check_rerun(config: Config) -> RunStatus:
    """The state of the folder that a run of `jpq optimize` would write to.

    Raises JpqError, with both ways on, where a run that is there already would be overwritten unasked.
    """
    check_other_settings(config)
    status = read_status(config.folder())
    if config.run.overwrite or config.run.resume or status.state in (EMPTY, BEGUN):
        return status
    if status.state == UNFINISHED:
        raise JpqError(
            f"{status.folder} holds an unfinished run of these settings: --resume goes on with it, --overwrite removes "
            "it and begins anew."
        )
    if status.state == BROKEN:
        raise JpqError(
            f"{status.folder} holds a run that cannot be read ({status.problem}): --overwrite removes it and runs "
            "anew, --name NAME runs in another folder."
        )
    raise JpqError(
        f"{status.folder} holds a finished run of these settings: --resume shows its result again, --overwrite removes "
        "it and runs anew, --name NAME keeps it and runs in another folder."
    )


def input_files(config: Config) -> list[Path]:
    """The files that a run reads, which may lie in the folder that it is to overwrite."""
    paths = (config.task.weights, config.decide.mask, config.decide.sensitivity, config.budget.latency_table)
    return [*(path for path in paths if path is not None), *model_files(config.task.model)]


def clear_folder(folder: Path, keep: Sequence[Path] = ()) -> None:
    """Remove the files that runs write from a folder, and from those of its budgets; all others, and `keep`, stay."""
    kept = {path.resolve() for path in keep}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.is_dir() and not entry.is_symlink() and (entry / SETTINGS_FILE).is_file():
            _remove_files(entry, kept)
            with suppress(OSError):  # other files are in it
                entry.rmdir()
    _remove_files(folder, kept)


def _remove_files(folder: Path, kept: Collection[Path]) -> None:
    names = (*FILES, *(form.file_name for form in FORMATS.values()), *(f"{KEPT}/{name}" for name in KEPT_FILES))
    for path in (*(folder / name for name in names), *folder.glob(EVENTS)):
        if path.resolve() in kept:
            continue
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise JpqError(f"Cannot remove {path}: {error.strerror or error}. Choose another folder.") from error
    with suppress(OSError):  # it is not there, or other files are in it
        (folder / KEPT).rmdir()
