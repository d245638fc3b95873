"""A user's own iterable of batches, or torch DataLoader, as a split: read lazily, with its workers, and seeded.

Before each epoch the loader's random numbers are set from (seed, epoch): those of a DataLoader's generator, of its
sampler, and those that torch, numpy and Python draw while a batch is made. A `set_epoch` of the loader, its sampler or
its batch sampler is called. So a run that is resumed reads the same batches, where nothing else decides on the order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from jpq.tasks.batches import SplitBatches, check_halved, epoch_seed, fixed_indices
from jpq.types import JpqError

SEEDED = (list, tuple, DataLoader)  # kinds whose order is known to be the same for the same random numbers

UNKNOWN_ORDER = (
    "{what} is a {kind}, whose order jpq cannot set: a resumed run reads the same batches only if it gives them in the "
    "same order each time, or by its set_epoch(epoch)."
)


UNEQUAL = "stack expects each tensor to be equal size"  # torch's words where samples cannot be stacked


@dataclass
class _Draws:
    """The state of all random numbers of this process that code outside of jpq draws from."""

    torch: Tensor = field(default_factory=torch.get_rng_state)
    python: Any = field(default_factory=random.getstate)
    numpy: Any = field(default_factory=np.random.get_state)

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        np.random.set_state(self.numpy)


class _OwnDraws:
    """A stream of random numbers beside the run's own: used within `active`, and kept from use to use."""

    def __init__(self, seed: int):
        before = _Draws()
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        self._state = _Draws()
        before.restore()

    @contextmanager
    def active(self) -> Iterator[None]:
        before = _Draws()
        self._state.restore()
        try:
            yield
        finally:
            self._state = _Draws()
            before.restore()


class LoaderBatches(SplitBatches):
    """Batches of a user's iterable, which gives pairs (inputs, targets) anew each time it is asked.

    Args:
        loader: a DataLoader or another iterable of batches.
        what: the split in words, for errors, such as "The train part of 'mycode:data'".
        device: where batches go.
        seed: of the order.
        training: a batch of one sample is left out, as BatchNorm cannot use it, unless all are.

    Raises JpqError for an iterable that gives nothing or can be read only once, and for batches that are no pairs of
    tensors, that differ in structure, type or shape, or that hold NaN.
    """

    def __init__(
        self, loader: Iterable[Any], what: str, *, device: torch.device, seed: int = 0, training: bool = False
    ) -> None:
        if not isinstance(loader, Iterable):
            raise JpqError(f"{what} is a {type(loader).__name__}; give a DataLoader or another iterable of batches.")
        if isinstance(loader, Iterator):
            raise JpqError(
                f"{what} is a {type(loader).__name__} that can be read only once. Give a list of batches, a DataLoader "
                "or an object whose __iter__ begins anew."
            )
        self.loader, self.what, self.device = _with_new_workers(loader), what, device
        self.seed, self.training = seed, training
        self.count: int | None = None  # of the samples that are given; None: all
        self.share: tuple[int, int] | None = None  # (n, of how many): every so manieth batch alone
        self.check_targets: Callable[[Any], Any] | None = None  # the targets as the task takes them; raises JpqError
        self._sizes: list[int] | None = None  # samples of each batch of an epoch
        self._all_single = getattr(loader, "batch_size", None) == 1  # whether batches hold one sample each
        first = next(iter(self._read(0)), None)
        if first is None and training and not self._all_single:
            self._all_single = True
            first = next(iter(self._read(0)), None)
        if first is None:
            raise JpqError(f"{what} gives no batches. Check its files, filters and drop_last.")
        self.example = first
        self.batch_size = _samples(first[0])

    @property
    def size(self) -> int:
        """Number of samples of an epoch."""
        return sum(self._batch_sizes())

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self._batch_sizes())

    @property
    def note(self) -> str:
        """A sentence where the order of the batches cannot be set; else ""."""
        parts = (self.loader, getattr(self.loader, "sampler", None), getattr(self.loader, "batch_sampler", None))
        if isinstance(self.loader, SEEDED) or any(hasattr(part, "set_epoch") for part in parts):
            return ""
        return UNKNOWN_ORDER.format(what=self.what, kind=type(self.loader).__name__)

    def epoch(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        """The batches of one epoch, on the device."""
        for x, y in self._given(epoch):
            yield _to(x, self.device), _to(y, self.device)

    def _given(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        """The batches of one epoch that are this part's, on the CPU; in training without one cut to a single sample."""
        remaining = self.count
        for place, (x, y) in enumerate(self._read(epoch)):
            if self.share is not None and place % self.share[1] != self.share[0]:
                continue
            if remaining is not None:
                if not remaining or (remaining == 1 != self.count and self._leaves_single_out):
                    return
                x, y = (_first_rows(part, remaining) for part in (x, y))
                remaining -= _samples(x)
            yield x, y

    def _read(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        """The checked batches of one epoch as the loader gives them, in training without a single left-over sample."""
        draws = _OwnDraws(epoch_seed(self.seed, epoch))
        reference: list[Any] = []
        with draws.active():
            self._begin(epoch)
            batches = iter(self.loader)
        while True:
            with draws.active():
                batch = self._next(batches)
            if batch is None:
                if not reference and hasattr(self, "example"):
                    raise JpqError(
                        f"{self.what} gave batches once and none when it was read again. Give an iterable whose "
                        "__iter__ begins anew each time."
                    )
                return
            pair = _checked(batch, self.what, reference)
            if self.check_targets is not None:
                pair = pair[0], self.check_targets(pair[1])
            if _samples(pair[0]) > 1 or not self._leaves_single_out:
                yield pair

    @property
    def _leaves_single_out(self) -> bool:
        """Whether a batch of one sample is left out."""
        return self.training and not self._all_single

    def _next(self, batches: Iterator[Any]) -> Any:
        """The next batch, None after the last. Raises JpqError for samples that a DataLoader cannot stack."""
        try:
            return next(batches, None)
        except RuntimeError as error:
            if UNEQUAL not in str(error):
                raise
            shapes = str(error)[str(error).index(UNEQUAL) + len(UNEQUAL) :].strip(" ,").splitlines()[0]
            raise JpqError(
                f"{self.what} has samples of different shapes in one batch ({shapes}). Bring them to one shape in the "
                "Dataset, or give the DataLoader a collate_fn that does."
            ) from error

    def _begin(self, epoch: int) -> None:
        """Set the loader's own random numbers for an epoch."""
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        inner = getattr(batch_sampler, "sampler", None)
        parts: list[Any] = [self.loader, getattr(self.loader, "sampler", None), batch_sampler, inner]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
            if hasattr(part, "generator") and isinstance(part.generator, torch.Generator | None):
                part.generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))

    def _batch_sizes(self) -> list[int]:
        if self._sizes is None:
            known = self._known_sizes()
            self._sizes = known if known is not None else [_samples(x) for x, _ in self._given(0)]
        return self._sizes

    def _known_sizes(self) -> list[int] | None:
        """Samples of each batch of a DataLoader over a dataset of known length; None where only reading tells."""
        loader = self.loader
        if self.share is not None or not isinstance(loader, DataLoader) or loader.batch_size is None:
            return None
        plain = (RandomSampler, SequentialSampler)
        if isinstance(loader.dataset, IterableDataset) or not isinstance(loader.sampler, plain):
            return None
        full, rest = divmod(len(loader.sampler), loader.batch_size)
        kept = rest > (1 if self.training else 0) and not loader.drop_last
        sizes = [loader.batch_size] * full + [rest] * kept
        if self.count is None:
            return sizes
        limited = _limited(sizes, self.count)
        return limited[:-1] if self.count > 1 == limited[-1] and self._leaves_single_out else limited

    def first(self, count: int) -> LoaderBatches:
        """The first `count` samples alone."""
        part = copy(self)
        part.count, part._sizes = (count if self.count is None else min(count, self.count)), None
        return part

    def limited(self, count: int) -> LoaderBatches:
        """At most `count` samples, drawn from a DataLoader's dataset, else those that come first."""
        if count >= self.size:
            return self
        if _is_indexed(self.loader) and self.count is None and self.share is None:
            rows = fixed_indices(len(self.loader.dataset), 1.0).tolist()  # type: ignore[attr-defined]
            return self._over(rows[:count], self.seed)
        return self.first(count)

    def halves(self) -> tuple[LoaderBatches, LoaderBatches]:
        """Two disjoint halves: of a DataLoader's dataset by sample number, of another iterable every other batch.

        The latter are disjoint in every epoch only where the iterable keeps its order.
        """
        check_halved(self.size)
        loader = self.loader
        if self.count is None and self.share is None and _is_indexed(loader):
            order = fixed_indices(len(loader.dataset), 1.0).tolist()  # type: ignore[attr-defined]
            middle = len(order) // 2
            return self._over(order[:middle], self.seed), self._over(order[middle:], self.seed + 1)
        parts = []
        for number in (0, 1):
            part = copy(self)
            part.share, part._sizes = (number, 2), None
            parts.append(part)
        if not len(parts[1]):
            raise JpqError(
                f"{self.what} gives a single batch, which a bi-level method cannot halve. Give smaller ones."
            )
        return parts[0], parts[1]

    def fixed_part(self, share: float) -> LoaderBatches:
        """A fixed part of the samples: drawn from a DataLoader's dataset, else those that come first."""
        if _is_indexed(self.loader) and self.count is None and self.share is None:
            rows = fixed_indices(len(self.loader.dataset), share).tolist()  # type: ignore[attr-defined]
            return self._over(rows, self.seed, shuffle=False)
        return self.first(max(1, min(self.size, round(share * self.size))))

    def _over(self, rows: list[int], seed: int, shuffle: bool = True) -> LoaderBatches:
        """Batches of some samples of the DataLoader's dataset, made as the DataLoader makes its own."""
        loader: Any = self.loader
        shuffled = shuffle and not isinstance(loader.sampler, SequentialSampler)
        part = with_dataset(loader, Subset(loader.dataset, rows), shuffled, drops_last=shuffle)
        batches = LoaderBatches(part, self.what, device=self.device, seed=seed, training=self.training)
        batches.check_targets = self.check_targets
        return batches


def with_dataset(loader: DataLoader[Any], dataset: Any, shuffle: bool, drops_last: bool = False) -> DataLoader[Any]:
    """A DataLoader like this one over another dataset.

    drops_last: whether an incomplete last batch is left out as in `loader`; it stays where it is the only one.
    """
    batch_size = loader.batch_size or 1
    workers = (
        {
            "multiprocessing_context": loader.multiprocessing_context,
            "prefetch_factor": loader.prefetch_factor,
            "timeout": loader.timeout,
        }
        if loader.num_workers
        else {}
    )
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drops_last and loader.drop_last and len(dataset) >= batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        pin_memory=loader.pin_memory,
        **workers,
    )


def _with_new_workers(loader: Iterable[Any]) -> Iterable[Any]:
    """The loader, or a copy of a DataLoader whose workers would outlive an epoch, which starts them anew in each.

    Workers that persist keep drawing random numbers where the last epoch ended, whatever the seed of the next one, and
    a second reading amid an epoch takes the batches of the first away from it.
    """
    if not isinstance(loader, DataLoader) or not loader.persistent_workers:
        return loader
    renewed = copy(loader)
    vars(renewed).update(persistent_workers=False, _iterator=None)  # a DataLoader lets no code set the first
    return renewed


def _is_indexed(loader: Any) -> bool:
    """Whether a loader is a DataLoader that batches the numbered samples of a dataset by itself."""
    return (
        isinstance(loader, DataLoader)
        and loader.batch_size is not None
        and not isinstance(loader.dataset, IterableDataset)
        and isinstance(loader.sampler, (RandomSampler, SequentialSampler))
    )


def _limited(sizes: list[int], count: int) -> list[int]:
    """Sizes of the batches that hold the first `count` samples."""
    kept = []
    for size in sizes:
        if count <= 0:
            break
        kept.append(min(size, count))
        count -= size
    return kept


def _samples(value: Any) -> int:
    """Samples in a batch: the length of its first tensor."""
    return len(next(leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)))


def _to(value: Any, device: torch.device) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)


def _first_rows(value: Any, count: int) -> Any:
    if _is_listed(value):
        return value[:count]
    return tree_map(lambda leaf: leaf[:count] if isinstance(leaf, Tensor) else leaf, value)


def _checked(batch: Any, what: str, reference: list[Any]) -> tuple[Any, Any]:
    """The pair (inputs, targets) of a batch, compared with the form of the first one, which is put into `reference`."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        shown = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, Sized) else type(batch).__name__
        if isinstance(batch, Mapping):
            shown = f"dict ({', '.join(map(str, batch))})"
        raise JpqError(
            f"{what} gives batches that are a {shown}; each must be a pair (inputs, targets), the inputs a tensor, a "
            "tuple of arguments, or a dict of keywords."
        )
    pair = _as_tensors(batch[0], what), _as_tensors(batch[1], what)
    leaves, structure = tree_flatten(pair)
    if not tree_leaves(pair[0]) or not tree_leaves(pair[1]):
        raise JpqError(f"{what} gives a batch without inputs or without targets.")
    samples = len(leaves[0]) if leaves[0].dim() else 0
    if not samples or any(not leaf.dim() or len(leaf) != samples for leaf in tree_leaves(pair[0])):
        raise JpqError(f"{what} gives a batch whose inputs have no samples, or unequal numbers of them, along dim 0.")
    inputs, arrangement = tree_flatten(pair[0]) if _is_listed(pair[1]) else (leaves, structure)
    sides = len(tree_leaves(pair[0]))
    sizes = [tuple(t.shape[1:]) if i < sides else (t.dim(),) for i, t in enumerate(inputs)]
    form = (str(arrangement), [(t.dtype, *size) for t, size in zip(inputs, sizes, strict=True)])
    if not reference:
        reference.append(form)
    elif form != reference[0]:
        raise JpqError(
            f"{what} gives batches of different structure: the first is {_form_text(reference[0])}, another one "
            f"{_form_text(form)}."
        )
    for leaf in leaves:
        if leaf.is_floating_point() and not bool(leaf.isfinite().all()):
            raise JpqError(f"{what} gives a batch with NaN or infinity. Clean the data.")
    return pair


def _as_tensors(value: Any, what: str) -> Any:
    """A nest of arrays and tensors as tensors: floating point in single precision."""

    def convert(leaf: Any) -> Tensor:
        try:
            tensor = torch.as_tensor(leaf)
        except (TypeError, ValueError, RuntimeError) as error:
            _refuse(what, leaf, error)
        return tensor.float() if tensor.is_floating_point() else tensor

    return tree_map(convert, tuple(value) if isinstance(value, list) else dict(value) if _is_dict(value) else value)


def _is_dict(value: Any) -> bool:
    """Whether a value is a mapping such as the batches of Hugging Face are."""
    return hasattr(value, "keys") and hasattr(value, "__getitem__")


def _refuse(what: str, leaf: Any, error: Exception) -> NoReturn:
    if isinstance(leaf, str | bytes):
        raise JpqError(
            f"{what} gives text ({leaf!r:.40}) in its batches, and models read numbers. Number classes 0, 1, 2 ... "
            "(names, y = numpy.unique(labels, return_inverse=True)), and give texts as token ids."
        ) from error
    raise JpqError(f"{what} gives a {type(leaf).__name__} in its batches, which is no tensor ({error}).") from error


def _is_listed(targets: Any) -> bool:
    """Whether targets are a list with an entry (a dict of boxes ...) for each sample."""
    return isinstance(targets, (tuple, list)) and bool(targets) and _is_dict(targets[0])


def _form_text(form: tuple[str, list[Any]]) -> str:
    """The form of a batch in words: type and sizes of each tensor, beyond the number of samples."""
    return ", ".join(f"{str(dtype).removeprefix('torch.')} {list(sizes)}" for dtype, *sizes in form[1])


def seeded_loader(
    dataset: Any, batch_size: int, training: bool, collate: Callable[[list[Any]], Any] | None = None
) -> DataLoader[Any]:
    """A DataLoader over numbered samples, shuffled where they are trained on."""
    return DataLoader(dataset, batch_size=batch_size, shuffle=training, collate_fn=collate)


def sample_of(batches: SplitBatches, count: int) -> tuple[Any, Any]:
    """(inputs, targets) of the first `count` samples, or of as many as the first batch has."""
    x, y = next(islice(batches.epoch(0), 1))
    return _first_rows(x, count), _first_rows(y, count)


__all__ = ["LoaderBatches", "sample_of", "seeded_loader", "with_dataset"]
