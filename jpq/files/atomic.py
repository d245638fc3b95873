"""Atomic replacement of files: after a kill or a power cut, a file is either the old one or the new one, whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from jpq.files.paths import expand_home
from jpq.types import JpqError


def replace_file(path: str | Path, write_to: Callable[[Path], object]) -> None:
    """Replace the file at `path` in one step by a file that `write_to` writes beside it.

    The new file is on the disk before it gets its name, and the name is on the disk before this returns. Where writing
    fails, the old file stays and nothing is left beside it. Raises JpqError where the system refuses to write.
    """
    path = expand_home(path)
    part = path.with_name(f".{path.name}.part")
    try:
        write_to(part)
        _flush(part)
        os.replace(part, path)
        with suppress(OSError):  # the file is in its place; some systems sync no folders
            _flush(path.parent)
    except Exception as error:
        cause = _system_error(error)
        if cause is None:
            raise
        raise JpqError(f"Cannot write {path}: {cause.strerror or cause}. {_advice(path)}") from error
    finally:
        with suppress(OSError):  # its folder may be gone
            part.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's error, also behind the error of a library (torch.save says "unexpected pos")."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _advice(path: Path) -> str:
    if not path.parent.is_dir():
        return "Its folder is gone: what this run had saved went with it."
    return "What stood there before is untouched. Make room, or make the folder writable, and go on from there."
