"""Image files as bytes of one size: turned as their EXIF data say, of any colour mode, scaled and cropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor

from jpq.types import JpqError

# files with these endings are images; of the last two lines only those that Pillow, or a plug-in of it, can read
SUFFIXES = frozenset(
    {
        *IMG_EXTENSIONS,
        *(".jpe", ".jfif", ".gif", ".jp2", ".avif"),
        *(".heic", ".heif", ".jxl", ".dng", ".cr2", ".nef", ".arw", ".psd"),
    }
)

GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes without colour

WIDE = 2**16 - 1  # white in an image of 16 bits

LISTED = 20  # bad files that a sentence names


@dataclass(frozen=True)
class Images:
    """Images of one size, and which files they come from."""

    pixels: Any  # a column (jpq.tasks.batches) of uint8 [N, 3, H, W], or [N, 1, H, W] where all files are grey
    read: tuple[int, ...]  # index of each image's file
    note: str  # a sentence on files that were left out; "" where there are none


def read_images(files: Sequence[Path], size: Sequence[int] = (), skip_bad: bool = False) -> Images:
    """Read image files into memory.

    Args:
        files: at least one.
        size: (height, width), or one number for squares, that images are scaled and cropped to; () leaves them.
        skip_bad: leave out files that cannot be read.

    Raises JpqError that lists all files that cannot be read, or that says which sizes there are where they differ.
    """
    pixels: list[Tensor] = []
    read: list[int] = []
    bad: list[str] = []
    grey = True
    for number, file in enumerate(files):
        try:
            with Image.open(file) as image:
                is_grey = image.mode in GREY
                tensor = image_bytes(image, size)
        except Exception as error:  # Pillow raises nearly anything on a damaged file
            bad.append(f"'{file}' ({reason(error, file)})")
            continue
        grey = grey and is_grey
        pixels.append(tensor)
        read.append(number)
    note = check_bad(bad, len(files), skip_bad)
    check_one_size([files[n] for n in read], pixels)
    channels = slice(1) if grey else slice(3)
    return Images(torch.stack([tensor[channels] for tensor in pixels]), tuple(read), note)


def image_bytes(image: Image.Image, size: Sequence[int] = ()) -> Tensor:
    """An image as uint8 [3, H, W], upright; transparency is dropped, and 16 bits are scaled to 8.

    Raises ValueError for pixels whose range is not known: floating point, and integers beyond 16 bits.
    """
    upright = ImageOps.exif_transpose(image)
    colour = _as_rgb(upright)
    return pil_to_tensor(scale_and_crop(colour, size) if size else colour)


def scale_and_crop(
    image: Image.Image, size: Sequence[int], resampling: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """The image at (height, width), or a square of one side: scaled to just cover it, then cropped to its centre.

    Both are one (bilinear) resampling, antialiased where the image shrinks, of the largest central part that has the
    proportions of `size`.
    """
    height, width = size if len(size) == 2 else (size[0], size[0])
    if image.size == (width, height):
        return image
    scale = max(height / image.height, width / image.width)
    left, top = (image.width - width / scale) / 2, (image.height - height / scale) / 2
    part = (max(0.0, left), max(0.0, top), min(image.width, image.width - left), min(image.height, image.height - top))
    return image.resize((width, height), resampling, box=part)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] == "I":
        return _from_16_bits(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range: convert it to 8 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits scaled to 8, since Pillow's own conversion clips."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > WIDE:
        raise ValueError(f"its pixels go from {values.min()} to {values.max()}: convert it to 8 or 16 bits")
    return Image.fromarray(np.round(values * (255 / WIDE)).astype(np.uint8))


def reason(error: Exception, file: Path) -> str:
    """Why a file cannot be read, without its name."""
    text = " ".join(str(error).replace(repr(str(file)), "it").split())[:100]
    return text or type(error).__name__


def check_bad(bad: Sequence[str], count: int, skip_bad: bool, what: str = "images") -> str:
    """The note on files that cannot be read. Raises JpqError for them unless they are to be skipped."""
    if not bad:
        return ""
    listed = ", ".join(bad[:LISTED]) + (f", and {len(bad) - LISTED} more" if len(bad) > LISTED else "")
    if skip_bad and len(bad) < count:
        return f"{len(bad)} of {count} {what} cannot be read and are left out: {listed}."
    if skip_bad:
        raise JpqError(f"None of {count} {what} can be read: {listed}. Repair them, or convert them to PNG or JPEG.")
    way_out = ", or leave them out with --skip-bad" if what == "images" else ""
    raise JpqError(f"{len(bad)} of {count} {what} cannot be read: {listed}. Repair or remove them{way_out}.")


def check_one_size(files: Sequence[Path], pixels: Sequence[Tensor]) -> None:
    """Raise JpqError, with two files of different sizes, where images [C, H, W] have not all the same."""
    shapes = [tuple(tensor.shape[1:]) for tensor in pixels]
    sizes = Counter(shapes)
    if len(sizes) < 2:
        return
    first = shapes[0]
    other = next(n for n, shape in enumerate(shapes) if shape != first)
    (h, w), (first_h, first_w) = shapes[other], first
    raise JpqError(
        f"The image '{files[other]}' is {w}x{h} but '{files[0]}' is {first_w}x{first_h} ({len(sizes)} sizes in all). "
        "Bring them to one size with --image-size 224 (or another number of pixels), or resize them first."
    )
