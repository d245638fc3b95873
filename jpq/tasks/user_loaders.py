"""A user's own loaders as a data set: which value of a callable they are, and what their first batches say.

A callable may return (train, test), (train, held_out, test), or a dict of these that may also hold `task`, `classes`,
`class_names`, `vocabulary` and `about`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from jpq.tasks import CLASSIFICATION, TASKS
from jpq.tasks.batches import stratified
from jpq.tasks.datasets import ReadOptions, picture_bytes
from jpq.tasks.detection import check_inside
from jpq.tasks.labels import class_numbers, count_classes
from jpq.tasks.loaders import LoaderBatches, with_dataset
from jpq.types import JpqError, unknown

PARTS = ("train", "held_out", "test")
HELD_OUT_NAMES = dict.fromkeys(("val", "valid", "validation", "dev"), "held_out")  # other keys of that part
FACTS = ("task", "classes", "class_names", "vocabulary", "about")
CLASS_TASKS = ("classification", "text-classification", "sequence-classification", "segmentation")


@dataclass(frozen=True)
class LoaderSource:
    """The loaders of a user's data set, and what it says of itself."""

    parts: Mapping[str, Any]  # by PARTS
    task: str = ""
    classes: int = 0
    class_names: Sequence[str] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, int] = field(default_factory=dict)


def find_loaders(name: str, value: Any, options: ReadOptions) -> LoaderSource | None:
    """The loaders in the value of a user's callable; None where it is no dict and all parts are samples in memory.

    Raises JpqError for a dict with other keys, and one without a training or test part.
    """
    if isinstance(value, Mapping):
        return _from_dict(name, value, options)
    if not isinstance(value, (tuple, list)) or len(value) not in (2, 3):
        return None
    parts = dict(zip(("train", "test") if len(value) == 2 else PARTS, value, strict=True))
    _refuse_dicts(name, parts)
    lazy = options.cache in ("none", "disk")
    if not any(_is_loader(part) or (lazy and _is_dataset(part)) for part in parts.values()) and (
        not all(_is_pair(part) or _is_dataset(part) for part in parts.values())
        or _are_images_with_classes(parts["train"], options.task)
    ):
        return None
    return LoaderSource({key: _as_loader(name, part, key, options) for key, part in parts.items()}, options.task)


def _from_dict(name: str, value: Mapping[str, Any], options: ReadOptions) -> LoaderSource:
    for key in value:
        if key not in (*PARTS, *HELD_OUT_NAMES, *FACTS):
            raise unknown(f"key in the dict of '{name}'", str(key), (*PARTS, *FACTS))
    held_out = [key for key in value if HELD_OUT_NAMES.get(key, key) == "held_out"]
    if len(held_out) > 1:
        named = " and ".join(f"'{key}'" for key in held_out)
        raise JpqError(f"The dict of '{name}' has {named}, which are names of one part. Give one of them.")
    value = {HELD_OUT_NAMES.get(key, key): part for key, part in value.items()}
    missing = [key for key in ("train", "test") if value.get(key) is None]
    if missing:
        raise JpqError(f"The dict of '{name}' has no '{missing[0]}'. Give loaders for train and test, and held_out.")
    _refuse_dicts(name, {key: value[key] for key in PARTS if key in value})
    parts = {key: _as_loader(name, value[key], key, options) for key in PARTS if value.get(key) is not None}
    words = {"vocabulary": int(value["vocabulary"])} if "vocabulary" in value else {}
    return LoaderSource(
        parts,
        options.task or str(value.get("task", "")),
        int(value.get("classes", 0)),
        tuple(map(str, value.get("class_names", ()))),
        dict(value.get("about", {})),
        words,
    )


def _refuse_dicts(name: str, parts: Mapping[str, Any]) -> None:
    """Raise JpqError for a part that is a dict of tensors, such as {"x": x, "y": y}."""
    for key, part in parts.items():
        if isinstance(part, Mapping) and 0 not in part:
            raise JpqError(
                f"The {key.replace('_', '-')} part of '{name}' is a dict ({', '.join(map(str, part))}); it must be a "
                "pair (x, y), a Dataset or a loader: give the inputs and the targets of the dict as a pair."
            )


def _is_dataset(value: Any) -> bool:
    """Whether a value is a map-style Dataset."""
    return hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, (tuple, list, Tensor))


def _is_loader(value: Any) -> bool:
    """Whether a value gives batches: a DataLoader, a list of pairs, or another iterable that is no Dataset."""
    if isinstance(value, (DataLoader, IterableDataset)):
        return True
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(batch, (tuple, list)) and len(batch) == 2 for batch in value)
    return hasattr(value, "__iter__") and not _is_dataset(value) and not isinstance(value, Tensor)


def _is_pair(value: Any) -> bool:
    """Whether a value is a pair (inputs, targets) of all samples."""
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(hasattr(v, "__getitem__") for v in value)


def _are_images_with_classes(value: Any, task: str) -> bool:
    """Whether samples in memory are images with a class each, as the readers of images take them.

    Of a built-in task that is not classification they are none; else images have three dimensions (bytes also two,
    which lack their channels), and a class is one number. A value without samples, or with samples that are no pairs,
    counts as images, whose reader refuses it.
    """
    if task in TASKS and task != CLASSIFICATION.name:
        return False
    try:
        x, y = (value[0][0], value[1][0]) if _is_pair(value) else value[0]
        is_class = np.ndim(y) < 2
    except (IndexError, TypeError, ValueError, KeyError):
        return True
    if isinstance(x, Image.Image):
        return is_class
    return isinstance(x, (Tensor, np.ndarray)) and is_class and (x.ndim == 3 or (x.ndim == 2 and _is_bytes(x)))


def _is_bytes(x: Any) -> bool:
    """Whether a tensor or array holds bytes."""
    return x.dtype in (torch.uint8, np.uint8)


def _as_loader(name: str, value: Any, part: str, options: ReadOptions) -> Any:
    """A loader as it is; a Dataset, or a pair of tensors, in a DataLoader. Raises JpqError for an empty one."""
    if isinstance(value, IterableDataset):
        return DataLoader(value, batch_size=options.batch_size)
    what = f"The {part.replace('_', '-')} part of '{name}'"
    if isinstance(value, (tuple, list)) and len(value) == 2 and not _is_loader(value):
        value = _PairDataset(value[0], value[1], what)
    if isinstance(value, DataLoader) or not _is_dataset(value):
        return value
    if not len(value):
        raise JpqError(f"{what} is empty. Give at least one sample.")
    samples = _Pictures(value, options.image_size)
    return DataLoader(samples, batch_size=options.batch_size, shuffle=part == "train")


class _PairDataset(torch.utils.data.Dataset[Any]):
    """The samples of a pair (inputs, targets); bytes of images are divided by 255."""

    def __init__(self, inputs: Any, targets: Any, what: str):
        try:
            self.inputs, self.targets = torch.as_tensor(inputs), torch.as_tensor(targets)
        except (TypeError, ValueError, RuntimeError) as error:
            class_numbers(targets, what)  # says more of text and None
            raise JpqError(f"{what} cannot be turned into tensors: {error}. Give tensors or arrays (x, y).") from error
        if not self.targets.dim() or len(self.inputs) != len(self.targets):
            x, y = list(self.inputs.shape), list(self.targets.shape)
            raise JpqError(f"{what} has x {x} and y {y}; both must have a row for each sample.")

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        return tuple(_scaled(column[number]) for column in (self.inputs, self.targets))  # type: ignore[return-value]


def _scaled(sample: Tensor) -> Tensor:
    """An image [C, H, W] of bytes, divided by 255; other tensors as they are."""
    return sample.float() / 255 if sample.dtype == torch.uint8 and sample.dim() == 3 else sample


class _Pictures(torch.utils.data.Dataset[Any]):
    """The samples of a Dataset, pictures (PIL) among them as tensors in [0, 1]."""

    def __init__(self, dataset: Any, size: Sequence[int]):
        self.dataset, self.size = dataset, size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Any:
        return tree_map(self._as_tensor, self.dataset[number])

    def _as_tensor(self, value: Any) -> Any:
        """A picture as a tensor; other values as they are."""
        return picture_bytes(value, self.size) / 255 if isinstance(value, Image.Image) else value


def open_loaders(
    name: str, source: LoaderSource, held_out: float, seed: int, device: torch.device, limit: int | None = None
) -> dict[str, LoaderBatches]:
    """The batches of each part; of training, held-out ones split off included, at most `limit` samples.

    Raises JpqError where held-out samples are missing and cannot be split off.
    """
    loaders = dict(source.parts)
    splits = "held_out" not in loaders
    if splits:
        loaders["train"], loaders["held_out"] = _split_off(name, loaders["train"], held_out, seed)
    opened = {
        part: LoaderBatches(
            loaders[part],
            f"The {part.replace('_', '-')} part of '{name}'",
            device=device,
            seed=seed,
            training=part == "train",
        )
        for part in PARTS
    }
    if limit is not None:
        apart = max(1, round(held_out * limit)) if splits else 0
        opened["train"] = opened["train"].limited(limit - apart)
        if splits:
            opened["held_out"] = opened["held_out"].limited(apart)
    forms = {part: _sample_form(batches.example[0]) for part, batches in opened.items()}
    for part, form in forms.items():
        if form != forms["train"]:
            raise JpqError(
                f"The {part.replace('_', '-')} part of '{name}' has inputs {form}, its train part {forms['train']}. "
                "Give inputs of one shape and type."
            )
    return opened


def _sample_form(inputs: Any) -> str:
    """Type and shape of the inputs of one sample, in words."""
    leaves = tree_leaves(inputs)
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape[1:])}" for t in leaves)


def _split_off(name: str, loader: Any, held_out: float, seed: int) -> tuple[Any, Any]:
    """Loaders of the training and the held-out samples of a DataLoader's dataset."""
    indexed = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if indexed and loader.batch_size is None:
        batches = "come from a batch_sampler" if loader.batch_sampler else "are made by its Dataset (batch_size=None)"
        raise JpqError(
            f"The batches of the train part of '{name}' {batches}, so jpq cannot split off held-out samples beside "
            "them. Return (train, held_out, test)."
        )
    if not indexed:
        raise JpqError(
            f"'{name}' gives no held-out batches, and jpq can split them off only from a DataLoader over a Dataset "
            "with a length. Return (train, held_out, test)."
        )
    if not isinstance(loader.sampler, (RandomSampler, SequentialSampler)):
        raise JpqError(
            f"The sampler of the train part of '{name}', a {type(loader.sampler).__name__}, chooses among the samples, "
            "so jpq cannot split off held-out ones beside it. Return (train, held_out, test)."
        )
    samples = len(loader.dataset)
    mask = stratified(torch.zeros(samples), max(1, round(held_out * samples)), seed)
    kept, apart = (torch.arange(samples)[part].tolist() for part in (~mask, mask))
    if not kept:
        raise JpqError(f"The train part of '{name}' has {samples} samples; at least 2 are needed.")
    shuffled = not isinstance(loader.sampler, SequentialSampler)
    train = with_dataset(loader, Subset(loader.dataset, kept), shuffled, drops_last=True)
    return train, with_dataset(loader, Subset(loader.dataset, apart), False)


def guess_task(inputs: Any, targets: Any) -> str:
    """The name of the task that a batch's inputs and targets look like.

    Raises JpqError where they look like none.
    """
    first = tree_leaves(inputs)[0]
    if not isinstance(targets, Tensor):
        if isinstance(targets, (tuple, list)) and targets and isinstance(targets[0], Mapping):
            return "detection"
        raise JpqError("Targets are no tensor, so their task is unknown: say it with --task.")
    if targets.is_floating_point():
        if targets.dim() == 4:
            return "restoration"
        several = targets.dim() == 2 and targets.shape[1] > 1
        return "multi-label" if several and bool(((targets == 0) | (targets == 1)).all()) else "regression"
    if targets.dim() == 3:
        return "segmentation"
    if not first.is_floating_point() and first.dtype != torch.uint8:
        return "text-classification"
    return "sequence-classification" if first.dim() == 3 else "classification"


def count_outputs(task: str, batches: LoaderBatches, what: str) -> int:
    """Outputs per sample: classes of the training targets (one pass), columns, or channels."""
    if task in CLASS_TASKS:
        numbers = torch.cat([torch.as_tensor(y).flatten().unique() for _, y in batches]).unique()
        if task == "segmentation":
            numbers = numbers[numbers != 255]
        return count_classes(class_numbers(numbers, what), what)
    targets = batches.example[1]
    if task not in TASKS and isinstance(targets, Tensor) and targets.dim() == 1 and not targets.is_floating_point():
        return max(1, 1 + max(int(y.max()) for _, y in batches))  # an own task whose targets are class numbers
    if task == "detection" or not isinstance(targets, Tensor):
        raise JpqError(f"{what}: say the number of classes in a dict, {{'train': ..., 'test': ..., 'classes': 3}}.")
    return 1 if targets.dim() == 1 else int(targets.shape[1])


def check_targets(task: str, classes: int, parts: Mapping[str, LoaderBatches], name: str) -> None:
    """Check all targets, and let each batch that is read later be checked too.

    Raises JpqError where targets of a part are no class numbers, or beyond the training classes.
    """
    if task == "detection":
        _check_boxes(parts, name)
    if task not in CLASS_TASKS or task == "segmentation":
        return
    for part, batches in parts.items():
        what = f"The {part.replace('_', '-')} part of '{name}'"

        def check(targets: Any, what: str = what) -> Tensor:
            numbers = class_numbers(targets, what)  # also of booleans, and of one column
            if int(numbers.max()) >= classes:
                raise JpqError(f"{what} has label {int(numbers.max())}; training labels end at {classes - 1}.")
            return numbers

        batches.check_targets = check
        for _ in batches if part != "train" else ():  # the training part was read when its classes were counted
            pass


def _check_boxes(parts: Mapping[str, LoaderBatches], name: str) -> None:
    """Let the boxes of each batch that is read be checked: they lie in their images."""
    for part, batches in parts.items():
        image = tree_leaves(batches.example[0])[0]
        if image.dim() == 4:
            what, sides = f"The {part.replace('_', '-')} part of '{name}'", tuple(image.shape[2:])
            batches.check_targets = partial(_check_inside, sides=sides, what=what)


def _check_inside(targets: Any, sides: Sequence[int], what: str) -> Any:
    """The targets. Raises JpqError for boxes outside of images of these sides; other forms are refused elsewhere."""
    if all(isinstance(entry, Mapping) and "boxes" in entry for entry in targets):
        check_inside(targets, sides[0], sides[1], what)
    return targets
