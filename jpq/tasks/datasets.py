"""Readers of data sets: scikit-learn, torchvision's files, folders of images, the user's code; all end in memory."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.transforms.functional import pil_to_tensor

from jpq.types import JpqError, unknown

Pair: TypeAlias = tuple[Tensor, Tensor]  # images [N, C, H, W], uint8 or float32; labels [N], int64 for classes

TORCHVISION: dict[str, Callable[..., Any]] = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
}


@dataclass(frozen=True)
class Source:
    """A data set as it is stored; a held-out or test part that is None is split off the training part later."""

    train: Pair
    held_out: Pair | None
    test: Pair | None
    classes: int


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
    return Source(pairs[0], None, pairs[1], len(train.classes))


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


def folder(path: Path) -> Source:
    """A folder of images: PATH/train/CLASS/*.png, likewise PATH/test; PATH/val is held out, or a missing test."""
    if not (path / "train").is_dir():
        raise JpqError(f"There is no folder '{path / 'train'}'; images are read from PATH/train/CLASS/*.png.")
    classes = sorted(p.name for p in (path / "train").iterdir() if p.is_dir() and not p.name.startswith("."))
    parts = [path / part for part in ("train", "val", "test") if (path / part).is_dir()]
    files = {part: _labelled_files(part, classes) for part in parts}
    all_images = _read_images([file for part in parts for file, _ in files[part]])
    pairs = {}
    for part, images in zip(parts, all_images.split([len(files[part]) for part in parts]), strict=True):
        pairs[part.name] = images, torch.tensor([label for _, label in files[part]])
    val, test = pairs.get("val"), pairs.get("test")
    held_out, test = (val, test) if test else (None, val)
    return Source(pairs["train"], held_out, test, len(classes))


def _labelled_files(part: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """(image file, class number) of every image in a part's class folders."""
    labelled = []
    for entry in sorted(p for p in part.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if entry.name not in classes:
            raise JpqError(
                f"Class '{entry.name}' of '{part}' has no folder under '{part.parent / 'train'}'. Add it there."
            )
        images = sorted(p for p in entry.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        if not images:
            raise JpqError(
                f"The class folder '{entry}' holds no image ({', '.join(IMG_EXTENSIONS)}). Fill or remove it."
            )
        labelled += [(image, classes.index(entry.name)) for image in images]
    if not labelled:
        raise JpqError(f"The folder '{part}' holds no class folders with images; they are read from CLASS/*.png.")
    return labelled


def _read_images(files: list[Path]) -> Tensor:
    """All images as bytes, [N, 3, H, W], or [N, 1, H, W] when all are grey. Raises JpqError for unequal sizes."""
    images: list[Tensor] = []
    grey = True
    for file in files:
        try:
            with Image.open(file) as image:
                mode = image.mode
                pixels = pil_to_tensor(image.convert("RGB"))
        except Exception as error:  # Pillow raises nearly anything on a damaged file
            raise JpqError(f"The image '{file}' cannot be read: {error}. Repair or remove it.") from error
        if mode[0] in "IF":  # I, I;16, F: converting these to bytes would clip, not scale
            raise JpqError(f"The image '{file}' has more than 8 bits a channel (mode {mode}). Convert it to 8 bits.")
        if images and pixels.shape != images[0].shape:
            (h, w), (first_h, first_w) = pixels.shape[1:], images[0].shape[1:]
            raise JpqError(
                f"The image '{file}' is {w}x{h} but '{files[0]}' is {first_w}x{first_h}. "
                "All images must have one size: resize them first."
            )
        grey = grey and mode in ("1", "L", "LA")
        images.append(pixels)
    stacked = torch.stack(images)
    return stacked[:, :1].contiguous() if grey else stacked


def convert_user_data(name: str, parts: Any) -> Source:
    """The value of a user's callable, (train, test) or (train, held out, test), each a Dataset or a pair (x, y)."""
    if not isinstance(parts, tuple | list) or len(parts) not in (2, 3) or any(isinstance(p, Tensor) for p in parts):
        raise JpqError(
            f"Data '{name}' returned {_type_text(parts)}; it must return a jpq.tasks.data.Data, or (train, test), or "
            "(train, held_out, test), each a torch Dataset or a pair of tensors (x, y)."
        )
    named = dict(zip(("train", "test") if len(parts) == 2 else ("train", "held-out", "test"), parts, strict=True))
    pairs = {
        part: _checked_pair(f"The {part} part of '{name}'", _as_pair(name, part, samples))
        for part, samples in named.items()
    }
    classes = int(pairs["train"][1].max()) + 1
    for part, (images, labels) in pairs.items():
        if images.shape[1:] != pairs["train"][0].shape[1:] or images.dtype != pairs["train"][0].dtype:
            raise JpqError(f"The {part} part of '{name}' has images of another shape or type than its train part.")
        if labels.max() >= classes:
            raise JpqError(
                f"The {part} part of '{name}' has label {labels.max()}; training labels end at {classes - 1}."
            )
    return Source(pairs["train"], pairs.get("held-out"), pairs["test"], classes)


def _type_text(value: Any) -> str:
    """The type of a value, of a tuple or list those of its members."""
    if isinstance(value, tuple | list):
        return f"({', '.join(type(member).__name__ for member in value)})"
    return type(value).__name__


def _as_pair(name: str, part: str, data: Any) -> tuple[Any, Any]:
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
    images = [pil_to_tensor(x) if isinstance(x, Image.Image) else torch.as_tensor(x) for x, _ in samples]
    if len({image.shape for image in images}) > 1:
        raise JpqError(f"The images of the {part} part of '{name}' differ in size. Resize them to one size.")
    return torch.stack(images), torch.tensor([int(label) for _, label in samples])


def _checked_pair(what: str, pair: tuple[Any, Any]) -> Pair:
    """(images, labels) as tensors on the CPU. Raises JpqError for other shapes or types, NaN, or negative labels."""
    try:
        images, labels = torch.as_tensor(pair[0]), torch.as_tensor(pair[1])
    except (TypeError, ValueError, RuntimeError) as error:
        raise JpqError(f"{what} cannot be turned into tensors: {error}. Give tensors or arrays (x, y).") from error
    integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if images.dim() != 4 or labels.dim() != 1 or len(images) != len(labels) or not len(labels) or not integer:
        raise JpqError(
            f"{what} has x {list(images.shape)} and y {list(labels.shape)} of {labels.dtype}; "
            "x must be [N, C, H, W] and y [N] integers, N at least 1."
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise JpqError(f"{what} has x of {images.dtype}; give uint8 (0..255, divided by 255 here) or floats.")
    images = images.detach().cpu().contiguous()
    images = images if images.dtype == torch.uint8 else images.float()
    if images.is_floating_point() and not images.isfinite().all():
        raise JpqError(f"{what} has NaN or infinity in x. Clean it.")
    if labels.min() < 0:
        raise JpqError(f"{what} has label {int(labels.min())}; labels count from 0.")
    return images, labels.detach().cpu().long()


def import_callable(what: str, spec: str) -> Callable[..., Any]:
    """The callable that `module:callable` names. Importing RUNS the module; the current folder is searched first."""
    module, _, attribute = spec.partition(":")
    if not module or not attribute:
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
