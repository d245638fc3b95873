"""Images with a second file each (a mask, a clean image): where the two lie, and which belong together.

| arrangement | example |
|---|---|
| a folder beside each part | PATH/train/*.png with PATH/train_labels/*.png, PATH/val with PATH/val_labels ... |
| two folders with parts | PATH/images/train/*.png with PATH/masks/train/*.png ... |
| parts with two folders | PATH/train/images/*.png with PATH/train/masks/*.png ... |
| two folders | PATH/images/*.png with PATH/masks/*.png, split here |

Files belong together by their names without ending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jpq.files.paths import expand_home
from jpq.tasks.folder_parts import PARTS, image_files, list_folders
from jpq.types import JpqError

LISTED = 5  # names that a sentence shows


@dataclass(frozen=True)
class Names:
    """Names of folders, in lower case."""

    first: Sequence[str]  # of images
    second: Sequence[str]  # of what belongs to them; also endings of a part's name, as in train_labels
    what: str  # the second files in words, as "masks"


MASKS = Names(("images", "image", "img", "jpegimages"), ("masks", "mask", "labels", "annotations", "annot"), "masks")
TARGETS = Names(
    ("input", "inputs", "noisy", "degraded", "lr"), ("target", "targets", "clean", "gt", "hr"), "target images"
)

FilePairs = list[tuple[Path, Path]]


def find_pairs(path: str, names: Names) -> dict[str, FilePairs]:
    """Files that belong together, by part (train, val, test); {} where the folder is not arranged in pairs.

    Raises JpqError for a path that is no folder, and for files without a partner.
    """
    folder = expand_home(Path(path))
    if not folder.is_dir():
        raise JpqError(f"The folder '{folder}' is not there, or is a file.")
    found = _beside_parts(folder, names) or two_folders(path, names)
    return {part: _match(*pair, names) for part, pair in found.items()}


def is_arranged(path: str, names: Names) -> bool:
    """Whether a folder is arranged in pairs."""
    folder = expand_home(Path(path))
    return folder.is_dir() and bool(_beside_parts(folder, names) or two_folders(path, names))


def two_folders(path: str, names: Names) -> dict[str, tuple[Path, Path]]:
    """(folder of images, folder of what belongs to them) by part, where only the two folders' names say what they are.

    {} where a folder beside each part says it, or where there are no such folders.
    """
    folder = expand_home(Path(path))
    return {} if _beside_parts(folder, names) else _two_folders(folder, names) or _inside_parts(folder, names)


def paired_names(first: Path, second: Path) -> tuple[list[tuple[Path, Path]], int]:
    """(pairs of files of the same name in two folders, number of files in the first)."""
    left, right = ({_key(file, side): file for file in sorted(image_files(side))} for side in (first, second))
    return [(file, right[key]) for key, file in left.items() if key in right], len(left)


def _part_of(name: str) -> str:
    """The part that a folder's name means; "" for none."""
    return next((part for part, names in PARTS.items() if name.casefold() in names), "")


def _beside_parts(folder: Path, names: Names) -> dict[str, tuple[Path, Path]]:
    """train with train_labels, and so on."""
    folders = {entry.name.casefold(): entry for entry in list_folders(folder)}
    found = {}
    for name, entry in folders.items():
        partners = [folders[f"{name}_{end}"] for end in names.second if f"{name}_{end}" in folders]
        partners += [folders[f"{name}{end}"] for end in names.second if f"{name}{end}" in folders]
        if _part_of(name) and partners:
            found[_part_of(name)] = (entry, partners[0])
    return found


def _two_folders(folder: Path, names: Names) -> dict[str, tuple[Path, Path]]:
    """images with masks: with parts in each, or without."""
    folders = {entry.name.casefold(): entry for entry in list_folders(folder)}
    first = next((folders[name] for name in names.first if name in folders), None)
    second = next((folders[name] for name in names.second if name in folders), None)
    if first is None or second is None:
        return {}
    parts, others = ({_part_of(e.name): e for e in list_folders(side)} for side in (first, second))
    parts.pop("", None)
    if not parts:
        return {"train": (first, second)}
    missing = [part for part in parts if part not in others]
    if missing:
        raise JpqError(f"'{second}' has no folder for the part '{parts[missing[0]].name}' of '{first}'. Add it.")
    return {part: (entry, others[part]) for part, entry in parts.items()}


def _inside_parts(folder: Path, names: Names) -> dict[str, tuple[Path, Path]]:
    """train/images with train/masks, and so on, where a part holds nothing else."""
    parts = {_part_of(entry.name): entry for entry in list_folders(folder)}
    parts.pop("", None)
    found = {part: _two_folders(entry, names) for part, entry in parts.items() if len(list_folders(entry)) == 2}
    pairs = {part: both["train"] for part, both in found.items() if set(both) == {"train"}}
    return pairs if "train" in pairs else {}


def _match(first: Path, second: Path, names: Names) -> FilePairs:
    """The files of two folders that have the same name without ending. Raises JpqError for those without a partner."""
    left, right = ({_key(file, side): file for file in sorted(image_files(side))} for side in (first, second))
    if not left:
        raise JpqError(f"The folder '{first}' holds no images (.png, .jpg, .tif, .webp ...). Fill or remove it.")
    lost = [str(left[key]) for key in left if key not in right]
    if lost:
        more = f" and {len(lost) - LISTED} more" if len(lost) > LISTED else ""
        raise JpqError(
            f"{len(lost)} of {len(left)} images have no file of the same name in '{second}': "
            f"{', '.join(lost[:LISTED])}{more}. Add their {names.what}, or remove them."
        )
    return [(file, right[key]) for key, file in left.items()]


def _key(file: Path, folder: Path) -> str:
    """The place of a file in its folder, without ending."""
    return file.relative_to(folder).with_suffix("").as_posix()
