"""Restoration: clean images from noisy or smaller ones, `folder:PATH` with --noise or --scale, or pairs of images.

Images lie in PATH/train, PATH/val and PATH/test, or in PATH alone; pairs as pairs.py says. Inputs are made for each
batch: down-scaled by `--scale` (bicubic, antialiased, rounded to bytes), then with noise of `--noise` / 255 standard
deviation, which is new in every epoch of training and fixed for each image otherwise. Inputs and targets lie in [0, 1]
(inputs with noise beyond).

Training looks at crops. Held-out and test images are whole, a batch holds images of one size; with --image-size, or for
a network that cannot compute them so, they are cut to one size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from jpq.files.paths import expand_home
from jpq.tasks.batches import (
    Augment,
    ListColumn,
    Preprocessing,
    SplitBatches,
    check_halved,
    epoch_seed,
    fixed_indices,
)
from jpq.tasks.datasets import ReadOptions, Source
from jpq.tasks.folder_parts import PARTS, image_files, list_folders
from jpq.tasks.images import GREY, check_bad, image_bytes, reason
from jpq.tasks.readers.pairs import TARGETS, find_pairs, paired_names, two_folders
from jpq.types import JpqError

Entry = tuple[Tensor | None, Tensor]  # (input, or None where it is made; target), uint8 [C, H, W]

MOST_PIXELS = 2**20  # of a batch of whole images, where it holds more than one

TRIED = 64  # sides of images are tried on a network up to multiples of this number


@dataclass(frozen=True)
class Degradation:
    """What is done to a clean image."""

    noise: float = 0.0  # standard deviation, of 255
    scale: int = 1  # of the sides, target over input

    def apply(self, clean: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Inputs [B, C, H / scale, W / scale] of clean images [B, C, H, W] in [0, 1]; a generator for each sample."""
        x = clean
        if self.scale > 1:
            x = F.interpolate(x, scale_factor=1 / self.scale, mode="bicubic", antialias=True, align_corners=False)
            x = x.clamp(0, 1).mul(255).round().div(255)
        if self.noise:
            drawn = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])
            x = x + drawn.to(x.device) * (self.noise / 255)
        return x


class RestorationBatches(SplitBatches):
    """Batches (inputs, clean images) of images of any size.

    Training batches are random crops, about as many of each image as cover it. Others hold `whole` images, in each
    batch of one size; or images that are cut to the size of a crop around their centre.
    """

    def __init__(
        self,
        images: ListColumn,
        numbers: Tensor,
        *,
        degradation: Degradation,
        crop: tuple[int, int],
        batch_size: int,
        augment: Augment | None = None,
        shuffle: bool = False,
        seed: int = 0,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        whole: bool = False,
    ) -> None:
        self.images, self.numbers, self.degradation, self.crop = images, numbers, degradation, crop
        self.batch_size, self.augment, self.shuffle, self.seed = batch_size, augment, shuffle, seed
        self.whole = whole and not shuffle
        self.device = numbers.device
        self._list_samples()

    def _list_samples(self) -> None:
        """The image of each sample, [samples]."""
        counts = torch.tensor([self._crops(target) for _, target in self.images.entries])
        self._samples = torch.arange(len(self.images)).repeat_interleave(counts)

    def _crops(self, target: Tensor) -> int:
        """Random crops of an image in an epoch."""
        height, width = target.shape[1:]
        return max(1, height * width // (self.crop[0] * self.crop[1])) if self.shuffle else 1

    @property
    def size(self) -> int:
        """Number of samples: of crops, in training."""
        return len(self._samples)

    def __len__(self) -> int:
        """Batches per epoch."""
        if self.whole:
            return len(self._batches_of_sizes())
        full, rest = divmod(self.size, self.batch_size)
        return full + (rest > (1 if self.shuffle else 0))

    def _used_size(self, target: Tensor) -> tuple[int, int]:
        """Height and width of the part of a target that is used."""
        if not self.whole:
            return self.crop
        height, width = (side // self.degradation.scale * self.degradation.scale for side in target.shape[1:])
        return height, width

    def _batches_of_sizes(self) -> list[list[int]]:
        """The samples of each batch of whole images: images of one size, in their order."""
        groups: dict[tuple[int, int], list[int]] = {}
        for sample, (_, target) in enumerate(self.images.entries):
            groups.setdefault(self._used_size(target), []).append(sample)
        batches = []
        for (height, width), samples in groups.items():
            count = max(1, min(self.batch_size, MOST_PIXELS // (height * width)))
            batches += [samples[i : i + count] for i in range(0, len(samples), count)]
        return batches

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, which depend on (seed, epoch) alone."""
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
        for samples in self._batches_of_sizes() if self.whole else self._batches_in_order(generator):
            yield self._batch([self.images.entries[n] for n in samples], self.numbers[samples].tolist(), generator)

    def _batches_in_order(self, generator: torch.Generator) -> Iterator[list[int]]:
        """The images of each batch, whose samples are shuffled in training."""
        order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield self._samples[order[start : start + self.batch_size]].tolist()

    def _batch(self, entries: Sequence[Entry], numbers: Sequence[int], draw: torch.Generator) -> tuple[Tensor, Tensor]:
        windows = [self._window(entry, draw) for entry in entries]
        clean = torch.stack([target for _, target in windows]).float().div(255)
        if windows[0][0] is not None:
            noisy = torch.stack([x for x, _ in windows if x is not None]).float().div(255)
        else:
            fixed = [torch.Generator().manual_seed(number) for number in numbers]
            noisy = self.degradation.apply(clean, [draw] * len(windows) if self.shuffle else fixed)
        return noisy.to(self.device), clean.to(self.device)

    def _window(self, entry: Entry, draw: torch.Generator) -> Entry:
        """The part of a pair of images that is used: a random one that may be flipped, or the middle."""
        noisy, clean = entry
        scale = self.degradation.scale
        size = self._used_size(clean)
        places = [(side - used) // scale for side, used in zip(clean.shape[1:], size, strict=True)]
        if self.shuffle:
            tops = [int(torch.randint(place + 1, (), generator=draw)) for place in places]
        else:
            tops = [place // 2 for place in places]
        flips = torch.randint(2, (2,), generator=draw).tolist() if self.shuffle and self.augment else [0, 0]
        dims = [dim for dim, flip in zip((1, 2), flips, strict=True) if flip]

        def cut(image: Tensor, factor: int) -> Tensor:
            top, left = (corner * scale // factor for corner in tops)
            height, width = (side // factor for side in size)
            return image[:, top : top + height, left : left + width].flip(dims)

        return None if noisy is None else cut(noisy, scale), cut(clean, 1)

    def first(self, count: int) -> RestorationBatches:
        """The first `count` samples, or in training those of the first images that have as many."""
        images = int(self._samples[min(count, self.size) - 1]) + 1
        return self._part(torch.arange(images), self.seed)

    def halves(self) -> tuple[RestorationBatches, RestorationBatches]:
        """Two halves of the images."""
        check_halved(len(self.images))
        order = fixed_indices(len(self.images), 1.0)
        middle = len(order) // 2
        return self._part(order[:middle], self.seed), self._part(order[middle:], self.seed + 1)

    def fixed_part(self, share: float) -> RestorationBatches:
        """A fixed random part of the images, the middle of each."""
        part = self._part(fixed_indices(len(self.images), share), self.seed)
        part.shuffle, part.augment = False, None
        part._list_samples()
        return part

    def one_size(self) -> RestorationBatches:
        """The same images, cut to one size around their centre."""
        part = copy(self)
        part.whole = False
        return part

    def fit_sizes(self, compute: Callable[[Any], Any]) -> str:
        """Cut images to one size from now on where `compute` cannot take all their sizes, or changes them.

        Sizes are tried on small images whose sides have the same remainders. Returns a sentence on what was cut.
        """
        sizes = {self._used_size(target) for _, target in self.images.entries}
        if not self.whole or len(sizes) < 2:
            return ""
        tried = TRIED * self.degradation.scale
        tries = {tuple(min(side, tried + side % tried) for side in size): size for size in sorted(sizes)}
        failed = [size for small, size in tries.items() if not self._computes(compute, small)]
        if not failed:
            return ""
        self.whole = False
        (height, width), (h, w) = failed[0], self.crop
        cut = f"{len(sizes)} sizes of images are cut to {h} x {w} around their centre"
        return f"{cut}, as the network cannot compute {height} x {width}."

    @torch.no_grad()
    def _computes(self, compute: Callable[[Any], Any], size: Sequence[int]) -> bool:
        """Whether an output of this height and width comes of an input that belongs to it."""
        scale, channels = self.degradation.scale, self.images.entries[0][1].shape[0]
        x = torch.zeros(1, channels, *(side // scale for side in size), device=self.device)
        try:
            output = compute(x)
        except Exception:  # of the user's network, or of a runtime
            return False
        return isinstance(output, Tensor) and tuple(output.shape[2:]) == tuple(size)

    def _part(self, rows: Tensor, seed: int) -> RestorationBatches:
        part = copy(self)
        part.images, part.numbers, part.seed = self.images[rows], self.numbers[rows.to(self.device)], seed
        part._list_samples()
        return part


def read(path: str, options: ReadOptions) -> Source:
    """The images of a folder, with inputs that are made from them, or pairs of images.

    Raises JpqError for images that cannot be read, that are smaller than a crop, or that differ in channels.
    """
    pairs = find_pairs(path, TARGETS)
    if pairs and options.noise:
        raise JpqError(f"--noise {options.noise}: '{path}' holds noisy images already. Leave --noise out.")
    files: dict[str, list[tuple[Path | None, Path]]]
    files = {part: list(entries) for part, entries in pairs.items()} or _clean_files(expand_home(Path(path)))
    if not pairs and not options.noise and options.scale == 1:
        raise JpqError(
            f"'{path}' holds clean images alone: say what is done to them with --noise 25 or --scale 2, or put inputs "
            "and targets into PATH/input and PATH/target."
        )
    read = {part: _read_images(entries, options) for part, entries in files.items()}
    columns = {part: entries for part, (entries, _) in read.items()}
    channels = _check_channels([entry for entries in columns.values() for entry in entries], path)
    scale = _scale_of_pairs(columns, path) if pairs else options.scale
    sizes = {part: _common_size(entries, scale, options.image_size) for part, entries in columns.items()}
    crop = _training_crop(options.crop, scale, sizes["train"], path)
    cut = [part for part in columns if part != "train" and options.image_size]
    notes = [note for _, note in read.values()] + [_cut_note(part, columns[part], sizes[part]) for part in cut]
    numbered = {part: (ListColumn(entries), torch.arange(len(entries))) for part, entries in columns.items()}
    val, test = numbered.get("val"), numbered.get("test")
    shared = _smallest([sizes[part] for part in sizes if part != "train"] or [sizes["train"]])
    held = sizes["train"] if "val" not in sizes or "test" not in sizes else sizes["val"]

    def make(images: ListColumn, numbers: Tensor, **settings: Any) -> RestorationBatches:
        used = crop if settings.get("shuffle") else _fitting(images, shared, held)
        whole = not options.image_size
        degradation = Degradation(options.noise, scale)
        return RestorationBatches(images, numbers, degradation=degradation, crop=used, whole=whole, **settings)

    return Source(
        numbered["train"],
        val if test else None,
        test or val,
        channels,
        notes=tuple(note for note in notes if note),
        task="restoration",
        preprocessing=Preprocessing(augment=Augment(0, flip=True)),
        about={"noise": options.noise, "scale": scale, "colour_order": "grey" if channels == 1 else "RGB"},
        make=make,
    )


def classes_note(path: str) -> str:
    """A sentence where two folders that are read as classes look like images to be restored and clean ones; else ""."""
    folders = two_folders(path, TARGETS) if expand_home(Path(path)).is_dir() else {}
    if not folders:
        return ""
    first, second = folders.get("train") or next(iter(folders.values()))
    pairs, images = paired_names(first, second)
    if 2 * len(pairs) < images:
        return ""
    return (
        f"Read as images of the classes of '{path}', though files in '{first}' and '{second}' have the same names. "
        "--task restoration reads them as pairs, of an image and what it shall become."
    )


def _fitting(images: ListColumn, *sizes: tuple[int, int]) -> tuple[int, int]:
    """The first size that no image is smaller than."""
    for size in sizes:
        if all(t.shape[1] >= size[0] and t.shape[2] >= size[1] for _, t in images.entries):
            return size
    return _smallest([(t.shape[1], t.shape[2]) for _, t in images.entries])


def _smallest(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return min(h for h, _ in sizes), min(w for _, w in sizes)


def _clean_files(folder: Path) -> dict[str, list[tuple[Path | None, Path]]]:
    """The images of each part; of a folder without parts all are for training, and split later."""
    if not folder.is_dir():
        raise JpqError(f"The folder '{folder}' is not there, or is a file.")
    parts = {}
    for entry in list_folders(folder):
        part = next((part for part, names in PARTS.items() if entry.name.casefold() in names), None)
        if part:
            parts[part] = entry
    if parts and "train" not in parts:
        raise JpqError(f"There is no folder '{folder / 'train'}'. Images are read from PATH/train, or from PATH alone.")
    found: dict[str, list[tuple[Path | None, Path]]] = {}
    for part, entry in (parts or {"train": folder}).items():
        found[part] = [(None, file) for file in sorted(image_files(entry))]
        if not found[part]:
            raise JpqError(f"The folder '{entry}' holds no images (.png, .jpg, .tif, .webp ...). Fill or remove it.")
    return found


def _read_images(files: Sequence[tuple[Path | None, Path]], options: ReadOptions) -> tuple[list[Entry], str]:
    """(decoded images of one part, a note on those that are left out, with what they are paired with).

    Raises JpqError that lists all that cannot be read, where they are not to be skipped or none is left.
    """
    entries: list[Entry] = []
    bad: list[str] = []
    for pair in files:
        images: list[Tensor | None] = []
        for file in pair:
            try:
                images.append(None if file is None else _decode(file, options.colour))
            except Exception as error:  # Pillow raises nearly anything on a damaged file
                bad.append(f"'{file}' ({reason(error, file or Path())})")
        if len(images) == 2 and images[1] is not None:
            entries.append((images[0], images[1]))
    count = sum(file is not None for pair in files for file in pair)
    return entries, check_bad(bad, count if entries else len(bad), options.skip_bad)


def _decode(file: Path, colour: bool) -> Tensor:
    """An image as uint8 [3, H, W], or [1, H, W] where it is grey."""
    with Image.open(file) as image:
        pixels = image_bytes(image)
        return pixels[:1] if image.mode in GREY and not colour else pixels


def _check_channels(entries: Sequence[Entry], path: str) -> int:
    """Channels of all images. Raises JpqError where some are grey and others are not."""
    channels = Counter(target.shape[0] for _, target in entries)
    if len(channels) > 1:
        raise JpqError(
            f"'{path}' holds {channels[1]} grey images and {channels[3]} in colour. Convert them to one kind."
        )
    return next(iter(channels))


def _scale_of_pairs(columns: dict[str, list[Entry]], path: str) -> int:
    """The factor between the sides of targets and inputs. Raises JpqError where it is not the same for all."""
    factors = set()
    for entries in columns.values():
        for noisy, clean in entries:
            assert noisy is not None
            sides = list(zip(noisy.shape[1:], clean.shape[1:], strict=True))
            factors |= {0 if b % a else b // a for a, b in sides}
    if len(factors) != 1 or 0 in factors:
        raise JpqError(f"The targets in '{path}' are not all the same whole number of times as large as their inputs.")
    return int(factors.pop())


def _common_size(entries: Sequence[Entry], scale: int, size: Sequence[int]) -> tuple[int, int]:
    """The largest size that all images have, a multiple of the scale; at most `size`, where it is given."""
    height, width = _smallest([(target.shape[1], target.shape[2]) for _, target in entries])
    if size:
        height, width = min(height, size[0]), min(width, size[-1])
    return height // scale * scale, width // scale * scale


def _training_crop(crop: Sequence[int], scale: int, common: tuple[int, int], path: str) -> tuple[int, int]:
    """Height and width of training crops: as given, or of the smallest training image."""
    if not crop:
        return common
    height, width = crop[0], crop[-1]
    if height > common[0] or width > common[1]:
        raise JpqError(f"--crop {height} {width} is larger than the smallest training image in '{path}', {common}.")
    if height % scale or width % scale:
        raise JpqError(f"--crop {height} {width} is no multiple of --scale {scale}.")
    return height, width


def _cut_note(part: str, entries: Sequence[Entry], size: tuple[int, int]) -> str:
    """A sentence on images that are cut to a common size; "" where none is."""
    cut = sum(1 for _, target in entries if (target.shape[1], target.shape[2]) != size)
    shown = "held-out" if part == "val" else part
    return (
        f"{cut} of {len(entries)} {shown} images are cut to {size[0]} x {size[1]} around their centre." if cut else ""
    )


__all__ = ["Degradation", "RestorationBatches", "read"]
