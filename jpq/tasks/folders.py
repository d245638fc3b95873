"""Folders of images: PATH/train/CLASS/*.png with PATH/val and PATH/test, or PATH/CLASS/*.png, which is split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from jpq.files.paths import expand_home
from jpq.tasks.datasets import ReadOptions, Source
from jpq.tasks.images import SUFFIXES
from jpq.tasks.lazy_images import open_images
from jpq.types import JpqError

PARTS = {  # part -> names of its folder, in any case
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}

SYSTEM = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"})  # lower case


def read(path: str, options: ReadOptions) -> Source:
    """The images of a folder, by what it holds: with masks, to be restored, or in class folders (`read_folder`).

    Folders called `images` and `masks` are judged by their files, unless --task says what they are.
    """
    from jpq.tasks.readers import pairs, restoration, segmentation  # they read folders by this module

    if options.task == "restoration" or options.noise or options.scale > 1:
        return restoration.read(path, options)
    has_masks, sentence = options.task == "segmentation", ""
    if not options.task and pairs.is_arranged(path, pairs.MASKS):
        has_masks, sentence = segmentation.judge_contents(path)
    elif not options.task:
        sentence = restoration.classes_note(path)
    if has_masks:
        source = segmentation.read(path, options)
    else:
        source = read_folder(Path(path), options.image_size, options.skip_bad, options.cache, options.colour)
    return replace(source, notes=(*source.notes, sentence)) if sentence else source


def read_folder(
    path: Path, size: Sequence[int] = (), skip_bad: bool = False, cache: str = "memory", colour: bool = False
) -> Source:
    """The images of a folder; class numbers are the places of the class folders' names in sorted order.

    PATH/val is held out, or is the test part where there is none. Hidden files and folders, and those that systems put
    beside images (._NAME, Thumbs.db, __MACOSX), are left out.

    Args:
        path: holds parts, or class folders without parts, which are split later.
        size: (height, width) or one number for squares that images are scaled and cropped to; () leaves them.
        skip_bad: leave out images that cannot be read.
        cache, colour: see `jpq.tasks.lazy_images.open_images`.
    """
    path = expand_home(path)
    parts = _find_parts(path)
    classes = [folder.name for folder in list_folders(parts["train"])]
    files = {part: _labelled_files(folder, classes, parts["train"]) for part, folder in parts.items()}
    listed = [(part, *entry) for part, entries in files.items() for entry in entries]
    images = open_images([file for _, file, _ in listed], size, skip_bad, cache, colour)
    pairs = {}
    for part in parts:
        own = [place for place, number in enumerate(images.read) if listed[number][0] == part]
        labels = [listed[images.read[place]][2] for place in own]
        _check_complete(labels, files[part], classes, parts[part])
        pairs[part] = images.pixels[torch.tensor(own)], torch.tensor(labels)
    val, test = pairs.get("val"), pairs.get("test")
    held_out, test = (val, test) if test else (None, val)
    notes = (images.note,) if images.note else ()
    return Source(pairs["train"], held_out, test, len(classes), tuple(classes), notes)


def _find_parts(path: Path) -> dict[str, Path]:
    """The folder of each part; for class folders without parts the folder itself is all there is to train on."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "is not there"
        raise JpqError(f"The folder '{path}' {what}; images are read from PATH/train/CLASS/*.png or PATH/CLASS/*.png.")
    parts: dict[str, Path] = {}
    for folder in list_folders(path):
        part = next((part for part, names in PARTS.items() if folder.name.casefold() in names), None)
        if part in parts:
            raise JpqError(f"'{parts[part].name}' and '{folder.name}' in '{path}' are both a {part} part. Remove one.")
        if part:
            parts[part] = folder
    if parts and "train" not in parts:
        present = ", ".join(f"'{folder.name}'" for folder in parts.values())
        raise JpqError(
            f"There is no folder '{path / 'train'}' beside {present}; images are read from PATH/train/CLASS/*.png, or "
            "from PATH/CLASS/*.png to be split here."
        )
    return {part: parts[part] for part in PARTS if part in parts} or {"train": path}


def _labelled_files(part: Path, classes: list[str], train: Path) -> list[tuple[Path, int]]:
    """(image file, class number) of every image in a part's class folders."""
    labelled = []
    for entry in list_folders(part):
        if entry.name not in classes:
            raise JpqError(f"Class '{entry.name}' of '{part}' has no folder under '{train}'. Add it there.")
        images = sorted(image_files(entry))
        if not images:
            raise JpqError(
                f"The class folder '{entry}' holds no image (.png, .jpg, .tif, .webp ...). Fill or remove it."
            )
        labelled += [(image, classes.index(entry.name)) for image in images]
    if not labelled:
        loose = sum(1 for file in part.iterdir() if _is_image(file))
        beside = f"; {loose} images lie in it without one" if loose else ""
        raise JpqError(
            f"The folder '{part}' holds no class folders with images{beside}; they are read from CLASS/*.png."
        )
    return labelled


def _check_complete(labels: list[int], files: list[tuple[Path, int]], classes: list[str], part: Path) -> None:
    """Raise JpqError where a class has lost all of its images to `skip_bad`."""
    for lost in sorted({label for _, label in files} - set(labels)):
        raise JpqError(
            f"No image in '{part / classes[lost]}' can be read. Repair them, or remove the class everywhere."
        )


def list_folders(path: Path) -> list[Path]:
    """The folders in a folder, sorted by name, without those of the system."""
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not _is_ignored(entry))


def image_files(folder: Path) -> Iterator[Path]:
    """Every image in and below a class folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not _is_ignored(entry):
            yield from image_files(entry)
        elif _is_image(entry):
            yield entry


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and file.is_file() and not _is_ignored(file)


def _is_ignored(entry: Path) -> bool:
    """Whether an entry is hidden (also AppleDouble, ._NAME), or one that a system makes by itself."""
    return entry.name.startswith(".") or entry.name.casefold() in SYSTEM
