"""Images of files as columns: in memory, in a file of decoded bytes on the disk, or decoded when a batch needs them.

All three give the same bytes. A column that is not a tensor has the few members of one that batches use: `shape`,
`dtype`, `device`, `index_select(0, rows)`, `[rows]` and `to(device)`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jpq.files.atomic import replace_file
from jpq.files.lock import exclusive
from jpq.tasks.images import GREY, Images, check_bad, check_one_size, image_bytes, read_images, reason

MEMORY_SHARE = 0.25  # of the free memory that images may take with --cache auto
DISK_SHARE = 0.5  # of the free space of the disk
UNKNOWN_MEMORY = 2**32  # bytes, taken for free where the system does not say it
THREADS = max(2, min(16, os.cpu_count() or 2))  # that decode the images of a batch
ORIENTATION = 0x0112  # EXIF's tag; from 5 on height and width change places
FORMAT = 1  # of the files in the cache

Found = TypeVar("Found")

Decoder = Callable[[Path], Tensor]  # uint8 [C, H, W]


@dataclass(frozen=True)
class Header:
    """What an image file says before it is decoded."""

    shape: tuple[int, int]  # height, width, upright
    grey: bool


class LazyImages:
    """Images [N, C, H, W] of numbered files, read by `read(numbers)` when a batch needs them."""

    dtype = torch.uint8

    def __init__(
        self,
        read: Callable[[Sequence[int]], Tensor],
        shape: tuple[int, int, int],
        rows: Tensor,
        source: bytes,
        device: torch.device | None = None,
    ):
        self._read, self._sample, self._rows, self._source = read, shape, rows, source
        self.device = device or torch.device("cpu")

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, C, H, W]."""
        return len(self._rows), *self._sample

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice | Tensor) -> LazyImages:
        part = self._rows[rows.cpu() if isinstance(rows, Tensor) else rows]
        return LazyImages(self._read, self._sample, part, self._source, self.device)

    def index_select(self, _: int, rows: Tensor) -> Tensor:
        """The images of these numbers, decoded."""
        return self._read(self._rows[rows.cpu()].tolist()).to(self.device)

    def to(self, device: str | torch.device) -> LazyImages:
        """The same images, moved to a device when they are read."""
        return LazyImages(self._read, self._sample, self._rows, self._source, torch.device(device))

    def fingerprint(self) -> bytes:
        """A digest of the files (names, sizes, times) and of which of them are here."""
        return hashlib.sha256(self._source + self._rows.numpy().tobytes()).digest()


class ClassMasks:
    """Masks [N, H, W] of class numbers, held as bytes [N, 1, H, W] in any column and given as int64."""

    def __init__(self, column: Any):
        self.column = column
        self.device = column.device

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, H, W]."""
        count, _, height, width = self.column.shape
        return count, height, width

    def __len__(self) -> int:
        return int(self.column.shape[0])

    def __getitem__(self, rows: slice | Tensor) -> ClassMasks:
        return ClassMasks(self.column[rows])

    def index_select(self, dim: int, rows: Tensor) -> Tensor:
        """The masks of these numbers, int64 [B, H, W]."""
        masks: Tensor = self.column.index_select(dim, rows)
        return masks[:, 0].long()

    def to(self, device: str | torch.device) -> ClassMasks:
        """The masks on a device."""
        return ClassMasks(self.column.to(device))

    def fingerprint(self) -> bytes:
        """A digest of the masks, or of their files."""
        if isinstance(self.column, Tensor):
            return hashlib.sha256(self.column.contiguous().numpy().data).digest()
        return bytes(self.column.fingerprint())


def open_images(
    files: Sequence[Path], size: Sequence[int] = (), skip_bad: bool = False, cache: str = "memory", colour: bool = False
) -> Images:
    """Image files as a column: `read_images` for those in memory, else a LazyImages.

    Args:
        files: at least one.
        size: (height, width), or one number for squares, that images are scaled and cropped to; () leaves them.
        skip_bad: leave out files that cannot be read.
        cache: memory, disk, none, or auto, which takes the first of them that has room.
        colour: keep three channels where all files are grey.

    Raises JpqError that lists all files that cannot be read, or that says which sizes there are where they differ.
    With cache none only the files' headers are read here; a file that is damaged further on ends the run.
    """
    where = cache if cache != "auto" else choose_cache(files, size)
    if where == "memory":
        images = read_images(files, size, skip_bad)
        three = colour and images.pixels.shape[1] == 1
        return Images(images.pixels.expand(-1, 3, -1, -1), images.read, images.note) if three else images
    headers, read, note = _scan(files, skip_bad)
    shape = _common_shape([files[n] for n in read], headers, size)
    grey = all(header.grey for header in headers) and not colour
    channels = 1 if grey else 3

    def decode(file: Path) -> Tensor:
        with Image.open(file) as image:
            return image_bytes(image, size)[:channels]

    return _open_lazily([files[n] for n in read], decode, (channels, *shape), where, skip_bad, read, note)


def open_masks(files: Sequence[Path], decode: Decoder, cache: str, coding: str) -> ClassMasks:
    """Mask files as a column of class numbers.

    Args:
        files: at least one.
        decode: file -> uint8 [1, H, W].
        cache: auto, memory, disk or none.
        coding: what `decode` does to the bytes, in words, so that the cache tells it from others of the same files.

    Raises JpqError that lists all files that cannot be read, and where their sizes differ.
    """
    if cache in ("memory", "auto"):
        masks, bad = _decode_all(files, decode)
        check_bad(bad, len(files), False, "masks")
        check_one_size(files, masks)
        return ClassMasks(torch.stack(masks))
    first, bad = _decode_all(files[:1], decode)
    check_bad(bad, len(files), False, "masks")
    everything = tuple(range(len(files)))
    shape: Any = tuple(first[0].shape)
    return ClassMasks(_open_lazily(files, decode, shape, cache, False, everything, "", coding).pixels)


def choose_cache(files: Sequence[Path], size: Sequence[int]) -> str:
    """Where decoded images have room: memory, disk or none."""
    needed = 3 * len(files) * _pixels(files[0], size)
    if needed <= MEMORY_SHARE * free_memory():
        return "memory"
    folder = cache_folder()
    while not folder.exists():
        folder = folder.parent
    return "disk" if needed <= DISK_SHARE * shutil.disk_usage(folder).free else "none"


def free_memory() -> int:
    """Free memory in bytes, as the system says it."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # other systems than Linux
        return UNKNOWN_MEMORY


def cache_folder() -> Path:
    """The folder of decoded images."""
    return Path.home() / ".cache" / "jpq" / "images"


def _pixels(file: Path, size: Sequence[int]) -> int:
    """Pixels of an image at its size, or at that of its file; those of a small photograph where it cannot be read."""
    if size:
        return size[0] * size[-1]
    try:
        height, width = read_header(file).shape
    except Exception:  # it is reported when all files are read
        return 2**18
    return height * width


def read_header(file: Path) -> Header:
    """Size and mode of an image file, which is not decoded."""
    with Image.open(file) as image:
        width, height = image.size
        if image.getexif().get(ORIENTATION, 1) >= 5:
            width, height = height, width
        return Header((height, width), image.mode in GREY)


def _scan(files: Sequence[Path], skip_bad: bool) -> tuple[list[Header], tuple[int, ...], str]:
    """Headers of the files that have one, their numbers, and a note on the others."""

    scanned = _read_each(files, read_header)
    note = check_bad([text for text in scanned if isinstance(text, str)], len(files), skip_bad)
    read = tuple(n for n, entry in enumerate(scanned) if isinstance(entry, Header))
    return [entry for entry in scanned if isinstance(entry, Header)], read, note


def _common_shape(files: Sequence[Path], headers: Sequence[Header], size: Sequence[int]) -> tuple[int, int]:
    """(height, width) of all images."""
    if size:
        return size[0], size[-1]
    check_one_size(files, [torch.empty(0, *header.shape) for header in headers])
    return headers[0].shape


def _open_lazily(
    files: Sequence[Path],
    decode: Decoder,
    shape: tuple[int, int, int],
    cache: str,
    skip_bad: bool,
    numbers: tuple[int, ...],
    note: str,
    coding: str = "",
) -> Images:
    source = _source(files, shape, coding)
    if cache == "none":
        column = LazyImages(lambda rows: _decode_batch(files, decode, rows), shape, torch.arange(len(files)), source)
        return Images(column, numbers, note)
    kept, more = _fill_cache(files, decode, shape, skip_bad, source)
    pixels = torch.from_numpy(np.load(_cache_path(source), mmap_mode="c"))
    column = LazyImages(lambda rows: pixels[torch.tensor(rows)], shape, torch.tensor(kept), source)
    return Images(column, tuple(numbers[n] for n in kept), more or note)


def _source(files: Sequence[Path], shape: tuple[int, int, int], coding: str) -> bytes:
    """A digest of the files' names, sizes and times, and of the shape and the coding that they are brought to."""
    digest = hashlib.sha256(f"{FORMAT} {shape}{coding}".encode())
    for file in files:
        state = file.stat()
        digest.update(f"{file.parent.name}/{file.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.digest()


def _decode_all(files: Sequence[Path], decode: Decoder) -> tuple[list[Tensor], list[str]]:
    """The decoded files, and sentences on those that cannot be decoded."""
    results = _read_each(files, decode)
    return [r for r in results if isinstance(r, Tensor)], [r for r in results if isinstance(r, str)]


def _decode_batch(files: Sequence[Path], decode: Decoder, rows: Sequence[int]) -> Tensor:
    """The images of a batch. Raises JpqError for a file that cannot be decoded."""
    images, bad = _decode_all([files[n] for n in rows], decode)
    check_bad(bad, len(rows), False)
    return torch.stack(images)


def _cache_path(source: bytes) -> Path:
    return cache_folder() / f"{source.hex()[:32]}.npy"


def _fill_cache(
    files: Sequence[Path], decode: Decoder, shape: tuple[int, int, int], skip_bad: bool, source: bytes
) -> tuple[list[int], str]:
    """Decode all files into one file of the cache, unless it is there: the numbers of those that are in it, a note.

    Of several processes that want it one decodes, and the others wait for it.
    """
    path = _cache_path(source)
    record = path.with_suffix(".json")
    if not (path.is_file() and record.is_file()):
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.with_suffix(".lock")):
            if not (path.is_file() and record.is_file()):
                _decode_into(path, record, files, decode, shape, skip_bad)
    known = json.loads(record.read_text(encoding="utf-8"))
    return [int(n) for n in known["kept"]], check_bad(known["bad"], len(files), skip_bad)


def _decode_into(
    path: Path, record: Path, files: Sequence[Path], decode: Decoder, shape: tuple[int, int, int], skip_bad: bool
) -> None:
    """Decode all files into one file, and write which of them are in it."""
    kept: list[int] = []
    bad: list[str] = []

    def fill(part: Path) -> None:
        with part.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            start = file.tell()
            for begin in range(0, len(files), 16 * THREADS):
                block = range(begin, min(begin + 16 * THREADS, len(files)))
                for number, image in zip(block, _read_each([files[n] for n in block], decode), strict=True):
                    if isinstance(image, str):
                        bad.append(image)
                        image = torch.zeros(shape, dtype=torch.uint8)
                    else:
                        kept.append(number)
                    file.write(image.contiguous().numpy().tobytes())
            file.truncate(start + len(files) * int(np.prod(shape)))
        check_bad(bad, len(files), skip_bad)

    replace_file(path, fill)
    replace_file(record, lambda part: part.write_text(json.dumps({"kept": kept, "bad": bad}), encoding="utf-8"))


def _read_each(files: Sequence[Path], read: Callable[[Path], Found]) -> list[Found | str]:
    """What `read` makes of each file, or a sentence on it."""

    def attempt(file: Path) -> Found | str:
        try:
            return read(file)
        except Exception as error:  # Pillow raises nearly anything on a damaged file
            return f"'{file}' ({reason(error, file)})"

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(attempt, files))
