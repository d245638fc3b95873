"""Data sets in memory as three splits: train, held-out (steers a run) and test (read once, for the final metric).

`digits` comes with scikit-learn; `mnist`, `fashion-mnist`, `cifar10`, `cifar100` are torchvision's; `folder:PATH` reads
PATH/train/CLASS/*.png or PATH/CLASS/*.png; `module:callable` imports and RUNS the user's own code. Images keep their
stored type (bytes or float32) and are augmented and normalised per batch on their device, by whole-batch tensor
operations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from jpq.files.paths import expand_home, is_windows_path
from jpq.tasks import CLASSIFICATION, datasets, folders
from jpq.tasks.base import Task
from jpq.tasks.datasets import Pair, Source
from jpq.types import JpqError, unknown

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of ImageNet's channels


@dataclass(frozen=True)
class Augment:
    """Augmentation: a random crop of the image padded by `pad` zero pixels, and a horizontal flip half the time."""

    pad: int
    flip: bool = False

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw a random move per image, [count, 3] on the CPU: row and column of the crop's start, flipped or not."""
        corners = torch.randint(2 * self.pad + 1, (count, 2), generator=generator)
        return torch.cat([corners, torch.randint(1 + self.flip, (count, 1), generator=generator)], 1)

    def apply(self, images: Tensor, moves: Tensor) -> Tensor:
        """Move every image of [B, C, H, W] by its row of `moves`, [B, 3]."""
        rows, columns, flipped = moves.unbind(1)
        if self.pad:
            windows = F.pad(images, [self.pad] * 4).unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
            samples = torch.arange(len(images), device=images.device)
            images = windows[samples, :, rows.to(images.device), columns.to(images.device)]
        flips = flipped.nonzero()[:, 0].to(images.device)  # counted on the CPU: no wait for an accelerator
        return images.index_copy(0, flips, images.index_select(0, flips).flip(3))


class Batches:
    """A split in memory, an iterable of batches (normalised float32 [B, C, H, W], targets [B, ...]) on their device.

    `epoch(e)` depends on (seed, e) alone, so a run can be resumed. Shuffled batches are training batches: a remainder
    of one sample is dropped, as BatchNorm cannot use it.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        augment: Augment | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise JpqError(f"The batch size is {batch_size}; give at least 1 with --batch-size.")
        self.images, self.labels = images, labels
        self.batch_size, self.augment, self.shuffle, self.seed = batch_size, augment, shuffle, seed
        self.mean, self.std = tuple(mean), tuple(std)
        white = 255 if images.dtype == torch.uint8 else 1
        self._mean = (torch.tensor(mean, dtype=torch.float64) * white).float().view(-1, 1, 1).to(images.device)
        self._std = (torch.tensor(std, dtype=torch.float64) * white).float().view(-1, 1, 1).to(images.device)

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.labels)

    def __len__(self) -> int:
        """Batches per epoch."""
        full, rest = divmod(self.size, self.batch_size)
        return full + (rest > (1 if self.shuffle else 0))

    def __iter__(self) -> Iterator[Pair]:
        return self.epoch(0)

    def epoch(self, epoch: int) -> Iterator[Pair]:
        """The batches of one epoch: order and augmentation depend on (seed, epoch) alone."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
        moves = self.augment.draw(self.size, generator) if self.augment else None
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            part = slice(start, start + self.batch_size)
            samples = order[part].to(self.images.device)
            images = self.images.index_select(0, samples)
            if self.augment and moves is not None:
                images = self.augment.apply(images, moves[part])
            yield self.normalise(images), self.labels.index_select(0, samples)

    def first(self, count: int) -> Batches:
        """The first `count` samples alone."""
        return self._part(slice(count), self.seed)

    def halves(self) -> tuple[Batches, Batches]:
        """Two disjoint halves of the samples for bi-level methods, the same ones in every epoch and every run.

        They are stratified by class, whatever the seed, and each is shuffled within itself: no sample of one half is
        ever given by the other. Raises JpqError below 4 samples.
        """
        if self.size < 4:
            raise JpqError(
                f"{self.size} training samples cannot be halved for a bi-level method: at least 4 are needed."
            )
        mask = stratified(self.labels.cpu(), self.size // 2, seed=0).to(self.labels.device)
        return self._part(mask, self.seed), self._part(~mask, self.seed + 1)

    def _part(self, samples: slice | Tensor, seed: int) -> Batches:
        """The batches of some samples, with the same batch size and augmentation."""
        return Batches(
            self.images[samples],
            self.labels[samples],
            mean=self.mean,
            std=self.std,
            batch_size=self.batch_size,
            augment=self.augment,
            shuffle=self.shuffle,
            seed=seed,
        )

    def normalise(self, images: Tensor) -> Tensor:
        """Stored images -> (x - mean) / std in float32, where bytes count as x / 255."""
        return images.float().sub(self._mean).div_(self._std)


@dataclass(frozen=True)
class Data:
    """A data set for one task, split and on its device."""

    name: str
    train: Batches
    held_out: Batches
    test: Batches
    example: Tensor  # a few normalised training images, for tracing, [2, C, H, W]
    classes: int  # of the labels; for other tasks the number of outputs per sample
    shape: tuple[int, int, int]  # channels, height, width of an image
    checksum: str  # sha256 over images and labels of the three splits as they are used
    task: Task = CLASSIFICATION
    class_names: tuple[str, ...] = ()  # by class number, where they are known
    notes: tuple[str, ...] = ()  # sentences on what was left out or looks wrong


@dataclass(frozen=True)
class Preprocessing:
    """Normalisation and augmentation of a data set's images."""

    mean: Sequence[float]
    std: Sequence[float]
    augment: Augment | None = None


PREPROCESSING = {
    "digits": Preprocessing((0.0,), (1.0,), Augment(pad=1)),
    "mnist": Preprocessing((0.1307,), (0.3081,), Augment(pad=2)),
    "fashion-mnist": Preprocessing((0.2860,), (0.3530,), Augment(pad=2, flip=True)),
    "cifar10": Preprocessing(*IMAGENET, Augment(pad=4, flip=True)),  # what the public ResNet weights expect
    "cifar100": Preprocessing((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), Augment(pad=4, flip=True)),
}


def load(
    name: str,
    root: str | Path = "data",
    *,
    batch_size: int = 64,
    held_out: float = 0.1,
    augment: bool = True,
    seed: int = 0,
    device: str | torch.device = "cpu",
    limit: int | None = None,
    image_size: Sequence[int] = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    skip_bad: bool = False,
) -> Data:
    """Read, split and normalise a data set.

    Args:
        name: digits, mnist, fashion-mnist, cifar10, cifar100, folder:PATH or module:callable.
        root: folder of torchvision's data sets.
        held_out: share of the training samples that steers a run; stratified, drawn by `seed`.
        augment: whether training images are augmented.
        limit: largest number of training samples (held-out ones included), for quick tries.
        image_size: (height, width), or one number for squares, that the images of a folder, and pictures of the user's
            Dataset, are scaled and cropped to.
        mean: of each channel, where bytes count as 0 to 1; three values turn grey images into colour ones. Default: as
            is usual for the data set.
        std: standard deviation of each channel.
        skip_bad: leave out images of a folder that cannot be read.

    Raises JpqError for unknown names, files that cannot be read, and data that are too small.
    """
    if not 0 < held_out < 1:
        raise JpqError(f"The held-out share is {held_out}; it must lie between 0 and 1 (--held-out 0.1).")
    if limit is not None and limit < 3:
        raise JpqError(f"The limit is {limit}; at least 3 training samples are needed (--limit 1000).")
    source = _read_source(name, expand_home(root), image_size, skip_bad)
    if isinstance(source, Data):
        if mean or std:
            raise JpqError(f"--mean and --std: '{name}' returns a jpq.tasks.data.Data, which is normalised by itself.")
        return source
    if len(mean) == 3:
        source = _with_colour(source)
    preprocessing = _preprocessing(name, source.train[0], mean, std)
    train, held_out_part, test = _split_source(source, held_out, seed, limit)
    if min(len(train[1]) - 1, len(held_out_part[1]), len(test[1])) < 1:
        raise JpqError(
            f"Data '{name}' is too small: {len(train[1])} training, {len(held_out_part[1])} held-out and "
            f"{len(test[1])} test samples are left, and at least 2, 1 and 1 are needed."
        )

    def batches(pair: Pair, augment: Augment | None = None, shuffle: bool = False) -> Batches:
        return Batches(
            *(part.to(device) for part in pair),
            mean=preprocessing.mean,
            std=preprocessing.std,
            batch_size=batch_size,
            augment=augment,
            shuffle=shuffle,
            seed=seed,
        )

    training = batches(train, preprocessing.augment if augment else None, shuffle=True)
    channels, height, width = train[0].shape[1:]
    return Data(
        name=name,
        train=training,
        held_out=batches(held_out_part),
        test=batches(test),
        example=training.normalise(training.images[:2]),
        classes=source.classes,
        shape=(channels, height, width),
        checksum=_checksum([train, held_out_part, test]),
        class_names=source.class_names,
        notes=source.notes,
    )


def _read_source(name: str, root: Path, size: Sequence[int], skip_bad: bool) -> Source | Data:
    kind, colon, path = name.partition(":")
    if kind == "folder" and path:
        return folders.read_folder(Path(path), size, skip_bad)
    if skip_bad:
        raise JpqError(f"--skip-bad is for image files, folder:PATH, and the data are '{name}'. Leave it out.")
    if size and (not colon or name in datasets.TORCHVISION):
        raise JpqError(
            f"--image-size is for folder:PATH and pictures of your own, and the data are '{name}'. Leave it out."
        )
    if is_windows_path(name) or (name not in PREPROCESSING and expand_home(name).is_dir()):
        raise JpqError(f"Unknown data set '{name}'. For a folder of images give folder:{name}.")
    if name == "digits":
        return datasets.digits()
    if name in datasets.TORCHVISION:
        return datasets.torchvision(name, root)
    if not colon or kind == "folder":
        raise unknown("data set", name, [*PREPROCESSING, "folder:PATH", "module:callable"])
    value = datasets.call_user_code("data", name, datasets.import_callable("data", name))
    return value if isinstance(value, Data) else datasets.convert_user_data(name, value, size)


def _with_colour(source: Source) -> Source:
    """The source with grey images repeated to three channels."""

    def colour(pair: Pair | None) -> Pair | None:
        return pair and (pair[0].expand(-1, 3, -1, -1).contiguous(), pair[1])

    if source.train[0].shape[1] != 1:
        return source
    train = source.train[0].expand(-1, 3, -1, -1).contiguous(), source.train[1]
    return replace(source, train=train, held_out=colour(source.held_out), test=colour(source.test))


def _preprocessing(name: str, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
    """The preprocessing of a data set, with the mean and standard deviation that were given, if any."""
    usual = _usual_preprocessing(name, images)
    if not mean and not std:
        return usual
    channels = images.shape[1]
    if {len(mean), len(std)} != {channels}:
        raise JpqError(
            f"--mean and --std have {len(mean)} and {len(std)} values, and the images of '{name}' {channels} channels. "
            "Give one value of each for every channel."
        )
    return replace(usual, mean=tuple(mean), std=tuple(std))


def _usual_preprocessing(name: str, images: Tensor) -> Preprocessing:
    """The preprocessing of a data set: published for known ones, photographs' for folders, none for user data."""
    channels, height, width = images.shape[1:]
    if name in PREPROCESSING:
        return PREPROCESSING[name]
    if not name.startswith("folder:"):
        return Preprocessing((0.0,) * channels, (1.0,) * channels)
    mean, std = IMAGENET if channels == 3 else ((0.5,), (0.5,))
    return Preprocessing(mean, std, Augment(pad=max(1, min(height, width) // 8), flip=True))


def _split_source(source: Source, held_out: float, seed: int, limit: int | None) -> tuple[Pair, Pair, Pair]:
    """(train, held-out, test) parts of a source; a missing test split is a quarter that does not depend on the seed."""
    train, held_out_part, test = source.train, source.held_out, source.test
    if test is None:
        mask = stratified(train[1], round(len(train[1]) / 4), seed=0)
        train, test = _select(train, ~mask), _select(train, mask)
    if limit is not None and limit < len(train[1]):
        train = _select(train, stratified(train[1], limit, seed=0))
    if held_out_part is None:
        mask = stratified(train[1], max(1, round(held_out * len(train[1]))), seed)
        train, held_out_part = _select(train, ~mask), _select(train, mask)
    return train, held_out_part, test


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """A boolean mask of exactly `count` samples, [N], with the same share of every class to within one sample.

    Targets of several numbers per sample count by the first of them.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].reshape(len(labels), -1)[:, 0].argsort(stable=True)]
    step = torch.arange(len(labels) + 1) * count // len(labels)  # rises `count` times, evenly
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[by_class] = step.diff() > 0
    return mask


def _select(pair: Pair, mask: Tensor) -> Pair:
    return pair[0][mask], pair[1][mask]


def _checksum(splits: list[Pair]) -> str:
    digest = hashlib.sha256()
    for images, labels in splits:
        digest.update(str(tuple(images.shape)).encode())
        digest.update(images.contiguous().numpy().data)
        digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()
