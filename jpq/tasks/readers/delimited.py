"""Files of rows and columns: .csv with commas, semicolons or tabs and quoted fields, and others with plain tabs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from jpq.types import JpqError

LONGEST_FIELD = 2**30  # characters

SEPARATORS = (",", ";", "\t")  # of a .csv file; the first that its first line has

Numbered = tuple[int, list[str]]  # number of the line that a row begins on, from 1, and its fields


def read_rows(file: Path) -> list[Numbered]:
    """The rows of a file that are not blank, each with its line number.

    Fields of a .csv file may be quoted, and then hold separators and line ends; in other files tabs alone count.
    Raises JpqError for files that are empty, no text in UTF-8, or wrongly quoted.
    """
    text = read_utf8(file)
    if not text.strip():
        raise JpqError(f"'{file}' is empty.")
    if file.suffix.lower() != ".csv":
        lines = enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1)
        return [(number, line.split("\t")) for number, line in lines if line.strip()]
    return list(_quoted_rows(text, file))


def read_utf8(file: Path) -> str:
    """The text of a file in UTF-8, with its line ends as they are. Raises JpqError for other bytes."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JpqError(f"'{file}' is no text in UTF-8 (byte {error.start}). Convert it.") from error


def _quoted_rows(text: str, file: Path) -> Iterator[Numbered]:
    """The rows of a CSV text."""
    first = text.lstrip().splitlines()[0]
    separator = next((sign for sign in SEPARATORS if sign in first), ",")
    allowed = csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    begins = 1
    try:
        for row in reader:
            if any(field.strip() for field in row):
                yield begins, row
            begins = reader.line_num + 1
    except csv.Error as error:
        raise JpqError(
            f"The row that begins on line {begins} of '{file}' is wrongly quoted ({error}). Put the field between "
            "quotation marks, and double those inside it."
        ) from error
    finally:
        csv.field_size_limit(allowed)
