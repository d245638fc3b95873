"""Time series, `series:FILE.npz` or `series:FOLDER`: windows [N, channels, time] with a class, or a number, each.

An .npz file holds x_train, y_train, x_test, y_test (and x_val, y_val), or x and y, which are split; x is [N, C, T], or
[N, T] for one channel. A folder holds train.csv and test.csv (or .tsv, or NAME_TRAIN.tsv and NAME_TEST.tsv): on each
line the class, then the values of one channel, as in the UCR archive. Channels are standardised by the training part.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jpq.files.paths import expand_home
from jpq.tasks.batches import Preprocessing
from jpq.tasks.datasets import ReadOptions, Source
from jpq.tasks.readers.delimited import read_utf8
from jpq.types import JpqError

PARTS = ("train", "val", "test")


def read(path: str, options: ReadOptions) -> Source:
    """The windows of a file or folder. Raises JpqError for arrays of wrong shapes, NaN, and classes training lacks."""
    place = expand_home(Path(path))
    if not place.exists():
        raise JpqError(f"'{place}' is not there. Give an .npz file, or a folder with train.csv and test.csv.")
    arrays = _read_folder(place) if place.is_dir() else _read_npz(place)
    pairs = {
        part: (_windows(x, f"x of {part}", path), _labels(y, f"y of {part}", path)) for part, (x, y) in arrays.items()
    }
    shape = pairs["train"][0].shape[1:]
    if not len(pairs["train"][0]) or 0 in shape:
        raise JpqError(f"The train part of '{path}' has x {list(pairs['train'][0].shape)}, which holds nothing.")
    for part, (x, y) in pairs.items():
        if x.shape[1:] != shape or len(x) != len(y) or y.ndim > 2:
            raise JpqError(
                f"The {part} part of '{path}' has x {list(x.shape)} and y {list(y.shape)}; x must be [N, {shape[0]}, "
                f"{shape[1]}] as in training, and y [N]."
            )
    real = options.task == "regression" or _is_real(pairs["train"][1])
    for part, (_, y) in pairs.items():
        columns = pairs["train"][1].size // len(pairs["train"][1])
        if y.size != columns * len(y):
            raise JpqError(f"The {part} part of '{path}' has y {list(y.shape)}, and training {columns} a window.")
        if real and y.dtype.kind in "US":
            raise JpqError(
                f"The {part} part of '{path}' has texts as y, as '{y.flat[0]}', and regression takes numbers."
            )
    names = () if real else tuple(_class_name(label) for label in np.unique(pairs["train"][1]).tolist())
    parts = {
        part: (x, _targets(y, real, pairs["train"][1], f"{part} part of '{path}'")) for part, (x, y) in pairs.items()
    }
    train = parts["train"][0].double()
    mean, std = train.mean((0, 2)), train.std((0, 2), correction=0)
    std = torch.where(std > 0, std, 1.0)
    val, test = parts.get("val"), parts.get("test")
    return Source(
        parts["train"],
        val if test else None,
        test or val,
        parts["train"][1].shape[1] if real else len(names),
        names,
        task="regression" if real else "sequence-classification",
        sample_name="window",
        preprocessing=Preprocessing(tuple(mean.tolist()), tuple(std.tolist())),
    )


def _read_npz(file: Path) -> dict[str, tuple[Any, Any]]:
    """Arrays (x, y) by part."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name.lower(): archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError) as error:
        if str(error).startswith("Object arrays"):
            reason = "holds an array of Python objects. Give all a type of numbers (x.astype(numpy.float32)), and save"
        else:
            reason = "is no .npz file, or only a part of one. Write"
        raise JpqError(
            f"'{file}' {reason} it with numpy.savez(FILE, x_train=x, y_train=y, x_test=..., y_test=...)."
        ) from error
    if {"x", "y"} <= set(arrays):
        return {"train": (arrays["x"], arrays["y"])}
    found = {p: (arrays[f"x_{p}"], arrays[f"y_{p}"]) for p in PARTS if {f"x_{p}", f"y_{p}"} <= set(arrays)}
    if "train" not in found:
        raise JpqError(
            f"'{file}' holds {', '.join(arrays)}; it must hold x and y, or x_train, y_train, x_test, y_test."
        )
    return found


def _read_folder(folder: Path) -> dict[str, tuple[Any, Any]]:
    """Arrays (x, y) by part, from lines of a class and values."""
    found = {}
    for part in PARTS:
        files = sorted(
            file
            for file in folder.iterdir()
            if file.suffix.lower() in (".csv", ".tsv", ".txt") and file.stem.lower().split("_")[-1] == part
        )
        if len(files) > 1:
            raise JpqError(f"'{files[0].name}' and '{files[1].name}' in '{folder}' are both a {part} part. Remove one.")
        if files:
            found[part] = _read_lines(files[0])
    if "train" not in found:
        other = next(
            (file.name for file in sorted(folder.iterdir()) if file.suffix.lower() in (".ts", ".arff", ".npz")), None
        )
        if other is None:
            advice = "Put the training part there."
        elif other.lower().endswith(".npz"):
            advice = f"Name the file instead, as series:{folder / other}."
        else:
            advice = (
                f"'{other}' is of a format that is not read: load it with its own package, and save all parts with "
                "numpy.savez(FILE, x_train=x, y_train=y, x_test=..., y_test=...)."
            )
        raise JpqError(f"There is no train.csv in '{folder}' (or .tsv, or NAME_TRAIN.tsv). {advice}")
    return found


def _read_lines(file: Path) -> tuple[Any, Any]:
    lines = [line.replace(",", " ").split() for line in read_utf8(file).splitlines()]
    rows = [row for row in lines if row]
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or lengths == {1}:
        raise JpqError(f"'{file}' must have lines of one length: a class, then the values of a window.")
    try:
        values = np.array([[float(value) for value in row[1:]] for row in rows])
    except ValueError as error:
        raise JpqError(f"'{file}' holds something that is no number ({error}).") from error
    labels = [row[0] for row in rows]
    try:
        return values, np.array([float(label) for label in labels])
    except ValueError:
        return values, np.array(labels)


def _windows(x: Any, what: str, path: str) -> Tensor:
    """Windows as float32 [N, C, T]."""
    array = np.asarray(x)
    if array.ndim == 2:
        array = array[:, None]
    if array.ndim != 3 or not len(array) or array.dtype.kind not in "fiu":
        raise JpqError(f"{what} in '{path}' is {array.dtype} {list(array.shape)}; it must hold numbers [N, C, T].")
    tensor = torch.from_numpy(array.astype(np.float32))
    if not bool(tensor.isfinite().all()):
        raise JpqError(f"{what} in '{path}' holds NaN or infinity. Fill in or remove those windows.")
    return tensor


def _labels(y: Any, what: str, path: str) -> np.ndarray[Any, Any]:
    """Targets [N] or [N, K]; a column [N, 1] of whole numbers is [N]. Raises JpqError for one-hot rows and the like."""
    array = np.asarray(y)
    if array.ndim == 2 and array.shape[1] == 1 and array.dtype.kind in "biuUS":
        array = array[:, 0]
    if array.ndim not in (1, 2) or array.dtype.kind not in "biufUS":
        raise JpqError(f"{what} in '{path}' is {array.dtype} {list(array.shape)}; it must be [N], or [N, K] numbers.")
    if array.ndim == 2 and array.shape[1] > 1 and np.isin(array, (0, 1)).all() and (array.sum(1) == 1).all():
        raise JpqError(f"{what} in '{path}' has one-hot rows {list(array.shape)}. Give class numbers: y.argmax(1).")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise JpqError(f"{what} in '{path}' holds NaN or infinity. Label those windows, or remove them.")
    return array


def _class_name(label: Any) -> str:
    """A class in words: whole numbers without a decimal point."""
    return str(int(label) if isinstance(label, float) and label.is_integer() else label)


def _is_real(y: np.ndarray[Any, Any]) -> bool:
    """Whether targets are real numbers."""
    return y.ndim == 2 or (y.dtype.kind == "f" and bool((y != np.round(y)).any()))


def _targets(y: np.ndarray[Any, Any], real: bool, train: np.ndarray[Any, Any], what: str) -> Tensor:
    """Real numbers, float32 [N, K], or places among the classes of the training part, int64 [N]."""
    if real:
        return torch.from_numpy(y.astype(np.float32).reshape(len(y), -1))
    classes = np.unique(train)
    lost = np.setdiff1d(y, classes)
    if len(lost):
        raise JpqError(f"The {what} has the class {lost[0]}, which the training part lacks.")
    return torch.from_numpy(np.searchsorted(classes, y.reshape(-1)).astype(np.int64))
