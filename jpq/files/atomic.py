"""Files that a reader never sees half of, and that survive a kill or a power cut whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from jpq.types import JpqError


def replace_file(path: Path, write_to: Callable[[Path], object]) -> None:
    """Let `write_to` write a file beside `path`, then put it in its place in one step.

    The new file is on the disk before it gets its name, and the name before this returns. Where writing fails, what
    stood at `path` still stands there and nothing is left beside it. Raises JpqError where the system does not let it.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        write_to(part)
        _to_disk(part)
        os.replace(part, path)
        with suppress(OSError):  # the file is in its place; some systems sync no folders
            _to_disk(path.parent)
    except Exception as error:
        refused = _refused(error)
        if refused is None:
            raise
        raise JpqError(f"Cannot write {path}: {refused.strerror or refused}. {_way_out(path)}") from error
    finally:
        with suppress(OSError):  # its folder may be gone
            part.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, no longer depend on this machine's power."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refused(error: BaseException | None) -> OSError | None:
    """What the system said, also where a library's own error hides it (torch.save says "unexpected pos")."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _way_out(path: Path) -> str:
    if not path.parent.is_dir():
        return "Its folder is gone: what this run had saved went with it."
    return "What stood there before is untouched. Make room, or make the folder writable, and go on from there."
