"""Readers of data sets: scikit-learn, torchvision's files, the user's code; all end in memory."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, extract_archive

from jpq.files.paths import is_windows_path
from jpq.tasks.batches import Batches, Preprocessing, SplitBatches
from jpq.tasks.images import GREY, image_bytes
from jpq.tasks.labels import class_numbers, count_classes, gap_note
from jpq.types import JpqError, unknown

Pair: TypeAlias = tuple[Tensor, Tensor]  # images [N, C, H, W], uint8 or float32; labels [N], int64 for classes

TORCHVISION: dict[str, Callable[..., Any]] = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
}


@dataclass(frozen=True)
class ReadOptions:
    """Settings of the readers; each takes those that are its own."""

    image_size: Sequence[int] = ()  # (height, width), or one number for squares
    skip_bad: bool = False  # leave out images that cannot be read
    cache: str = "auto"  # where decoded images are kept: auto, memory, disk, none
    colour: bool = False  # grey images become colour ones
    task: str = ""  # name of the task; "": what the data say
    void: int = 255  # class of pixels that have none
    noise: float = 0.0  # standard deviation of added noise, of 255
    scale: int = 1  # factor by which inputs are smaller than targets
    crop: Sequence[int] = ()  # (height, width), or one number for squares, of training crops
    target_column: str = ""  # column of a table
    attention_mask: bool = False  # texts come with a mask, as models of transformers want them
    text_model: str = ""  # hf:FOLDER whose tokenizer numbers the words of texts; "": jpq does
    text_length: int = 0  # tokens that texts are cut or padded to; 0: by the texts
    batch_size: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Source:
    """A data set as it is stored; a held-out or test part that is None is split off the training part later."""

    train: tuple[Any, Any]  # columns of inputs and targets (jpq.tasks.batches)
    held_out: tuple[Any, Any] | None
    test: tuple[Any, Any] | None
    classes: int
    class_names: tuple[str, ...] = ()  # by class number, where they are known
    notes: tuple[str, ...] = ()  # sentences on what was left out or looks wrong
    task: str = "classification"  # name in TASKS
    sample_name: str = ""  # one sample, in words; "": by the form of the inputs
    preprocessing: Preprocessing | None = None  # None: by the name of the data set
    about: Mapping[str, Any] = field(default_factory=dict)  # facts on inputs and targets, for records and files
    arguments: Mapping[str, int] = field(default_factory=dict)  # what a model may want to know: vocabulary, length
    make: Callable[..., SplitBatches] = Batches  # (inputs, targets, **settings) -> batches


def digits() -> Source:
    """scikit-learn's 1,797 digits of 8x8 pixels, in [0, 1]; nothing is downloaded."""
    from sklearn.datasets import load_digits  # a second to import, and only this data set needs it

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().div(16).view(-1, 1, 8, 8)
    return Source((pixels, torch.from_numpy(labels).long()), None, None, 10)


def torchvision(name: str, root: Path) -> Source:
    """Read one of torchvision's data sets from its files under `root`, downloaded there when absent."""
    train, test = (_open_torchvision(TORCHVISION[name], name, root, part) for part in (True, False))
    pairs = []
    for part in (train, test):
        images = torch.as_tensor(part.data)
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
        pairs.append((images, torch.as_tensor(part.targets, dtype=torch.int64)))
    return Source(pairs[0], None, pairs[1], len(train.classes), tuple(map(str, train.classes)))


def _open_torchvision(reader: Callable[..., Any], name: str, root: Path, train: bool) -> Any:
    """Open one part of a torchvision data set, from its files, its archives (`root` may be read-only) or a download."""
    try:
        return reader(root, train=train, download=False)
    except RuntimeError:  # the files are not there, or are not the published ones
        pass
    except Exception as error:
        raise JpqError(
            f"The files of '{name}' in '{root}' are damaged: {error}. Delete them to have them anew."
        ) from error
    archives = [(root / reader.__name__ / "raw" / file, md5) for file, md5 in getattr(reader, "resources", [])]
    if archives and all(check_integrity(file, md5) for file, md5 in archives):
        with TemporaryDirectory() as folder:
            extracted = Path(folder, reader.__name__, "raw")
            extracted.mkdir(parents=True)
            for file, _ in archives:
                extract_archive(file, extracted)
            return reader(folder, train=train, download=False)
    try:
        return reader(root, train=train, download=True)
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise JpqError(
            f"Data '{name}' is not in the folder '{root}' and could not be downloaded ({reason}). "
            "Give the folder that holds it with --data-root."
        ) from error


MOST_SHOWN = 5  # members of a value whose types a sentence names


def convert_user_data(name: str, parts: Any, size: Sequence[int] = ()) -> Source:
    """The value of a user's callable, (train, test) or (train, held out, test), each a Dataset or a pair (x, y).

    `size` is what pictures (PIL images) of a Dataset are scaled and cropped to; () leaves them.
    """
    if not isinstance(parts, tuple | list) or len(parts) not in (2, 3) or any(isinstance(p, Tensor) for p in parts):
        raise JpqError(
            f"Data '{name}' returned {_type_text(parts)}; it must return a jpq.tasks.data.Data, or (train, test), or "
            "(train, held_out, test), each a torch Dataset or a pair of tensors (x, y)."
        )
    named = dict(zip(("train", "test") if len(parts) == 2 else ("train", "held-out", "test"), parts, strict=True))
    pairs = {
        part: checked_pair(f"The {part} part of '{name}'", _as_pair(name, part, samples, size))
        for part, samples in named.items()
    }
    classes = count_classes(pairs["train"][1], f"The train part of '{name}'")
    for part, (images, labels) in pairs.items():
        if images.shape[1:] != pairs["train"][0].shape[1:] or images.dtype != pairs["train"][0].dtype:
            raise JpqError(f"The {part} part of '{name}' has images of another shape or type than its train part.")
        if labels.max() >= classes:
            raise JpqError(
                f"The {part} part of '{name}' has label {labels.max()}; training labels end at {classes - 1}."
            )
    note = gap_note(pairs["train"][1], classes)
    notes = (note,) if note else ()
    return Source(pairs["train"], pairs.get("held-out"), pairs["test"], classes, notes=notes)


def _type_text(value: Any) -> str:
    """The type of a value, of a tuple or list those of its members."""
    if isinstance(value, tuple | list):
        more = ", ..." if len(value) > MOST_SHOWN else ""
        return f"({', '.join(type(member).__name__ for member in value[:MOST_SHOWN])}{more})"
    return type(value).__name__


def _as_pair(name: str, part: str, data: Any, size: Sequence[int]) -> tuple[Any, Any]:
    """(images, labels) of a pair or of a Dataset, which is read whole."""
    if isinstance(data, tuple | list) and len(data) == 2:
        return data[0], data[1]
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or isinstance(data, tuple | list | Tensor):
        raise JpqError(
            f"The {part} part of '{name}' is {_type_text(data)}; it must be a pair of tensors (x, y), "
            "or a Dataset with a length and samples (image, label)."
        )
    samples = [data[i] for i in range(len(data))]
    if not samples or any(not isinstance(sample, Sequence) or len(sample) != 2 for sample in samples):
        raise JpqError(f"The {part} part of '{name}' is empty, or its samples are not pairs (image, label).")
    what = f"The {part} part of '{name}'"
    return stack_images([x for x, _ in samples], what, size), [label for _, label in samples]


def stack_images(images: Sequence[Any], what: str, size: Sequence[int]) -> Tensor:
    """The images of a Dataset, tensors, arrays or pictures, as one tensor. Raises JpqError where sizes differ.

    Among pictures of which some have colour, grey ones get three channels.
    """
    tensors: list[Tensor] = []
    for place, image in enumerate(images):
        try:
            tensors.append(picture_bytes(image, size) if isinstance(image, Image.Image) else torch.as_tensor(image))
        except (TypeError, ValueError, RuntimeError) as error:
            raise JpqError(
                f"{what} has an image, sample {place}, that is no tensor, array or picture ({type(image).__name__}: "
                f"{error}). Give one [C, H, W]."
            ) from error
    pictures = all(isinstance(image, Image.Image) for image in images)
    if pictures and len({tensor.shape[0] for tensor in tensors}) > 1:
        tensors = [tensor.expand(3, -1, -1) for tensor in tensors]
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) > 1:
        advice = "with --image-size 224 (or another number of pixels)" if pictures else "in the Dataset"
        shown = " and ".join(str(list(shape)) for shape in sorted(shapes)[:2])
        raise JpqError(f"{what} has images that differ in size, such as {shown}. Resize them to one size {advice}.")
    return torch.stack(tensors)


def picture_bytes(picture: Image.Image, size: Sequence[int]) -> Tensor:
    """A picture of a Dataset as bytes, [3, H, W], or [1, H, W] where it is stored as grey."""
    pixels = image_bytes(picture, size)
    return pixels[:1] if picture.mode in GREY else pixels


def checked_pair(what: str, pair: tuple[Any, Any]) -> Pair:
    """(images, labels) as tensors on the CPU. Raises JpqError for other shapes or types, NaN, or wrong labels."""
    try:
        images = torch.as_tensor(pair[0])
    except (TypeError, ValueError, RuntimeError) as error:
        raise JpqError(f"{what} cannot be turned into tensors: {error}. Give tensors or arrays (x, y).") from error
    labels = class_numbers(pair[1], what)
    if images.dim() != 4 or len(images) != len(labels) or not len(labels):
        grey = " Grey images without channels need x[:, None]." if images.dim() == 3 else ""
        raise JpqError(
            f"{what} has x {list(images.shape)} and y {list(labels.shape)}; x must be [N, C, H, W] and y [N] class "
            f"numbers, N at least 1.{grey}"
        )
    _check_channels_first(what, images)
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise JpqError(f"{what} has x of {images.dtype}; give uint8 (0..255, divided by 255 here) or floats.")
    images = images.detach().cpu().contiguous()
    images = images if images.dtype == torch.uint8 else images.float()
    if images.is_floating_point() and not images.isfinite().all():
        raise JpqError(f"{what} has NaN or infinity in x. Clean it.")
    return images, labels


def _check_channels_first(what: str, images: Tensor) -> None:
    """Raise JpqError for images that have their channels last, [N, H, W, C], as files and arrays usually do.

    Signals of many channels and width 1, [N, C, length, 1], pass unless they are bytes or square.
    """
    _, channels, height, width = images.shape
    last = width in (3, 4) or (width == 1 and (images.dtype == torch.uint8 or channels == height))
    if last and min(channels, height) > max(4, width):
        order = "x.permute(0, 3, 1, 2) of a tensor, x.transpose(0, 3, 1, 2) of an array"
        raise JpqError(
            f"{what} has x {list(images.shape)}, which looks like [N, H, W, C]; x must be [N, C, H, W]: give {order}. "
            f"If it really has {channels} channels, return a jpq.tasks.data.Data."
        )


def import_callable(what: str, spec: str) -> Callable[..., Any]:
    """The callable that `module:callable` names. Importing RUNS the module; the current folder is searched first."""
    module, _, attribute = spec.partition(":")
    if is_windows_path(spec) or not module or not attribute:
        raise JpqError(f"The {what} '{spec}' must be written as module:callable, for example mycode:make.")
    try:
        with _current_folder_on_path():
            value: Any = importlib.import_module(module)
    except Exception as error:
        raise JpqError(
            f"Could not import '{module}' for the {what} '{spec}' ({type(error).__name__}: {error}). "
            "Run from the folder that holds it, or install it."
        ) from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise unknown(f"callable of '{module}'", attribute, [n for n, v in vars(value).items() if callable(v)])
        value = getattr(value, part)
    if not callable(value) or isinstance(value, torch.nn.Module):
        raise JpqError(f"'{spec}' is a {type(value).__name__}; the {what} needs a function or class that makes one.")
    return value


def call_user_code(what: str, spec: str, function: Callable[..., Any], **arguments: Any) -> Any:
    """The value of a user's function. Raises JpqError where it needs other arguments; its own errors pass through."""
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise JpqError(f"The {what} '{spec}' cannot be called: {error}. Give its other parameters defaults.") from error
    except ValueError:  # some built-in callables have no signature
        pass
    return function(**arguments)


@contextmanager
def _current_folder_on_path() -> Iterator[None]:
    """A context in which the current folder is searched first for modules."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
