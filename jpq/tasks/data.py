"""Data sets in memory as three splits: train, held-out (steers a run) and test (read once, for the final metric).

`digits` comes with scikit-learn; `mnist`, `fashion-mnist`, `cifar10`, `cifar100` are torchvision's; `folder:PATH` reads
PATH/train/CLASS/*.png or PATH/CLASS/*.png; `module:callable` imports and RUNS the user's own code. Images keep their
stored type (bytes or float32) and are augmented and normalised per batch on their device, by whole-batch tensor
operations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from jpq.files.paths import expand_home, is_windows_path
from jpq.tasks import CLASSIFICATION, datasets, pick_task
from jpq.tasks.base import Task
from jpq.tasks.batches import Augment as Augment
from jpq.tasks.batches import Batches as Batches
from jpq.tasks.batches import (
    Preprocessing,
    SplitBatches,
    column_length,
    select_rows,
    strata,
    stratified,
    take_rows,
)
from jpq.tasks.datasets import ReadOptions, Source
from jpq.tasks.loaders import sample_of
from jpq.tasks.user_loaders import (
    CLASS_TASKS,
    LoaderSource,
    check_targets,
    count_outputs,
    find_loaders,
    guess_task,
    open_loaders,
)
from jpq.types import JpqError, plural, unknown

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of ImageNet's channels


@dataclass(frozen=True)
class Data:
    """A data set for one task, split and on its device."""

    name: str
    train: SplitBatches
    held_out: SplitBatches
    test: SplitBatches
    example: Any  # inputs of a few training samples, for tracing, such as [2, C, H, W]
    classes: int  # of the labels; for other tasks the number of outputs per sample
    shape: tuple[int, ...]  # of a sample's (first) input, such as channels, height, width of an image
    checksum: str  # sha256 over images and labels of the three splits as they are used
    task: Task = CLASSIFICATION
    class_names: tuple[str, ...] = ()  # by class number, where they are known
    notes: tuple[str, ...] = ()  # sentences on what was left out or looks wrong
    about: Mapping[str, Any] = field(default_factory=dict)  # facts on inputs and targets, for records and files
    arguments: Mapping[str, int] = field(default_factory=dict)  # what a model may want to know: vocabulary, length
    read_as: str = ""  # one sample, in the words of the reader: "row" of a table; "": by the form of the inputs

    @property
    def sample_name(self) -> str:
        """One sample, in words: as the user's own task says, else the reader of the data, else the form of the inputs.

        Images have four dims and sequences three, the batch included.
        """
        owner = next(kind for kind in type(self.task).__mro__ if "sample_name" in vars(kind))
        if not owner.__module__.startswith("jpq."):
            return self.task.sample_name
        if self.read_as or self.task.sample_name == "text":
            return self.read_as or "text"
        return {4: "image", 3: "sequence"}.get(tree_leaves(self.example)[0].dim(), "sample")

    @property
    def sample_names(self) -> str:
        """Several samples, in words."""
        return plural(self.sample_name)

    @property
    def chance_score(self) -> float | None:
        """Score of a model that knows nothing; None where it is unknown."""
        return self.task.score(self.task.chance(self.classes)) if self.task.knows_chance else None


PREPROCESSING = {
    "digits": Preprocessing((0.0,), (1.0,), Augment(pad=1)),
    "mnist": Preprocessing((0.1307,), (0.3081,), Augment(pad=2)),
    "fashion-mnist": Preprocessing((0.2860,), (0.3530,), Augment(pad=2, flip=True)),
    "cifar10": Preprocessing(*IMAGENET, Augment(pad=4, flip=True)),  # what the public ResNet weights expect
    "cifar100": Preprocessing((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), Augment(pad=4, flip=True)),
}


READERS: dict[str, str] = {  # kind:PATH -> module:function that gives a Source of a path and ReadOptions
    "folder": "folders:read",
    "text": "readers.text:read",
    "table": "readers.table:read",
    "sklearn": "readers.table:read_sklearn",
    "series": "readers.series:read",
    "coco": "readers.coco:read",
    "hf-dataset": "readers.hf_dataset:read",
}

FLAGS_OF_KINDS = {  # option of a reader -> kinds of data that have a use for it
    "image_size": ("folder", "coco", "hf-dataset"),
    "skip_bad": ("folder", "coco", "hf-dataset"),
    "void": ("folder",),
    "noise": ("folder",),
    "scale": ("folder",),
    "crop": ("folder",),
    "target_column": ("table", "sklearn"),
}

BATCH_SIZE, HELD_OUT = 64, 0.1  # what the flags are by default


def load(
    name: str,
    root: str | Path = "data",
    *,
    batch_size: int = BATCH_SIZE,
    held_out: float = HELD_OUT,
    augment: bool = True,
    seed: int = 0,
    device: str | torch.device = "cpu",
    limit: int | None = None,
    image_size: Sequence[int] = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    skip_bad: bool = False,
    **options: Any,
) -> Data:
    """Read, split and normalise a data set.

    Args:
        name: digits, mnist, fashion-mnist, cifar10, cifar100, KIND:PATH (READERS) or module:callable.
        root: folder of torchvision's data sets.
        held_out: share of the training samples that steers a run; stratified, drawn by `seed`.
        augment: whether training images are augmented.
        limit: largest number of training samples (held-out ones that are split off included), for quick tries.
        image_size: (height, width), or one number for squares, that the images of a folder, and pictures of the user's
            Dataset, are scaled and cropped to.
        mean: of each channel, where bytes count as 0 to 1; three values turn grey images into colour ones. Default: as
            is usual for the data set.
        std: standard deviation of each channel.
        skip_bad: leave out images of a folder that cannot be read.
        options: other fields of `jpq.tasks.datasets.ReadOptions`.

    Raises JpqError for unknown names, files that cannot be read, and data that are too small.
    """
    if not 0 < held_out < 1:
        raise JpqError(f"The held-out share is {held_out}; it must lie between 0 and 1 (--held-out 0.1).")
    if limit is not None and limit < 3:
        raise JpqError(f"The limit is {limit}; at least 3 training samples are needed (--limit 1000).")
    colour = len(mean) == 3
    reading = ReadOptions(image_size, skip_bad, colour=colour, batch_size=batch_size, seed=seed, **options)
    source = _read_source(name, expand_home(root), reading)
    if isinstance(source, LoaderSource):
        _check_no_normalisation(name, mean, std, "gives batches")
        data = from_loaders(name, source, held_out, seed, torch.device(device), limit)
        unused = _unused_flags(name, data.train, batch_size, held_out if "held_out" in source.parts else HELD_OUT)
        return replace(data, notes=(*data.notes, *unused))
    if isinstance(source, Data):
        _check_no_normalisation(name, mean, std, "returns a jpq.tasks.data.Data")
        train = source.train if limit is None else source.train.limited(limit)
        return replace(source, train=train, notes=(*source.notes, *_unused_flags(name, train, batch_size, held_out)))
    if colour:
        source = _with_colour(source)
    _check_classes(name, source.task, source.classes, source.class_names)
    preprocessing = _preprocessing(name, source, mean, std)
    train, held_out_part, test = _split_source(source, held_out, seed, limit)
    sizes = [column_length(part[1]) for part in (train, held_out_part, test)]
    if min(sizes[0] - 1, sizes[1], sizes[2]) < 1:
        raise JpqError(
            f"Data '{name}' is too small: {sizes[0]} training, {sizes[1]} held-out and "
            f"{sizes[2]} test samples are left, and at least 2, 1 and 1 are needed."
        )

    def batches(pair: tuple[Any, Any], augment: Augment | None = None, shuffle: bool = False) -> SplitBatches:
        return source.make(
            *(tree_map(lambda column: column.to(device), part) for part in pair),
            mean=preprocessing.mean,
            std=preprocessing.std,
            batch_size=batch_size,
            augment=augment,
            shuffle=shuffle,
            seed=seed,
        )

    training = batches(train, preprocessing.augment if augment else None, shuffle=True)
    tested = batches(test)
    example = example_inputs(training, tested)
    unused = () if source.held_out is None else _unused_flags(name, training, held_out=held_out)
    return Data(
        name=name,
        train=training,
        held_out=batches(held_out_part),
        test=tested,
        example=example,
        classes=source.classes,
        shape=tuple(tree_leaves(example)[0].shape[1:]),
        checksum=_checksum([train, held_out_part, test], source.about.get("tokenizer_checksum", "")),
        task=pick_task(source.task),
        class_names=source.class_names,
        notes=(*source.notes, *unused),
        about=source.about,
        arguments=source.arguments,
        read_as=source.sample_name,
    )


def without_normalisation(data: Data) -> Data:
    """The data with inputs that are not normalised: bytes as x / 255."""
    train, test = data.train.raw(), data.test.raw()
    example = example_inputs(train, test)
    return replace(data, train=train, held_out=data.held_out.raw(), test=test, example=example)


def example_inputs(training: SplitBatches, tested: SplitBatches) -> Any:
    """Inputs of two samples, of the training split where they are numbered (not augmented), else of the test split."""
    if isinstance(training, Batches):
        rows = torch.arange(2, device=training.labels.device)
        return training.normalise(take_rows(training.images, rows))
    return sample_of(tested.one_size(), 2)[0]


def from_loaders(
    name: str, source: LoaderSource, held_out: float, seed: int, device: torch.device, limit: int | None = None
) -> Data:
    """The data set of a user's own loaders; a held-out part that is missing is split off a DataLoader's dataset."""
    parts = open_loaders(name, source, held_out, seed, device, limit)
    x, y = sample_of(parts["train"], 2)
    task = source.task or guess_task(x, y)
    classes = source.classes or count_outputs(task, parts["train"], f"The train part of '{name}'")
    check_targets(task, classes, parts, name)
    _check_classes(name, task, classes, source.class_names)
    digest = hashlib.sha256()
    for part in parts.values():
        for leaf in tree_leaves(next(iter(part))):
            digest.update(str((tuple(leaf.shape), part.size)).encode())
            digest.update(leaf.contiguous().cpu().numpy().data)
    return Data(
        name=name,
        **parts,
        example=x,
        classes=classes,
        shape=tuple(tree_leaves(x)[0].shape[1:]),
        checksum=digest.hexdigest(),
        task=pick_task(task),
        class_names=tuple(source.class_names),
        notes=tuple(note for note in dict.fromkeys(part.note for part in parts.values()) if note),
        about=source.about,
        arguments=source.arguments,
        read_as="",
    )


def _check_classes(name: str, task: str, classes: int, names: Sequence[str]) -> None:
    """Raise JpqError for a single class, of which nothing can be learnt, and for names of too few classes."""
    if task in CLASS_TASKS and classes < 2:
        raise JpqError(
            f"All training samples of '{name}' are of one class, so there is nothing to tell apart. Add another."
        )
    if task in CLASS_TASKS and 0 < len(names) < classes:
        raise JpqError(f"'{name}' names {len(names)} classes ({', '.join(names[:5])}), and its labels have {classes}.")


def _check_no_normalisation(name: str, mean: Sequence[float], std: Sequence[float], reason: str) -> None:
    if mean or std:
        raise JpqError(f"--mean and --std: '{name}' {reason}, which is normalised by itself. Leave them out.")


def _read_source(name: str, root: Path, options: ReadOptions) -> Source | LoaderSource | Data:
    kind, colon, path = name.partition(":")
    _check_flags_apply(name, options)
    if kind in READERS and path and not is_windows_path(name):
        module, _, function = READERS[kind].partition(":")
        reader: Callable[[str, ReadOptions], Source] = getattr(import_module(f"jpq.tasks.{module}"), function)
        return reader(path, options)
    if is_windows_path(name) or (name not in PREPROCESSING and expand_home(name).is_dir()):
        raise JpqError(f"Unknown data set '{name}'. For a folder of images give folder:{name}.")
    if name == "digits":
        return datasets.digits()
    if name in datasets.TORCHVISION:
        return datasets.torchvision(name, root)
    if not colon or kind in READERS:
        raise unknown("data set", name, [*PREPROCESSING, *(f"{kind}:PATH" for kind in READERS), "module:callable"])
    value = datasets.call_user_code("data", name, datasets.import_callable("data", name))
    if isinstance(value, Data):
        return value
    return find_loaders(name, value, options) or datasets.convert_user_data(name, value, options.image_size)


def _check_flags_apply(name: str, options: ReadOptions) -> None:
    """Raise JpqError for a flag that is given and says nothing of data of this kind."""
    kind, colon, _ = name.partition(":")
    known = colon and not is_windows_path(name)
    if not known and name not in PREPROCESSING:
        return  # an unknown name is refused as such
    for option, kinds in FLAGS_OF_KINDS.items():
        own_code = known and kind not in READERS and option == "image_size"
        if kind in kinds or own_code or getattr(options, option) in (getattr(ReadOptions, option), []):
            continue
        *others, last = [f"{each}:{'FILE.csv' if each == 'table' else 'PATH'}" for each in kinds]
        words = f"{', '.join(others)} and {last}" if others else last
        more = " (and pictures of your own)" if option == "image_size" else ""
        flag = f"--{option.replace('_', '-')}"
        raise JpqError(f"{flag} is for {words}{more}, and the data are '{name}'. Leave it out.")


def _unused_flags(
    name: str, train: SplitBatches, batch_size: int = BATCH_SIZE, held_out: float = HELD_OUT
) -> tuple[str, ...]:
    """Sentences on flags that are given and change nothing; those that are used are left at their defaults."""
    notes = []
    if batch_size not in (BATCH_SIZE, train.batch_size) and (len(train) > 1 or train.batch_size > batch_size):
        notes.append(f"--batch-size {batch_size} is not used: '{name}' makes batches of {train.batch_size} by itself.")
    if held_out != HELD_OUT:
        notes.append(f"--held-out {held_out} is not used: '{name}' has a held-out part of its own.")
    return tuple(notes)


def _with_colour(source: Source) -> Source:
    """The source with grey images repeated to three channels."""

    def colour(pair: Any) -> Any:
        return pair and (pair[0].expand(-1, 3, -1, -1).contiguous(), pair[1])

    images = source.train[0]
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != 1:
        return source
    return replace(source, train=colour(source.train), held_out=colour(source.held_out), test=colour(source.test))


def _preprocessing(name: str, source: Source, mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
    """The preprocessing of a data set, with the mean and standard deviation that were given, if any."""
    usual = source.preprocessing or _usual_preprocessing(name, source.train[0])
    if not mean and not std:
        return usual
    if not usual.mean:
        raise JpqError(f"--mean and --std are for images, and the inputs of '{name}' are none. Leave them out.")
    channels = len(usual.mean)
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


def _split_source(source: Source, held_out: float, seed: int, limit: int | None) -> tuple[Any, Any, Any]:
    """(train, held-out, test) parts of a source; a missing test split is a quarter that does not depend on the seed."""
    train, held_out_part, test = source.train, source.held_out, source.test
    if test is None:
        mask = stratified(strata(train[1]), round(column_length(train[1]) / 4), seed=0)
        train, test = _select(train, ~mask), _select(train, mask)
    if limit is not None and limit < column_length(train[1]):
        train = _select(train, stratified(strata(train[1]), limit, seed=0))
    if held_out_part is None:
        mask = stratified(strata(train[1]), max(1, round(held_out * column_length(train[1]))), seed)
        train, held_out_part = _select(train, ~mask), _select(train, mask)
    return train, held_out_part, test


def _select(pair: tuple[Any, Any], mask: Tensor) -> tuple[Any, Any]:
    return select_rows(pair[0], mask), select_rows(pair[1], mask)


def _checksum(splits: list[tuple[Any, Any]], tokenizer: str) -> str:
    """sha256 over inputs and targets; of images that are read later over their files' names, sizes and times.

    `tokenizer` is the checksum of one that made the inputs, which is part of their identity, or "".
    """
    digest = hashlib.sha256(tokenizer.encode())
    for images, labels in splits:
        digest.update(str(tuple(tree_leaves(images)[0].shape)).encode())
        for column in tree_leaves((images, labels)):
            if isinstance(column, Tensor):
                digest.update(column.contiguous().numpy().data)
            else:
                digest.update(column.fingerprint())
    return digest.hexdigest()
