"""Segmentation: images with masks of class numbers, `folder:PATH` (see pairs.py for where the two lie).

A mask is an image of one channel, or of a palette, whose values are class numbers. Pixels of the void class become 255,
which `jpq.tasks.segmentation` leaves out. PATH/classes.txt, a name on each line, names the classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from jpq.files.paths import expand_home
from jpq.tasks.batches import MaskAugment, Preprocessing
from jpq.tasks.datasets import ReadOptions, Source
from jpq.tasks.images import scale_and_crop
from jpq.tasks.lazy_images import ORIENTATION, ClassMasks, open_images, open_masks, read_header
from jpq.tasks.readers.delimited import read_utf8
from jpq.tasks.readers.pairs import MASKS, FilePairs, find_pairs, paired_names, two_folders
from jpq.types import JpqError

VOID = 255  # what the void class becomes

MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # Pillow's modes of one channel

LOOKED_AT, MANY = 8, 64  # masks that are looked at, and different values that no mask goes beyond

BLOCK = 256  # masks whose largest class is sought at once


def read(path: str, options: ReadOptions) -> Source:
    """The images and masks of a folder.

    Raises JpqError where masks and images differ in size, for colour masks, and for classes that training lacks.
    """
    parts = find_pairs(path, MASKS)
    if not parts.get("train"):
        raise JpqError(
            f"No masks in '{path}': they are read from PATH/train_labels/*.png beside PATH/train/*.png, or from "
            "PATH/masks/train beside PATH/images/train."
        )
    columns = {part: _read_part(pairs, options) for part, pairs in parts.items()}
    notes = tuple(note for *_, note in columns.values() if note)
    pairs = {part: (images, masks) for part, (images, masks, _) in columns.items()}
    _check_same_sizes(pairs)
    names = _class_names(expand_home(Path(path)))
    largest_classes = {part: _largest_class(masks) for part, (_, masks) in pairs.items()}
    present = largest_classes["train"] + 1
    classes = max(len(names), present)
    if present == 1:
        raise JpqError(
            f"The training masks in '{path}' hold class 0 alone, beside {options.void}, which marks pixels without one "
            "(--void). Where that is a class, number the classes 0, 1, 2 ... in the masks."
        )
    if 0 < len(names) < present:
        raise JpqError(
            f"classes.txt in '{path}' names {len(names)} classes, and the masks have {present}. Add the names."
        )
    for part, largest in largest_classes.items():
        if largest < 0:
            what = "training" if part == "train" else part
            raise JpqError(f"All pixels of the {what} masks in '{path}' are of the void class. Check --void.")
        if largest >= classes:
            raise JpqError(
                f"The {part} masks in '{path}' have class {largest}; training masks end at {classes - 1}. "
                f"If that is the class of pixels without one, say --void {largest}."
            )
    val, test = pairs.get("val"), pairs.get("test")
    channels, height, width = pairs["train"][0].shape[1:]
    return Source(
        pairs["train"],
        val if test else None,
        test or val,
        classes,
        names[:classes],
        notes,
        task="segmentation",
        preprocessing=_preprocessing(channels, height, width, options),
        about={"void": options.void},
    )


def judge_contents(path: str) -> tuple[bool, str]:
    """(whether the folders `images` and `masks` hold images with their masks, a sentence on that).

    They might be two classes: masks have the names of the images, and few different values each. The sentence is ""
    where a folder beside each part (train_labels) leaves no doubt.
    """
    folders = two_folders(path, MASKS)
    if not folders:
        return True, ""
    first, second = folders.get("train") or next(iter(folders.values()))
    pairs, images = paired_names(first, second)
    reason = ""
    if 2 * len(pairs) < images:
        reason = f"{images - len(pairs)} of {images} images in '{first}' have no file of the same name in '{second}'"
    else:
        looked_at = [mask for _, mask in pairs[:: max(1, len(pairs) // LOOKED_AT)]]
        varied = next((mask for mask in looked_at if _has_many_values(mask)), None)
        reason = f"'{varied}' has more than {MANY} different values, as masks do not" if varied else ""
    if reason:
        return False, (
            f"Read as images of the classes of '{path}', not as images with masks: {reason}. "
            "--task segmentation reads masks."
        )
    return True, (
        f"Read as images with masks: files in '{second}' have the names of those in '{first}' and few values each. "
        "--task classification reads the two folders as classes."
    )


def _has_many_values(file: Path) -> bool:
    """Whether an image has more than MANY different values, or colours; False where it cannot be read."""
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image)
    except Exception:  # Pillow raises nearly anything on a damaged file; it is reported when all are read
        return False
    rows = pixels.reshape(pixels.shape[0] * pixels.shape[1], -1).astype(np.int64)
    return len(np.unique(rows @ (2 ** (16 * np.arange(rows.shape[1]))))) > MANY


def _read_part(pairs: FilePairs, options: ReadOptions) -> tuple[Any, ClassMasks, str]:
    """(images, masks, note) of one part."""
    _check_pair_sizes(pairs)
    images = open_images(
        [image for image, _ in pairs], options.image_size, options.skip_bad, options.cache, options.colour
    )

    def decode(file: Path) -> Tensor:
        with Image.open(file) as image:
            return mask_bytes(image, options.image_size, options.void)

    masks = open_masks([pairs[n][1] for n in images.read], decode, options.cache, f"void {options.void}")
    return images.pixels, masks, images.note


def mask_bytes(image: Image.Image, size: Sequence[int], void: int) -> Tensor:
    """A mask as uint8 [1, H, W], brought to `size` without mixing classes; the void class is VOID.

    Raises ValueError for masks of several channels, and for class numbers that a byte cannot hold.
    """
    if image.mode not in MODES:
        raise ValueError(f"it is a {image.mode} image: masks hold a class number in one channel, or a palette")
    values = np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)
    if values.min() < 0 or values.max() > VOID or (void != VOID and values.max() == VOID):
        beside = "" if void == VOID else f" beside {void}, which is void (--void)"
        raise ValueError(
            f"its class numbers go from {values.min()} to {values.max()}, and 0 to 254 are possible{beside}"
        )
    values[values == void] = VOID
    plain = Image.fromarray(values.astype(np.uint8))
    plain = scale_and_crop(plain, size, Image.Resampling.NEAREST) if size else plain
    return torch.from_numpy(np.array(plain))[None]


def _check_pair_sizes(pairs: FilePairs) -> None:
    """Raise JpqError for masks of another size than their images; files that cannot be opened are reported later.

    An image counts as EXIF's orientation turns it; so does a mask, which mostly has none.
    """
    for file, mask in pairs:
        try:
            (height, width), (mask_height, mask_width) = read_header(file).shape, read_header(mask).shape
        except Exception:  # Pillow raises nearly anything on a damaged file
            continue
        if (height, width) != (mask_height, mask_width):
            turned = (height, width) == (mask_width, mask_height) and _is_turned(file)
            upright = " once its EXIF orientation has turned it upright" if turned else ""
            raise JpqError(
                f"The mask '{mask}' is {mask_width}x{mask_height} and its image '{file}' {width}x{height}{upright}. "
                f"Give masks of the size of {'the upright images' if turned else 'their images'}."
            )


def _is_turned(file: Path) -> bool:
    """Whether an image's EXIF orientation turns or mirrors it."""
    with Image.open(file) as image:
        return image.getexif().get(ORIENTATION, 1) != 1


def _check_same_sizes(pairs: dict[str, tuple[Any, ClassMasks]]) -> None:
    """Raise JpqError where the parts have images of different sizes."""
    sizes = {part: masks.shape[1:] for part, (_, masks) in pairs.items()}
    for part, size in sizes.items():
        if size != sizes["train"]:
            (height, width), (other_height, other_width) = size, sizes["train"]
            raise JpqError(
                f"The {part} images are {width}x{height}, the training images {other_width}x{other_height}. Bring them "
                "to one size with --image-size."
            )


def _largest_class(masks: ClassMasks) -> int:
    """The largest class number of all pixels that have one; -1 where none has."""
    largest = -1
    for start in range(0, len(masks), BLOCK):
        values = masks.index_select(0, torch.arange(start, min(start + BLOCK, len(masks))))
        largest = max(largest, int(values.masked_fill(values == VOID, -1).max()))
    return largest


def _class_names(folder: Path) -> tuple[str, ...]:
    """The names in classes.txt; () where it is not there."""
    file = folder / "classes.txt"
    if not file.is_file():
        return ()
    return tuple(line.strip() for line in read_utf8(file).splitlines() if line.strip())


def _preprocessing(channels: int, height: int, width: int, options: ReadOptions) -> Preprocessing:
    """ImageNet's normalisation for colour images; flips, and a crop or a shift by an eighth."""
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if channels == 3 else ((0.5,), (0.5,))
    crop = (options.crop[0], options.crop[-1]) if options.crop else None
    if crop and (crop[0] > height or crop[1] > width):
        raise JpqError(f"--crop {crop[0]} {crop[1]} is larger than the images, {height} x {width}.")
    pad = 0 if crop else max(1, min(height, width) // 8)
    return Preprocessing(mean, std, MaskAugment(pad, True, VOID, crop))
