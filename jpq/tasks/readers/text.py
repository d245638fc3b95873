"""Text with a class each, `text:PATH`: train.tsv with test.tsv, and dev.tsv (or .csv) where there is one.

A row holds a sentence and its class, in two columns or under the names "text" (or "sentence") and "label". Sentences
become word numbers, int64 [N, length]: words and punctuation marks in lower case, numbered by a vocabulary of the
training part. 0 is padding at the end, 1 any word that the vocabulary lacks.

For a model of transformers with a tokenizer in its folder they become its token ids, with a mask (jpq.tasks.tokenizer).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jpq.files.paths import expand_home
from jpq.tasks.batches import Preprocessing
from jpq.tasks.datasets import ReadOptions, Source
from jpq.tasks.folder_parts import PARTS
from jpq.tasks.labels import gap_note, unify_numbers
from jpq.tasks.readers import delimited
from jpq.tasks.tokenizer import EncodedTexts, encode_texts
from jpq.types import JpqError

PADDING, UNKNOWN = 0, 1
SPECIAL = ("<padding>", "<unknown>")  # words 0 and 1
LARGEST_VOCABULARY = 20_000  # words
RAREST = 2  # occurrences in the training part that a word of the vocabulary has at least
LONGEST = 64  # words of a sentence; what follows is cut
PATTERN = re.compile(r"\w+|[^\w\s]")

TEXT, LABEL = ("text", "sentence", "review", "content"), ("label", "class", "target", "sentiment")

MOST_SMALL = 10  # classes that few rows may have

Row = tuple[str, str]  # text, label


@dataclass(frozen=True)
class Columns:
    """Where text and class stand in a row."""

    text: int
    label: int
    named: bool  # whether the first row holds names


def read(path: str, options: ReadOptions) -> Source:
    """The sentences of a folder's files, or of one file, which is split.

    Raises JpqError for files without the two columns, for empty ones, and for classes that training lacks.
    """
    files = find_files(path, (".tsv", ".csv"), "text")
    training, columns = read_rows(files["train"])
    parts = {part: training if part == "train" else read_rows(file, columns)[0] for part, file in files.items()}
    return source_of_rows(parts, {part: f"'{file}'" for part, file in files.items()}, options)


def source_of_rows(
    parts: dict[str, list[Row]], names: dict[str, str], options: ReadOptions, classes: Sequence[str] = ()
) -> Source:
    """The data set of texts with labels, by part.

    Args:
        parts: the rows of each.
        names: the parts in words, for errors.
        options: of the readers.
        classes: all names of classes, in the order of their numbers; (): those of the training part, sorted.

    Without names of classes, labels that are equal as numbers ("1" and "1.0") are one class.
    """
    _check_classes(parts["train"], names["train"])
    if not any(split_words(text) for text, _ in parts["train"]):
        raise JpqError(f"{names['train']} has no word in any text, so there is no vocabulary. Check the columns.")
    encoded = _encode_parts({part: [text for text, _ in rows] for part, rows in parts.items()}, options)
    if not classes:
        classes = sorted(set(unify_numbers([label for _, label in parts["train"]])), key=_label_order)
    if set(classes) == set(encoded.class_names):  # the model's outputs are in this order
        classes = encoded.class_names
    labels = {part: unify_numbers([label for _, label in rows], classes) for part, rows in parts.items()}
    pairs, notes = {}, list(encoded.notes)
    for part, rows in parts.items():
        unknown = next((label for label in labels[part] if label not in classes), None)
        if unknown is not None:
            raise JpqError(
                f"{names[part]} has the class '{unknown}', and training has {', '.join(classes[:10])}. Use one set."
            )
        empty = sum(not split_words(text) for text, _ in rows)
        if empty:
            notes.append(f"{empty} of {len(rows)} texts of {names[part]} have no word; the model sees padding alone.")
        pairs[part] = encoded.inputs[part], torch.tensor([classes.index(label) for label in labels[part]])
    notes.extend(filter(None, [gap_note(pairs["train"][1], len(classes), "text")]))
    val, test = pairs.get("val"), pairs.get("test")
    return Source(
        pairs["train"],
        val if test else None,
        test or val,
        len(classes),
        tuple(classes),
        tuple(notes),
        task="text-classification",
        sample_name="text",
        preprocessing=Preprocessing(),
        about=encoded.about,
        arguments={"vocabulary": encoded.tokens, "length": encoded.length},
    )


def _encode_parts(parts: dict[str, list[str]], options: ReadOptions) -> EncodedTexts:
    """Texts by part as the model's own tokenizer has them, where there is one, else by a vocabulary of the training.

    Then ids come without a mask for models that want none.
    """
    if options.text_model:
        encoded = encode_texts(options.text_model, parts, options.text_length)
        if encoded is not None:
            return encoded
    vocabulary = build_vocabulary(parts["train"])
    length = min(LONGEST, max(len(split_words(text)) for text in parts["train"]))
    about = {
        "vocabulary": list(vocabulary),
        "length": length,
        "tokenizer": "lower case, then every match of \\w+|[^\\w\\s]",
        "padding": PADDING,
        "unknown": UNKNOWN,
    }
    inputs = {part: _inputs(encode(texts, vocabulary, length), options) for part, texts in parts.items()}
    note = f"{options.text_model} has no tokenizer, so jpq numbers words itself: weights trained elsewhere do not fit."
    return EncodedTexts(inputs, length, len(vocabulary), about, (note,) if options.text_model else (), ())


def _inputs(ids: Tensor, options: ReadOptions) -> Any:
    """Word numbers, with a mask of those that are no padding for models that want one."""
    if not options.attention_mask:
        return ids
    return {"input_ids": ids, "attention_mask": (ids != PADDING).long()}


def split_words(text: str) -> list[str]:
    """The words and punctuation marks of a text, in lower case."""
    return PATTERN.findall(text.lower())


def build_vocabulary(texts: Sequence[str]) -> tuple[str, ...]:
    """The words of the texts, the most frequent first, after those of `SPECIAL`; equally frequent ones by name.

    Words that occur once are left out, unless all do.
    """
    counts = Counter(word for text in texts for word in split_words(text))
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    frequent = [word for word in ordered if counts[word] >= RAREST] or ordered
    return (*SPECIAL, *frequent[: LARGEST_VOCABULARY - len(SPECIAL)])


def encode(texts: Sequence[str], vocabulary: Sequence[str], length: int) -> Tensor:
    """Word numbers of texts, int64 [N, length]: cut or padded to the length."""
    numbers = {word: number for number, word in enumerate(vocabulary)}
    ids = torch.full((len(texts), length), PADDING)
    for row, text in zip(ids, texts, strict=True):
        words = split_words(text)[:length]
        row[: len(words)] = torch.tensor([numbers.get(word, UNKNOWN) for word in words], dtype=torch.int64)
    return ids


def find_files(path: str, endings: Sequence[str], what: str) -> dict[str, Path]:
    """The files of the parts in a folder (train.tsv ...), or a single file as the training part.

    Raises JpqError where there is none for training.
    """
    place = expand_home(Path(path))
    if place.is_file():
        return {"train": place}
    if not place.is_dir():
        raise JpqError(f"'{place}' is not there. Give the {what} file, or a folder with train{endings[0]}.")
    found: dict[str, Path] = {}
    for part, names in PARTS.items():
        files = [place / f"{name}{ending}" for name in names for ending in endings]
        present = [file for file in files if file.is_file()]
        if len(present) > 1:
            raise JpqError(f"'{present[0].name}' and '{present[1].name}' in '{place}' are both a {part} part.")
        if present:
            found[part] = present[0]
    if "train" not in found:
        raise JpqError(f"There is no train{endings[0]} in '{place}'. Put the training part there.")
    return found


def read_rows(file: Path, like: Columns | None = None) -> tuple[list[Row], Columns]:
    """(text, label) of each row, and the columns they were found in.

    `like` are the columns of the training part, which say whether the file has a header too. Raises JpqError where the
    two columns cannot be told, and for rows of another length than the first.
    """
    rows = delimited.read_rows(file)
    short = next((number for number, row in rows if len(row) < 2), None)
    if short is not None and file.suffix.lower() != ".csv":
        raise JpqError(f"Line {short} of '{file}' has no tab. Write a text, a tab and its class on each line.")
    columns = _find_columns(rows[0][1], file)
    if like is not None and like.named and not columns.named:
        raise JpqError(
            f"'{file}' has the columns {_listed(rows[0][1])}, and the training part names those of text and class. Add "
            "the same header."
        )
    width, found = len(rows[0][1]), rows[columns.named :]
    if not found:
        raise JpqError(f"'{file}' has no rows below its header.")
    for number, row in found:
        if len(row) != width:
            raise JpqError(
                f"The row on line {number} of '{file}' has {len(row)} columns, and the first row {width}. In a .csv "
                "file put texts with commas between quotation marks; tabs separate columns elsewhere."
            )
        if not row[columns.label].strip():
            raise JpqError(f"The row on line {number} of '{file}' has no class. Label it, or remove it.")
    return [(row[columns.text], row[columns.label].strip()) for _, row in found], columns


def _find_columns(first: Sequence[str], file: Path) -> Columns:
    """The columns of text and class: by a header that names both, or one of two; else the first and second of two."""
    header = [name.strip().strip('"').lower() for name in first]
    text, label = (next((header.index(n) for n in names if n in header), None) for names in (TEXT, LABEL))
    if len(header) == 2 and (text is None) != (label is None):  # the other column is the other one
        text, label = (text, 1 - text) if text is not None else (1 - int(label or 0), label)
    if text is not None and label is not None:
        return Columns(text, label, named=True)
    if len(header) == 2:
        return Columns(0, 1, named=False)
    raise JpqError(f"'{file}' has the columns {_listed(first)}; name the two that matter 'text' and 'label'.")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name.strip()[:40] for name in names[:6])


def _check_classes(rows: Sequence[Row], name: str) -> None:
    """Raise JpqError where nearly every row has a class of its own, as when the two columns have changed places."""
    texts, labels = ({row[place] for row in rows} for place in (0, 1))
    if len(labels) <= max(MOST_SMALL, len(rows) // 2):
        return
    swapped = len(texts) < len(labels)
    hint = (
        "the class seems to come before the text: name the columns 'label' and 'text' in a header"
        if swapped
        else "classes must repeat"
    )
    raise JpqError(f"{name} has {len(labels)} classes in {len(rows)} rows; {hint}.")


def _label_order(label: str) -> tuple[int, str]:
    """Numbers by their value, then names."""
    return (int(label) if label.isascii() and label.isdigit() else 10**9, label)
