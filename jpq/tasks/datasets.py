"""Where samples come from: scikit-learn, torchvision's files, folders of images, the user's code. All end in memory."""

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

Pair: TypeAlias = tuple[Tensor, Tensor]  # images [N, C, H, W], uint8 or float32; labels [N], int64

TORCHVISION: dict[str, Callable[..., Any]] = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
}


@dataclass(frozen=True)
class Source:
    """A data set as it was stored. A held-out or test part that is None is to be split off the training part."""

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
    """One of torchvision's data sets from its files under `root`, which are downloaded there when they are absent."""
    train, test = (_published(TORCHVISION[name], name, root, part) for part in (True, False))
    pairs = []
    for found in (train, test):
        images = torch.as_tensor(found.data)
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
        pairs.append((images, torch.as_tensor(found.targets, dtype=torch.int64)))
    return Source(pairs[0], None, pairs[1], len(train.classes))


def _published(kind: Callable[..., Any], name: str, root: Path, train: bool) -> Any:
    """torchvision's reader: on the files, on the packed files (the folder may be read-only), after a download."""
    try:
        return kind(root, train=train, download=False)
    except RuntimeError:  # the files are not there, or are not the published ones
        pass
    except Exception as error:
        raise JpqError(
            f"The files of '{name}' in '{root}' are damaged: {error}. Delete them to have them anew."
        ) from error
    packed = [(root / kind.__name__ / "raw" / file, md5) for file, md5 in getattr(kind, "resources", [])]
    if packed and all(check_integrity(file, md5) for file, md5 in packed):
        with TemporaryDirectory() as folder:
            unpacked = Path(folder, kind.__name__, "raw")
            unpacked.mkdir(parents=True)
            for file, _ in packed:
                extract_archive(file, unpacked)
            return kind(folder, train=train, download=False)
    try:
        return kind(root, train=train, download=True)
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise JpqError(
            f"Data '{name}' is not in the folder '{root}' and could not be downloaded ({reason}). "
            "Give the folder that holds it with --data-root."
        ) from error


def folder(path: Path) -> Source:
    """PATH/train/CLASS/*.png, PATH/test likewise; PATH/val is held out, or is the test where there is no PATH/test."""
    if not (path / "train").is_dir():
        raise JpqError(f"There is no folder '{path / 'train'}'; images are read from PATH/train/CLASS/*.png.")
    classes = sorted(p.name for p in (path / "train").iterdir() if p.is_dir() and not p.name.startswith("."))
    parts = [path / part for part in ("train", "val", "test") if (path / part).is_dir()]
    files = {part: _labelled(part, classes) for part in parts}
    every = _pixels([file for part in parts for file, _ in files[part]])
    pairs = {}
    for part, images in zip(parts, every.split([len(files[part]) for part in parts]), strict=True):
        pairs[part.name] = images, torch.tensor([label for _, label in files[part]])
    val, test = pairs.get("val"), pairs.get("test")
    held_out, test = (val, test) if test else (None, val)
    return Source(pairs["train"], held_out, test, len(classes))


def _labelled(part: Path, classes: list[str]) -> list[tuple[Path, int]]:
    found = []
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
        found += [(image, classes.index(entry.name)) for image in images]
    if not found:
        raise JpqError(f"The folder '{part}' holds no class folders with images; they are read from CLASS/*.png.")
    return found


def _pixels(files: list[Path]) -> Tensor:
    """All images as bytes, [N, 3, H, W], or [N, 1, H, W] when every one is grey."""
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
    every = torch.stack(images)
    return every[:, :1].contiguous() if grey else every


def converted(name: str, made: Any) -> Source:
    """What a user's callable returned, (train, test) or (train, held out, test), each a Dataset or a pair (x, y)."""
    if not isinstance(made, tuple | list) or len(made) not in (2, 3) or any(isinstance(m, Tensor) for m in made):
        raise JpqError(
            f"Data '{name}' returned {_kind(made)}; it must return a jpq.tasks.data.Data, or (train, test), or "
            "(train, held_out, test), each a torch Dataset or a pair of tensors (x, y)."
        )
    named = dict(zip(("train", "test") if len(made) == 2 else ("train", "held-out", "test"), made, strict=True))
    pairs = {part: _checked(f"The {part} part of '{name}'", _pair(name, part, given)) for part, given in named.items()}
    classes = int(pairs["train"][1].max()) + 1
    for part, (images, labels) in pairs.items():
        if images.shape[1:] != pairs["train"][0].shape[1:] or images.dtype != pairs["train"][0].dtype:
            raise JpqError(f"The {part} part of '{name}' has images of another shape or type than its train part.")
        if labels.max() >= classes:
            raise JpqError(
                f"The {part} part of '{name}' has label {labels.max()}; training labels end at {classes - 1}."
            )
    return Source(pairs["train"], pairs.get("held-out"), pairs["test"], classes)


def _kind(made: Any) -> str:
    return f"({', '.join(type(m).__name__ for m in made)})" if isinstance(made, tuple | list) else type(made).__name__


def _pair(name: str, part: str, given: Any) -> tuple[Any, Any]:
    if isinstance(given, tuple | list) and len(given) == 2:
        return given[0], given[1]
    if not (hasattr(given, "__getitem__") and hasattr(given, "__len__")) or isinstance(given, tuple | list | Tensor):
        raise JpqError(
            f"The {part} part of '{name}' is {_kind(given)}; it must be a pair of tensors (x, y), "
            "or a Dataset with a length and samples (image, label)."
        )
    samples = [given[i] for i in range(len(given))]
    if not samples or any(not isinstance(sample, Sequence) or len(sample) != 2 for sample in samples):
        raise JpqError(f"The {part} part of '{name}' is empty, or its samples are not pairs (image, label).")
    images = [pil_to_tensor(x) if isinstance(x, Image.Image) else torch.as_tensor(x) for x, _ in samples]
    if len({image.shape for image in images}) > 1:
        raise JpqError(f"The images of the {part} part of '{name}' differ in size. Resize them to one size.")
    return torch.stack(images), torch.tensor([int(label) for _, label in samples])


def _checked(what: str, pair: tuple[Any, Any]) -> Pair:
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


def imported(what: str, spec: str) -> Callable[..., Any]:
    """The callable that `module:callable` names. Importing RUNS the module; the current folder is searched first."""
    module, _, attribute = spec.partition(":")
    if not module or not attribute:
        raise JpqError(f"The {what} '{spec}' must be written as module:callable, for example mycode:make.")
    try:
        with _current_folder():
            found: Any = importlib.import_module(module)
    except Exception as error:
        raise JpqError(
            f"Could not import '{module}' for the {what} '{spec}' ({type(error).__name__}: {error}). "
            "Run from the folder that holds it, or install it."
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise unknown(f"callable of '{module}'", attribute, [n for n, v in vars(found).items() if callable(v)])
        found = getattr(found, part)
    if not callable(found) or isinstance(found, torch.nn.Module):
        raise JpqError(f"'{spec}' is a {type(found).__name__}; the {what} needs a function or class that makes one.")
    return found


def call(what: str, spec: str, function: Callable[..., Any], **given: Any) -> Any:
    """Call the user's function; one that wants more than it is given is refused. Its own errors pass through."""
    try:
        inspect.signature(function).bind(**given)
    except TypeError as error:
        raise JpqError(f"The {what} '{spec}' cannot be called: {error}. Give its other parameters defaults.") from error
    except ValueError:  # some built-in callables have no signature
        pass
    return function(**given)


@contextmanager
def _current_folder() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
