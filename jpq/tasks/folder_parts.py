"""Folders of data: names of the parts, and the folders and images in them without those that systems put there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jpq.tasks.images import SUFFIXES

PARTS = {  # part -> names of its folder, in any case
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}

SYSTEM = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"})  # lower case


def list_folders(path: Path) -> list[Path]:
    """The folders in a folder, sorted by name, without those of the system."""
    folders = (entry for entry in path.iterdir() if entry.is_dir() and not _is_ignored(entry))
    return sorted(folders, key=lambda entry: entry.name)  # paths of Windows are in order whatever the case


def image_files(folder: Path) -> Iterator[Path]:
    """Every image in and below a class folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not _is_ignored(entry):
            yield from image_files(entry)
        elif is_image(entry):
            yield entry


def is_image(file: Path) -> bool:
    """Whether a file's name ends as an image's does, and no system has put it there."""
    return file.suffix.lower() in SUFFIXES and file.is_file() and not _is_ignored(file)


def _is_ignored(entry: Path) -> bool:
    """Whether an entry is hidden (also AppleDouble, ._NAME), or one that a system makes by itself."""
    return entry.name.startswith(".") or entry.name.casefold() in SYSTEM
