"""Data sets as three in-memory splits: train, held-out (steers everything) and test (read once, for the final line).

`digits` comes with scikit-learn; `mnist`, `fashion-mnist`, `cifar10`, `cifar100` are torchvision's; `folder:PATH` reads
PATH/train/CLASS/*.png; `module:callable` imports and RUNS the user's own code. Images stay as they were stored (bytes,
where they were) and are augmented and normalised per batch on their device, by whole-batch tensor operations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from jpq.tasks import datasets
from jpq.tasks.datasets import Pair, Source
from jpq.types import JpqError, unknown

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Augment:
    """Random crop of the image with `pad` zero pixels around it, as torchvision's RandomCrop, and a mirror image."""

    pad: int
    flip: bool = False

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """One random move per image, [count, 3] on the CPU: row and column where the crop begins, mirrored or not."""
        at = torch.randint(2 * self.pad + 1, (count, 2), generator=generator)
        return torch.cat([at, torch.randint(1 + self.flip, (count, 1), generator=generator)], 1)

    def apply(self, images: Tensor, moves: Tensor) -> Tensor:
        """Move every image of [B, C, H, W] by its row of `moves`, [B, 3]."""
        rows, columns, mirrored = moves.unbind(1)
        if self.pad:
            windows = F.pad(images, [self.pad] * 4).unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
            which = torch.arange(len(images), device=images.device)
            images = windows[which, :, rows.to(images.device), columns.to(images.device)]
        turned = mirrored.nonzero()[:, 0].to(images.device)  # the CPU counts them: no wait for an accelerator
        return images.index_copy(0, turned, images.index_select(0, turned).flip(3))


class Batches:
    """One split in memory. Iterating yields (normalised float32 [B, C, H, W], int64 [B]) on the images' device.

    `epoch(e)` is a pure function of (seed, e), whatever ran before, so a run can be resumed. Shuffled batches are
    training batches: a remainder of one sample is dropped, as BatchNorm cannot use it.
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
        whole = 255 if images.dtype == torch.uint8 else 1
        self._mean = (torch.tensor(mean, dtype=torch.float64) * whole).float().view(-1, 1, 1).to(images.device)
        self._std = (torch.tensor(std, dtype=torch.float64) * whole).float().view(-1, 1, 1).to(images.device)

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.labels)

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(self.size, self.batch_size)
        return whole + (rest > (1 if self.shuffle else 0))

    def __iter__(self) -> Iterator[Pair]:
        return self.epoch(0)

    def epoch(self, epoch: int) -> Iterator[Pair]:
        """The batches of one epoch: order and augmentation depend on (seed, epoch) alone."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
        moves = self.augment.draw(self.size, generator) if self.augment else None
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            part = slice(start, start + self.batch_size)
            which = order[part].to(self.images.device)
            images = self.images.index_select(0, which)
            if self.augment and moves is not None:
                images = self.augment.apply(images, moves[part])
            yield self.normalise(images), self.labels.index_select(0, which)

    def first(self, count: int) -> Batches:
        """The first samples alone."""
        return Batches(
            self.images[:count],
            self.labels[:count],
            mean=self.mean,
            std=self.std,
            batch_size=self.batch_size,
            augment=self.augment,
            shuffle=self.shuffle,
            seed=self.seed,
        )

    def halves(self) -> tuple[Batches, Batches]:
        """Two halves of the samples, for bi-level methods: disjoint, and the same in every epoch and every run.

        They are split by sample and stratified by class, whatever the seed, and each is shuffled within itself: no
        sample that one half ever gives is given by the other. Raises JpqError below 4 samples.
        """
        if self.size < 4:
            raise JpqError(
                f"{self.size} training samples cannot be halved for a bi-level method: at least 4 are needed."
            )
        first = stratified(self.labels.cpu(), self.size // 2, seed=0).to(self.labels.device)
        one, other = (
            Batches(
                self.images[mask],
                self.labels[mask],
                mean=self.mean,
                std=self.std,
                batch_size=self.batch_size,
                augment=self.augment,
                shuffle=self.shuffle,
                seed=self.seed + i,
            )
            for i, mask in enumerate((first, ~first))
        )
        return one, other

    def normalise(self, images: Tensor) -> Tensor:
        """Stored images -> (x - mean) / std in float32, where bytes count as x / 255."""
        return images.float().sub(self._mean).div_(self._std)


@dataclass(frozen=True)
class Data:
    """A data set, split and on its device. `example`: a few normalised training images, for tracing."""

    name: str
    train: Batches
    held_out: Batches
    test: Batches
    example: Tensor
    classes: int
    shape: tuple[int, int, int]
    checksum: str  # sha256 over images and labels of the three splits as they are used


@dataclass(frozen=True)
class Recipe:
    """How the images of a data set are normalised and augmented."""

    mean: Sequence[float]
    std: Sequence[float]
    augment: Augment | None = None


RECIPES = {
    "digits": Recipe((0.0,), (1.0,), Augment(pad=1)),
    "mnist": Recipe((0.1307,), (0.3081,), Augment(pad=2)),
    "fashion-mnist": Recipe((0.2860,), (0.3530,), Augment(pad=2, flip=True)),
    "cifar10": Recipe(*IMAGENET, Augment(pad=4, flip=True)),  # what the public ResNet weights expect
    "cifar100": Recipe((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), Augment(pad=4, flip=True)),
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
) -> Data:
    """Read, split and normalise a data set.

    `held_out` is the share of the training samples that steers a run; it is stratified, drawn by `seed`, never from the
    test split. `limit` first cuts the training samples (held-out ones included) to that many, for quick tries.
    """
    if not 0 < held_out < 1:
        raise JpqError(f"The held-out share is {held_out}; it must lie between 0 and 1 (--held-out 0.1).")
    if limit is not None and limit < 3:
        raise JpqError(f"The limit is {limit}; at least 3 training samples are needed (--limit 1000).")
    source = _read(name, Path(root))
    if isinstance(source, Data):
        return source
    recipe = _recipe(name, source.train[0])
    train, held, test = _split(source, held_out, seed, limit)
    if min(len(train[1]) - 1, len(held[1]), len(test[1])) < 1:
        raise JpqError(
            f"Data '{name}' is too small: {len(train[1])} training, {len(held[1])} held-out and {len(test[1])} test "
            "samples are left, and at least 2, 1 and 1 are needed."
        )

    def batches(pair: Pair, augment: Augment | None = None, shuffle: bool = False) -> Batches:
        return Batches(
            *(part.to(device) for part in pair),
            mean=recipe.mean,
            std=recipe.std,
            batch_size=batch_size,
            augment=augment,
            shuffle=shuffle,
            seed=seed,
        )

    training = batches(train, recipe.augment if augment else None, shuffle=True)
    channels, height, width = train[0].shape[1:]
    return Data(
        name=name,
        train=training,
        held_out=batches(held),
        test=batches(test),
        example=training.normalise(training.images[:2]),
        classes=source.classes,
        shape=(channels, height, width),
        checksum=_checksum([train, held, test]),
    )


def _read(name: str, root: Path) -> Source | Data:
    if name == "digits":
        return datasets.digits()
    if name in datasets.TORCHVISION:
        return datasets.torchvision(name, root)
    kind, colon, rest = name.partition(":")
    if kind == "folder" and rest:
        return datasets.folder(Path(rest))
    if not colon or kind == "folder":
        raise unknown("data set", name, [*RECIPES, "folder:PATH", "module:callable"])
    made = datasets.call("data", name, datasets.imported("data", name))
    return made if isinstance(made, Data) else datasets.converted(name, made)


def _recipe(name: str, images: Tensor) -> Recipe:
    """A folder's images are taken for photographs; what the user's code gives is left as it is (bytes / 255)."""
    channels, height, width = images.shape[1:]
    if name in RECIPES:
        return RECIPES[name]
    if not name.startswith("folder:"):
        return Recipe((0.0,) * channels, (1.0,) * channels)
    mean, std = IMAGENET if channels == 3 else ((0.5,), (0.5,))
    return Recipe(mean, std, Augment(pad=max(1, min(height, width) // 8), flip=True))


def _split(source: Source, held_out: float, seed: int, limit: int | None) -> tuple[Pair, Pair, Pair]:
    """Train, held-out, test: a missing test split is the same quarter whatever the seed."""
    train, held, test = source.train, source.held_out, source.test
    if test is None:
        mask = stratified(train[1], round(len(train[1]) / 4), seed=0)
        train, test = _pick(train, ~mask), _pick(train, mask)
    if limit is not None and limit < len(train[1]):
        train = _pick(train, stratified(train[1], limit, seed=0))
    if held is None:
        mask = stratified(train[1], max(1, round(held_out * len(train[1]))), seed)
        train, held = _pick(train, ~mask), _pick(train, mask)
    return train, held, test


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """A mask of exactly `count` samples, [N]; of every class its share, give or take one."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    step = torch.arange(len(labels) + 1) * count // len(labels)  # rises `count` times, evenly
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[by_class] = step.diff() > 0
    return mask


def _pick(pair: Pair, mask: Tensor) -> Pair:
    return pair[0][mask], pair[1][mask]


def _checksum(splits: list[Pair]) -> str:
    digest = hashlib.sha256()
    for images, labels in splits:
        digest.update(str(tuple(images.shape)).encode())
        digest.update(images.contiguous().numpy().data)
        digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()
