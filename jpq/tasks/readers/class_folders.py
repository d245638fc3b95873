"""Images in class folders: PATH/train/CLASS/*.png with PATH/val and PATH/test, or PATH/CLASS/*.png, which is split."""

from __future__ import annotations

from pathlib import Path

import torch

from jpq.files.paths import expand_home
from jpq.tasks.datasets import ReadOptions, Source
from jpq.tasks.folder_parts import PARTS, image_files, is_image, list_folders
from jpq.tasks.lazy_images import open_images
from jpq.types import JpqError


def read(path: str, options: ReadOptions) -> Source:
    """The images of a folder; class numbers are the places of the class folders' names in sorted order.

    PATH/val is held out, or is the test part where there is none. Hidden files and folders, and those that systems put
    beside images (._NAME, Thumbs.db, __MACOSX), are left out.

    Args:
        path: holds parts, or class folders without parts, which are split later.
        options: size, colour and cache of the images, and whether those that cannot be read are left out.
    """
    place = expand_home(Path(path))
    parts = _find_parts(place)
    classes = [folder.name for folder in list_folders(parts["train"])]
    files = {part: _labelled_files(folder, classes, parts["train"]) for part, folder in parts.items()}
    listed = [(part, *entry) for part, entries in files.items() for entry in entries]
    images = open_images(
        [file for _, file, _ in listed], options.image_size, options.skip_bad, options.cache, options.colour
    )
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
        loose = sum(1 for file in part.iterdir() if is_image(file))
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
