"""Tables, `table:FILE.csv` with --target-column COLUMN: regression for numbers, classification for classes.

A folder may hold train.csv with test.csv, and val.csv. scikit-learn's bundled tables are `sklearn:NAME`. Columns of
numbers are standardised by the training part; a column of texts becomes one column of 0 and 1 for each of its values
there. Classes that are equal as numbers ("1" and "1.0") are one. The target of a regression is standardised as well, so
R^2 is as it would be without, and errors are in standard deviations (`target_mean` and `target_std` in result.json and
in the file turn outputs back).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jpq.tasks.batches import Preprocessing, select_rows, strata, stratified
from jpq.tasks.datasets import ReadOptions, Source
from jpq.tasks.labels import unify_numbers
from jpq.tasks.readers.delimited import read_rows
from jpq.tasks.readers.text import find_files
from jpq.types import JpqError, unknown

MOST_VALUES = 50  # of a column of texts
MOST_CATEGORIES = 10  # values of a column of texts nearly all of which may be numbers
MOST_CLASSES = 20  # of whole numbers that are taken for classes

DECIMAL_COMMA = re.compile(r"[+-]?\d+(,\d+)?")  # a number, maybe as it is written in half of Europe

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})  # lower case

SKLEARN = ("breast_cancer", "diabetes", "digits", "iris", "wine")  # that scikit-learn brings along

CLASSES = ("classification", "multi-label")


@dataclass(frozen=True)
class Column:
    """A column of inputs: of numbers, or one of 0 and 1 for each value."""

    name: str
    values: tuple[str, ...] = ()  # of a column of texts

    @property
    def names(self) -> list[str]:
        """Names of the inputs that it becomes."""
        return [f"{self.name}={value}" for value in self.values] or [self.name]


def read(path: str, options: ReadOptions) -> Source:
    """The rows of a table. Raises JpqError for missing columns and values, and for texts in columns of numbers."""
    files = find_files(path, (".csv", ".tsv"), "table")
    tables = {part: _read_csv(file) for part, file in files.items()}
    names = list(tables["train"])
    if not options.target_column:
        raise JpqError(
            f"Say which column of '{path}' is to be predicted: --target-column {names[-1]} ({', '.join(names)})."
        )
    if options.target_column not in names:
        raise unknown("column", options.target_column, names)
    columns = [_describe(name, tables["train"][name], path) for name in names if name != options.target_column]
    if not columns:
        raise JpqError(f"'{path}' has no column beside '{options.target_column}'.")
    target = tables["train"][options.target_column]
    if options.task not in CLASSES:
        _check_numbers(options.target_column, target, path)
    target = unify_numbers(target)
    if len(set(target)) < 2:
        raise JpqError(
            f"Column '{options.target_column}' of '{path}' holds '{target[0]}' in every row, so there is nothing to "
            "predict. Name another column, or give other rows."
        )
    classes = _class_names(target, options)
    _check_kinds(options.target_column, target, classes, path)
    parts = {}
    for part, table in tables.items():
        missing = [name for name in names if name not in table]
        if missing:
            raise JpqError(f"'{files[part]}' has no column '{missing[0]}', which the training part has. Add it.")
        inputs = torch.cat([_encode(column, table[column.name], files[part]) for column in columns], 1)
        parts[part] = inputs, _encode_target(options.target_column, table[options.target_column], classes, files[part])
    inputs_names = [name for column in columns for name in column.names]
    return make_source(parts, classes, inputs_names, options.target_column)


def read_sklearn(name: str, options: ReadOptions) -> Source:
    """One of the tables that scikit-learn brings along. Raises JpqError for others, which it would download."""
    if name not in SKLEARN:
        raise unknown("table of scikit-learn that needs no network", name, SKLEARN)
    from sklearn import datasets  # a second to import

    table = getattr(datasets, f"load_{name}")()
    inputs = torch.from_numpy(np.asarray(table.data, dtype=np.float32))
    classes = tuple(map(str, getattr(table, "target_names", ()))) if name != "diabetes" else ()
    kind = torch.int64 if classes else torch.float32
    target = torch.from_numpy(np.asarray(table.target)).to(kind)
    labels = target if classes else target[:, None]
    return make_source(
        {"train": (inputs, labels)}, classes, list(map(str, table.feature_names)), options.target_column or "target"
    )


def make_source(
    parts: Mapping[str, tuple[Tensor, Tensor]], classes: tuple[str, ...], names: Sequence[str], target: str
) -> Source:
    """The data set of a table's parts; a missing test part is a quarter, split off before anything is measured."""
    pairs = dict(parts)
    if "test" not in pairs and "val" in pairs:
        pairs["test"] = pairs.pop("val")
    if "test" not in pairs:
        train = pairs["train"]
        mask = stratified(strata(train[1]), round(len(train[1]) / 4), seed=0)
        pairs["train"], pairs["test"] = (tuple(select_rows(list(train), rows)) for rows in (~mask, mask))
    inputs, labels = pairs["train"]
    if len(labels) < 3:
        raise JpqError(f"The table has {len(labels)} training rows; at least 3 are needed.")
    mean, std = _moments(inputs)
    about: dict[str, object] = {"columns": list(names), "target": target}
    if not classes:
        target_mean, target_std = (float(value) for value in _moments(labels))
        pairs = {part: (x, (y - target_mean) / target_std) for part, (x, y) in pairs.items()}
        about |= {"target_mean": target_mean, "target_std": target_std}
    return Source(
        pairs["train"],
        pairs.get("val"),
        pairs["test"],
        len(classes) or 1,
        classes,
        task="classification" if classes else "regression",
        sample_name="row",
        preprocessing=Preprocessing(tuple(mean.tolist()), tuple(std.tolist())),
        about=about,
    )


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, [C] each; that of a constant column counts as 1."""
    wide = values.double()
    std = wide.std(0, correction=0)
    return wide.mean(0), torch.where(std > 0, std, 1.0)


def _read_csv(file: Path) -> dict[str, list[str]]:
    """The columns of a CSV file by the names in its first row.

    Raises JpqError for rows of another length, columns of equal names, and missing values.
    """
    rows = read_rows(file)
    if len(rows) < 2:
        raise JpqError(f"'{file}' has no rows below the names of its columns.")
    names = [name.strip() for name in rows[0][1]]
    if len(set(names)) < len(names):
        raise JpqError(
            f"'{file}' has two columns of one name ({', '.join(names)}). Rename one; the first row must hold names."
        )
    for number, row in rows[1:]:
        if len(row) != len(names):
            raise JpqError(f"Row {number} of '{file}' has {len(row)} values, and {len(names)} columns have names.")
        empty = next((name for name, v in zip(names, row, strict=True) if v.strip().lower() in MISSING), None)
        if empty is not None:
            raise JpqError(f"Row {number} of '{file}' has no value in column '{empty}'. Fill it in, or remove the row.")
    return {name: [row[i].strip() for _, row in rows[1:]] for i, name in enumerate(names)}


def _numbers(values: Sequence[str]) -> Tensor | None:
    """The values as finite numbers, float32 [N]; None where one is none."""
    try:
        numbers = torch.tensor([float(value) for value in values], dtype=torch.float64).float()
    except ValueError:
        return None
    return numbers if bool(numbers.isfinite().all()) else None


def _check_numbers(name: str, values: Sequence[str], path: str) -> None:
    """Raise JpqError for a column of numbers with a value that is none, or too large; a few values may be texts."""
    kinds = dict.fromkeys(values)
    commas = next((kind for kind in kinds if "," in kind), None)
    if commas is not None and all(DECIMAL_COMMA.fullmatch(kind) for kind in kinds):
        raise JpqError(f"Column '{name}' of '{path}' holds decimal commas, as '{commas}'. Write them as points.")
    odd = [kind for kind in kinds if _numbers([kind]) is None]
    if odd and (all(_is_number(kind) for kind in kinds) or len(odd) < len(kinds) / 5 > MOST_CATEGORIES / 5):
        row = values.index(odd[0]) + 1
        raise JpqError(
            f"Column '{name}' of '{path}' holds numbers, and '{odd[0][:40]}' in row {row} below the names. Correct it, "
            "or remove the row."
        )


def _is_number(value: str) -> bool:
    """Whether a value is written as a number, infinity and NaN among them."""
    try:
        float(value)
    except ValueError:
        return False
    return True


def _describe(name: str, values: Sequence[str], path: str) -> Column:
    if _numbers(values) is not None:
        return Column(name)
    _check_numbers(name, values, path)
    kinds = sorted(set(values))
    if len(kinds) > MOST_VALUES:
        raise JpqError(
            f"Column '{name}' of '{path}' holds {len(kinds)} different texts, such as '{kinds[0]}'. Remove it, or turn "
            "it into numbers."
        )
    return Column(name, tuple(kinds))


def _encode(column: Column, values: Sequence[str], file: Path) -> Tensor:
    """A column as inputs, float32 [N, inputs]."""
    if column.values:
        return torch.tensor([[float(value == kind) for kind in column.values] for value in values])
    numbers = _numbers(values)
    if numbers is None:
        raise JpqError(f"Column '{column.name}' of '{file}' holds texts, and numbers in the training part.")
    return numbers[:, None]


def _class_names(values: Sequence[str], options: ReadOptions) -> tuple[str, ...]:
    """The classes of a target; () for one of real numbers."""
    numbers = _numbers(values)
    kinds = sorted(set(values))
    if options.task in CLASSES or numbers is None:
        return tuple(kinds if numbers is None else sorted(kinds, key=float))
    whole = bool((numbers == numbers.round()).all()) and len(kinds) <= min(MOST_CLASSES, len(values) // 4)
    return tuple(sorted(kinds, key=float)) if whole and options.task != "regression" else ()


def _check_kinds(name: str, values: Sequence[str], classes: tuple[str, ...], path: str) -> None:
    """Raise JpqError for classes of hardly a row each, and for many that are fractions: values that are measured."""
    numbers = _numbers(values)
    fractions = numbers is not None and bool((numbers != numbers.round()).any())
    if len(classes) <= MOST_CLASSES or not (fractions or 2 * len(classes) > len(values)):
        return
    kind, other = ("texts", "") if numbers is None else ("numbers", "For real numbers say --task regression, or n")
    raise JpqError(
        f"Column '{name}' of '{path}' holds {len(classes)} different {kind} in {len(values)} rows, too many to be "
        f"classes. {other or 'N'}ame another column."
    )


def _encode_target(name: str, values: Sequence[str], classes: tuple[str, ...], file: Path) -> Tensor:
    """Class numbers, int64 [N], or real numbers, float32 [N, 1]."""
    if classes:
        values = unify_numbers(values, classes)
        lost = next((value for value in values if value not in classes), None)
        if lost is not None:
            raise JpqError(f"'{file}' has the class '{lost}' in column '{name}', which the training part lacks.")
        return torch.tensor([classes.index(value) for value in values])
    numbers = _numbers(values)
    if numbers is None:
        raise JpqError(f"Column '{name}' of '{file}' holds texts, and numbers in the training part.")
    return numbers[:, None]
