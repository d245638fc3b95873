"""Paths as people give them: `~` for the home folder, `runs/latest` for the last run, and Windows' drive letters."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from jpq.types import JpqError

T = TypeVar("T")

LATEST = "latest"  # name, in a folder of runs, that stands for the run begun last
SETTINGS_FILE = "config.toml"  # every run's folder has one
LONGEST_NAME = 255  # characters of a folder's name

WRITTEN = frozenset({"out", "table", "data_root"})  # names of settings that are not taken for runs

DRIVE = re.compile(r"[A-Za-z]:[\\/]")  # the beginning of a path on Windows
UNUSABLE = re.compile(r'[\x00-\x1f<>:"/\\|?*]')  # characters that some file system refuses in a name
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names that Windows reserves


def expand_home(path: str | Path) -> Path:
    """The path with a leading `~` or `~user` replaced by that home folder. Raises JpqError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise JpqError(f"{path} begins with a home folder that is not known here. Write the path out.") from error


def expand_paths(settings: T) -> T:
    """A copy of a dataclass in which every path, also those of dataclasses within, has `~` and `latest` replaced.

    In paths that are written to (`WRITTEN`) only `~` is.
    """
    plain: Any = settings
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(plain):
        value = getattr(plain, field.name)
        expand = expand_home if field.name in WRITTEN else find_run
        if isinstance(value, Path):
            changes[field.name] = expand(value)
        elif isinstance(value, tuple) and value and all(isinstance(entry, Path) for entry in value):
            changes[field.name] = tuple(expand(entry) for entry in value)
        elif dataclasses.is_dataclass(value):
            changes[field.name] = expand_paths(value)
    changes = {name: value for name, value in changes.items() if value != getattr(plain, name)}
    expanded: T = dataclasses.replace(plain, **changes) if changes else settings
    return expanded


def is_windows_path(text: str) -> bool:
    """Whether a text begins like an absolute path on Windows, such as `C:\\data`."""
    return DRIVE.match(text) is not None


def check_name(name: str) -> None:
    """Raise JpqError for the name of a run that cannot be a folder's name on every system, or that means another."""
    bad = UNUSABLE.search(name) or DEVICES.fullmatch(name) or len(name) > LONGEST_NAME
    if bad or name != name.strip() or name.startswith((".", "~")) or name.endswith(".") or name == LATEST:
        raise JpqError(
            f"--name '{name}' cannot be the name of a folder for a run. Give letters, digits, '-', '_' and '.', and "
            f"not '{LATEST}'."
        )


def mark_latest(folder: Path) -> None:
    """Let `latest` beside a run's folder stand for it: a symbolic link, or a text file where none can be made.

    A file or folder of that name that jpq did not make stays, and nothing is marked.
    """
    mark = folder.parent / LATEST
    if mark.is_symlink():
        pass
    elif mark.exists() and _pointed_name(mark) is None:
        return
    part = mark.with_name(f".{LATEST}.part")
    with suppress(OSError):  # a convenience: a run does not end for it
        part.unlink(missing_ok=True)
        try:
            os.symlink(folder.name, part, target_is_directory=True)
        except (OSError, NotImplementedError):
            part.write_text(folder.name + "\n", encoding="utf-8")
        os.replace(part, mark)


def find_run(path: str | Path) -> Path:
    """The path with `~` expanded and a part named `latest` replaced by the run that it stands for.

    Where a folder of runs has no such entry, `latest` is its run whose settings were written last.
    """
    path = expand_home(path)
    for place in (path, *path.parents):
        if place.name == LATEST and (place.is_symlink() or not place.is_dir()):
            run = _latest_of(place)
            return path if run is None else run / path.relative_to(place)
    return path


def _latest_of(mark: Path) -> Path | None:
    """The folder that `latest` in its parent folder stands for; None where there is none."""
    name = os.readlink(mark) if mark.is_symlink() else _pointed_name(mark)
    if name is not None and (mark.parent / name).is_dir():
        return mark.parent / name
    begun = list(_begun(mark.parent)) if not mark.exists() else []
    return max(begun)[1] if begun else None


def _begun(folder: Path) -> Iterator[tuple[float, Path]]:
    """(time of its settings, folder) of every run in a folder."""
    with suppress(OSError):
        for run in folder.iterdir():
            with suppress(OSError):
                yield (run / SETTINGS_FILE).stat().st_mtime, run


def _pointed_name(mark: Path) -> str | None:
    """The folder's name in a text file that stands for a symbolic link; None for any other file."""
    try:
        if not mark.is_file() or mark.stat().st_size > 4 * LONGEST_NAME:
            return None
        name = mark.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if name and name not in (".", "..", LATEST) and not UNUSABLE.search(name) else None
