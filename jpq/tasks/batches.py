"""Batches of one split of a data set: the contract, augmentation, and samples that are indexed by their number.

A column is what a split stores of its samples: a tensor, a tuple or dict of tensors, or images that are read when a
batch needs them (`jpq.tasks.lazy_images`).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from jpq.types import JpqError

S = TypeVar("S", bound="SplitBatches")

HALVED = 4  # samples that two halves need at least


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of all draws of one epoch."""
    return (seed * 1_000_003 + epoch) % 2**63


class SplitBatches(ABC):
    """The batches of one split: an iterable of (inputs, targets) on their device.

    Inputs are what `jpq.tracing.forward.call_model` takes: a tensor, a tuple of arguments or a dict of keywords.
    `epoch(e)` depends on (seed, e) alone, so a run can be resumed.
    """

    batch_size: int
    mean: tuple[float, ...] = ()  # of each channel, that was subtracted; () where inputs are as they came
    std: tuple[float, ...] = ()  # of each channel, that inputs were divided by then

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __len__(self) -> int:
        """Batches per epoch."""

    @abstractmethod
    def epoch(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        """The batches of one epoch."""

    @abstractmethod
    def first(self: S, count: int) -> S:
        """The first `count` samples alone."""

    def limited(self: S, count: int) -> S:
        """At most `count` samples, the same ones in every epoch and every run; by default the first."""
        return self.first(count) if count < self.size else self

    @abstractmethod
    def halves(self: S) -> tuple[S, S]:
        """Two disjoint halves of the samples for bi-level methods, the same ones in every epoch and every run.

        Raises JpqError where there are too few samples.
        """

    @abstractmethod
    def fixed_part(self: S, share: float) -> S:
        """A fixed random part of the samples, in one order and without augmentation; from share 1 on all of them."""

    def raw(self: S) -> S:
        """The same batches with inputs that are not normalised: bytes as x / 255."""
        return self

    def one_size(self: S) -> S:
        """The same samples, cut to one size where they have several."""
        return self

    def fit_sizes(self, compute: Callable[[Any], Any]) -> str:
        """Cut samples to one size from now on where `compute`, inputs -> outputs, cannot take all that they have.

        Returns a sentence on what was cut, "" where nothing was.
        """
        return ""

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return self.epoch(0)


@dataclass(frozen=True)
class Augment:
    """Augmentation: a random crop of the image padded by `pad` zero pixels, and a horizontal flip half the time."""

    pad: int
    flip: bool = False

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw a random move per image, [count, 3] on the CPU: row and column of the crop's start, flipped or not."""
        corners = torch.randint(2 * self.pad + 1, (count, 2), generator=generator)
        return torch.cat([corners, torch.randint(1 + self.flip, (count, 1), generator=generator)], 1)

    def apply(self, images: Tensor, moves: Tensor, fill: int = 0) -> Tensor:
        """Move every image of [B, C, H, W] by its row of `moves`, [B, 3]; `fill` is what lies around it."""
        rows, columns, flipped = moves.unbind(1)
        if self.pad:
            padded = F.pad(images, [self.pad] * 4, value=fill)
            windows = padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
            samples = torch.arange(len(images), device=images.device)
            images = windows[samples, :, rows.to(images.device), columns.to(images.device)]
        flips = flipped.nonzero()[:, 0].to(images.device)  # counted on the CPU: no wait for an accelerator
        return images.index_copy(0, flips, images.index_select(0, flips).flip(3))

    def apply_pair(self, images: Tensor, labels: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
        """Move the images; their labels do not move with them."""
        return self.apply(images, moves), labels


@dataclass(frozen=True)
class MaskAugment(Augment):
    """Augmentation of images with their masks, [B, H, W]: a random crop of both, and flips of both.

    What lies outside of an image is black, and of the void class in its mask.
    """

    void: int = 255
    crop: tuple[int, int] | None = None  # height, width of the part that is taken; None: as large as the image

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw a random move per image, [count, 5]: the moves of Augment, and two numbers that place the crop."""
        places = torch.randint(2**31, (count, 2), generator=generator)
        return torch.cat([super().draw(count, generator), places], 1)

    def apply_pair(self, images: Tensor, labels: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
        """Move images and masks alike."""
        if self.crop is not None:
            images, labels = (crop_windows(x, self.crop, moves[:, 3:]) for x in (images, labels[:, None]))
        else:
            labels = labels[:, None]
        return self.apply(images, moves[:, :3]), self.apply(labels, moves[:, :3], self.void)[:, 0]


def crop_windows(images: Tensor, size: tuple[int, int], places: Tensor) -> Tensor:
    """A window (height, width) of each image of [B, C, H, W]; `places`, [B, 2], counts modulo the possible corners."""
    height, width = (min(a, b) for a, b in zip(size, images.shape[2:], strict=True))
    corners = torch.tensor([images.shape[2] - height + 1, images.shape[3] - width + 1])
    tops, lefts = (places % corners).unbind(1)
    parts = zip(images, tops.tolist(), lefts.tolist(), strict=True)
    return torch.stack([image[:, top : top + height, left : left + width] for image, top, left in parts])


@dataclass(frozen=True)
class Preprocessing:
    """Normalisation and augmentation of a data set's inputs; without a mean they are taken as they come."""

    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    augment: Augment | None = None


class Batches(SplitBatches):
    """A split of numbered samples (normalised float32 [B, C, ...], targets [B, ...]) on their device.

    Shuffled batches are training batches: a remainder of one sample is dropped, as BatchNorm cannot use it.
    """

    def __init__(
        self,
        images: Any,
        labels: Any,
        *,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
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
        if self.mean:
            white = 255 if images.dtype == torch.uint8 else 1
            shape = (-1, *[1] * (len(images.shape) - 2))  # channels are dim 1
            self._mean = (torch.tensor(mean, dtype=torch.float64) * white).float().view(shape).to(images.device)
            self._std = (torch.tensor(std, dtype=torch.float64) * white).float().view(shape).to(images.device)

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.labels)

    def __len__(self) -> int:
        """Batches per epoch."""
        full, rest = divmod(self.size, self.batch_size)
        return full + (rest > (1 if self.shuffle else 0))

    def epoch(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        """The batches of one epoch: order and augmentation depend on (seed, epoch) alone."""
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
        order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
        moves = self.augment.draw(self.size, generator) if self.augment else None
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            part = slice(start, start + self.batch_size)
            samples = order[part].to(self.labels.device)
            images, labels = take_rows(self.images, samples), take_rows(self.labels, samples)
            if self.augment and moves is not None:
                images, labels = self.augment.apply_pair(images, labels, moves[part])
            yield self.normalise(images), labels

    def first(self, count: int) -> Batches:
        """The first `count` samples alone."""
        return self._part(slice(count), self.seed)

    def limited(self, count: int) -> Batches:
        """At most `count` samples, with about the same share of every class."""
        if count >= self.size:
            return self
        return self._part(stratified(strata(self.labels), count, seed=0).to(self.labels.device), self.seed)

    def halves(self) -> tuple[Batches, Batches]:
        """Two disjoint halves of the samples for bi-level methods, the same ones in every epoch and every run.

        They are stratified by class, whatever the seed, and each is shuffled within itself: no sample of one half is
        ever given by the other. Raises JpqError below 4 samples.
        """
        check_halved(self.size)
        mask = stratified(strata(self.labels), self.size // 2, seed=0).to(self.labels.device)
        return self._part(mask, self.seed), self._part(~mask, self.seed + 1)

    def fixed_part(self, share: float) -> Batches:
        """A fixed random part of the samples, in one order and without augmentation; from share 1 on all of them."""
        indices = fixed_indices(self.size, share).to(self.labels.device)
        return Batches(
            select_rows(self.images, indices),
            select_rows(self.labels, indices),
            mean=self.mean,
            std=self.std,
            batch_size=self.batch_size,
            seed=self.seed,
        )

    def raw(self) -> Batches:
        """The same batches with inputs that are not normalised: bytes as x / 255."""
        plain = self._part(slice(None), self.seed)
        if self.mean:
            plain.mean, plain.std = (0.0,) * len(self.mean), (1.0,) * len(self.std)
            white = 255.0 if self.images.dtype == torch.uint8 else 1.0
            plain._mean, plain._std = torch.zeros_like(self._mean), torch.full_like(self._std, white)
        return plain

    def _part(self, samples: slice | Tensor, seed: int) -> Batches:
        """The batches of some samples, with the same batch size and augmentation."""
        return Batches(
            select_rows(self.images, samples),
            select_rows(self.labels, samples),
            mean=self.mean,
            std=self.std,
            batch_size=self.batch_size,
            augment=self.augment,
            shuffle=self.shuffle,
            seed=seed,
        )

    def normalise(self, images: Any) -> Any:
        """Stored images -> (x - mean) / std in float32, where bytes count as x / 255; without a mean, as they are."""
        return images.float().sub(self._mean).div_(self._std) if self.mean else images


class ListColumn:
    """A column of entries that are no rows of one tensor: images of different sizes, lists of boxes."""

    device = torch.device("cpu")

    def __init__(self, entries: Sequence[Any]):
        self.entries = list(entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, rows: slice | Tensor) -> ListColumn:
        numbers = torch.arange(len(self))[rows.cpu() if isinstance(rows, Tensor) else rows]
        part = ListColumn([self.entries[i] for i in numbers.tolist()])
        part.device = self.device
        return part

    def index_select(self, _: int, rows: Tensor) -> list[Any]:
        """The entries of these numbers."""
        return [self.entries[i] for i in rows.tolist()]

    @property
    def shape(self) -> tuple[int, ...]:
        """[N]: the entries have no common shape."""
        return (len(self),)

    def fingerprint(self) -> bytes:
        """A digest of the entries' tensors."""
        digest = hashlib.sha256()
        for leaf in tree_leaves(self.entries):
            if isinstance(leaf, Tensor):
                digest.update(f"{tuple(leaf.shape)}".encode())
                digest.update(leaf.contiguous().cpu().numpy().data)
        return digest.digest()

    def to(self, device: str | torch.device) -> ListColumn:
        """The column with its tensors on a device."""
        moved = ListColumn(tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, self.entries))
        moved.device = torch.device(device)
        return moved


def take_rows(column: Any, rows: Tensor) -> Any:
    """Samples of a column by their numbers, as tensors."""
    return tree_map(lambda values: values.index_select(0, rows), column)


def select_rows(column: Any, rows: slice | Tensor) -> Any:
    """The column of some samples: a slice, a mask, or numbers."""
    return tree_map(lambda values: values[rows], column)


def column_length(column: Any) -> int:
    """Number of samples in a column."""
    return len(tree_leaves(column)[0])


def strata(labels: Any) -> Tensor:
    """A number for each sample, [N, ...], by which splits are stratified: 0 where targets are no class or number."""
    if isinstance(labels, Tensor) and labels.dim() <= 2:
        return labels.cpu()
    return torch.zeros(column_length(labels), dtype=torch.int64)


def check_halved(size: int) -> None:
    """Raise JpqError where there are too few samples for two halves."""
    if size < HALVED:
        raise JpqError(f"{size} training samples cannot be halved for a bi-level method: at least {HALVED} are needed.")


def fixed_indices(size: int, share: float) -> Tensor:
    """Numbers of a fixed random part of `size` samples: `share` of them, at least one, and at most all."""
    count = max(1, min(size, round(share * size)))
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:count]


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
