"""Class labels as people have them, turned into class numbers: int64 [N], counted from 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jpq.types import JpqError

MANY = 1000  # classes, beyond which numbers that hardly occur are taken for ids; ImageNet's 1000 never are
RARE = 100  # the numbers of such classes go beyond so many times the number of classes that occur

RENUMBER = "Number the classes 0, 1, 2 ...: names, y = numpy.unique(labels, return_inverse=True)"


def class_numbers(labels: Any, what: str) -> Tensor:
    """The labels as int64 `[N]` on the CPU.

    Args:
        labels: tensor, array, or list of numbers, `[N]` or `[N, 1]`: whole numbers of any type, also as floats, and
            booleans (False is class 0).
        what: the data in words, for errors.

    Raises JpqError, with a way to mend them, for labels of other kinds: one-hot rows, text, None, fractions, negative
    numbers, and ids in place of class numbers.
    """
    values = _as_array(labels, what)
    values = _as_column(values, what)
    if values.dtype.kind == "f":
        values = _whole_numbers(values, what)
    if values.dtype.kind not in "biu":
        raise JpqError(f"{what} has labels y of type {values.dtype}. {RENUMBER}.")
    if len(values) and values.min() < 0:
        raise JpqError(f"{what} has label {int(values.min())}; labels count from 0. {RENUMBER}.")
    if len(values) and int(values.max()) > 2**31:  # also numbers that int64 has no place for
        raise _id_error(what, int(values.max()), len(np.unique(values)))
    return torch.from_numpy(values.astype(np.int64))


def count_classes(labels: Tensor, what: str) -> int:
    """Number of classes of training labels: the largest number + 1. Raises JpqError for ids of few classes."""
    classes, present = int(labels.max()) + 1, len(labels.unique())
    if classes > MANY and classes > RARE * present:
        raise _id_error(what, classes - 1, present)
    return classes


def unify_numbers(labels: Sequence[str], names: Sequence[str] = ()) -> list[str]:
    """Written labels, with those that are equal as numbers ("1" and "1.0") in one spelling: one class.

    Args:
        labels: of one part.
        names: the classes that are known already, whose spelling counts; else it is the shortest among the labels.

    Where one of the names, or without these one of the labels, is no number, all stay as they are.
    """
    kinds = names or sorted(set(labels), key=lambda label: (len(label), label))
    spellings: dict[Decimal, str] = {}
    for kind in kinds:
        number = _written_number(kind)
        if number is None:
            return list(labels)
        spellings.setdefault(number, kind)
    numbers = {label: _written_number(label) for label in set(labels)}
    return [label if (n := numbers[label]) is None else spellings.get(n, label) for label in labels]


def _written_number(label: str) -> Decimal | None:
    """The finite number that a label is, with all its digits; None for other text."""
    try:
        number = Decimal(label.strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def gap_note(labels: Tensor, classes: int, sample: str = "image") -> str:
    """A sentence on classes of the training labels that have no sample; "" where all have one."""
    absent = sorted(set(range(classes)) - set(labels.unique().tolist()))
    if not absent:
        return ""
    if absent == [0]:
        return (
            f"No training {sample} is of class 0: the labels seem to count from 1, and the model has {classes} outputs."
        )
    shown = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
    return f"{len(absent)} of {classes} classes have no training {sample} ({shown}): the last class is {classes - 1}."


def _id_error(what: str, largest: int, present: int) -> JpqError:
    return JpqError(
        f"{what} has labels up to {largest:,} and only {present:,} classes: these look like ids. {RENUMBER}."
    )


def _as_array(labels: Any, what: str) -> np.ndarray[Any, Any]:
    """Labels of any container as an array of numbers. Raises JpqError for text, None and lists of mixed shapes."""
    if isinstance(labels, Tensor):
        return _tensor_array(labels)
    if isinstance(labels, Sequence) and not isinstance(labels, str | bytes):
        labels = [_tensor_array(label) if isinstance(label, Tensor) else label for label in labels]
        _check_members(labels, what)
    try:
        values = np.asarray(labels)
    except (ValueError, TypeError, OverflowError) as error:  # rows of different lengths
        raise JpqError(f"{what} has labels y that are not one number per sample. {RENUMBER}.") from error
    if values.dtype.kind == "O":
        members = values.reshape(-1).tolist()
        _check_members(members, what)
        try:
            values = np.asarray(members).reshape(values.shape)
        except (ValueError, TypeError) as error:
            raise JpqError(f"{what} has labels y that are not one number per sample. {RENUMBER}.") from error
    if values.dtype.kind in "US":
        raise _text_error(what, values.reshape(-1)[0])
    return values


def _tensor_array(labels: Tensor) -> np.ndarray[Any, Any]:
    labels = labels.detach().cpu()
    return (labels.float() if labels.dtype == torch.bfloat16 else labels).numpy()  # numpy has no bfloat16


def _check_members(members: Iterable[Any], what: str) -> None:
    """Raise JpqError where a label is None or text."""
    for place, label in enumerate(members):
        if label is None:
            raise JpqError(f"{what} has no label (None) for sample {place}. Leave such samples out, or label them.")
        if isinstance(label, str | bytes):
            raise _text_error(what, label)


def _text_error(what: str, label: Any) -> JpqError:
    return JpqError(f"{what} has text as labels ({str(label)[:40]!r}). {RENUMBER}.")


def _as_column(values: np.ndarray[Any, Any], what: str) -> np.ndarray[Any, Any]:
    """One number per sample, `[N]`, of `[N]` or `[N, 1]`. Raises JpqError for one-hot rows and other shapes."""
    if values.ndim == 0:
        raise JpqError(f"{what} has a single label y for all samples; y must be [N].")
    if values.ndim > 1 and values.size == len(values):
        return values.reshape(-1)
    if values.ndim == 1:
        return values
    shape = list(values.shape)
    if values.ndim == 2 and values.dtype.kind in "biuf" and np.isin(values, (0, 1)).all():
        if (values.sum(1) == 1).all():
            raise JpqError(f"{what} has one-hot labels y {shape}. Give class numbers: y.argmax(1).")
        raise JpqError(
            f"{what} has labels y {shape} of several classes at once, and classification takes one class number for "
            "each sample, [N]. Say --task multi-label, and give them as floats."
        )
    if values.ndim == 2 and values.dtype.kind == "f":
        raise JpqError(
            f"{what} has a row of {shape[1]} numbers as each label, y {shape}; y must be [N] class numbers: of scores "
            "or probabilities y.argmax(1)."
        )
    raise JpqError(f"{what} has labels y {shape}; y must be [N], one class number for each sample.")


def _whole_numbers(values: np.ndarray[Any, Any], what: str) -> np.ndarray[Any, Any]:
    """Whole numbers stored as floats, as int64. Raises JpqError for fractions, NaN and infinity."""
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.all():
        place = int(np.flatnonzero(~finite)[0])
        raise JpqError(
            f"{what} has label {values[place]} for sample {place}. Leave out samples that have no label, or label them."
        )
    if (values != np.floor(values)).any():
        fraction = values[values != np.floor(values)][0]
        raise JpqError(
            f"{what} has label {fraction:g}, which is no whole number: y must hold class numbers. For targets that are "
            "real numbers say --task regression."
        )
    if np.abs(values).max(initial=0) > 2**31:
        raise _id_error(what, int(values.max()), len(np.unique(values)))
    return values.astype(np.int64)
