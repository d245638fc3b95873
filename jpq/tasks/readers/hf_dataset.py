"""A data set of Hugging Face's `datasets` on the disk, `hf-dataset:FOLDER`, as its `save_to_disk` writes it.

A split has a column of images (or of texts) and one of labels: "image" or "img", "text" or "sentence", "label" or
"labels". Classes have the numbers of the data set. Splits are train, validation and test; nothing is downloaded. Needs
the package `datasets` (the extra of that name).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jpq.files.paths import expand_home
from jpq.tasks.datasets import ReadOptions, Source, checked_pair, stack_images
from jpq.tasks.folder_parts import PARTS
from jpq.tasks.images import check_bad
from jpq.tasks.labels import count_classes, gap_note
from jpq.tasks.readers.text import LABEL, TEXT, source_of_rows
from jpq.types import JpqError

IMAGE = ("image", "img", "pixel_values")
LABELS = (*LABEL, "labels")  # the second is what models of transformers call them


def read(path: str, options: ReadOptions) -> Source:
    """The splits of a folder.

    Raises JpqError without the package, and for folders without the columns, splits without samples or classes, and
    splits that number their classes differently.
    """
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise JpqError('hf-dataset: needs datasets: python -m pip install "jpq[datasets]".') from error
    folder = expand_home(Path(path))
    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # the package has several classes for a folder that is none of its own
        reason = " ".join(str(error).split())[:120]
        raise JpqError(f"'{folder}' is no data set that save_to_disk wrote ({reason}).") from error
    splits = _splits(loaded)
    if "train" not in splits:
        raise JpqError(f"'{folder}' has the splits {', '.join(loaded)}, and none for training. Name one 'train'.")
    columns = list(splits["train"].column_names)
    label = next((name for name in LABELS if name in columns), None)
    text, image = (next((name for name in names if name in columns), None) for names in (TEXT, IMAGE))
    if label is None or (text is None and image is None):
        raise JpqError(
            f"'{folder}' has the columns {', '.join(columns)}; rename them to 'image' (or 'text') and 'label'."
        )
    whats = {part: f"The {part} split of '{folder}'" for part in splits}
    names = _class_names(splits["train"], label)
    for part, split in splits.items():
        _check_split(split, (image or str(text), label), names, whats[part])
    if image is None:
        rows = {part: _text_rows(split, str(text), label, names, whats[part]) for part, split in splits.items()}
        return source_of_rows(rows, whats, options, names)
    return _images(splits, image, label, whats, options)


def _check_split(split: Any, columns: Sequence[str], names: tuple[str, ...], what: str) -> None:
    """Raise JpqError for a split without samples or one of the columns, or whose classes are not those of training."""
    if not len(split):
        raise JpqError(f"{what} has no samples. Leave it out.")
    missing = [column for column in columns if column not in split.column_names]
    if missing:
        raise JpqError(
            f"{what} has no column '{missing[0]}', as training has: it has {', '.join(split.column_names)}. Add it, or "
            "leave the split out."
        )
    own = _class_names(split, columns[-1])
    if own and own != names:
        raise JpqError(
            f"{what} numbers its classes {', '.join(own[:5])}, and training {', '.join(names[:5]) or 'without names'}: "
            f"bring it to training's by split.align_labels_with_mapping(..., '{columns[-1]}')."
        )


def _text_rows(split: Any, text: str, label: str, names: tuple[str, ...], what: str) -> list[tuple[str, str]]:
    """(text, name of its class) of each sample. Raises JpqError for samples without a text or a class."""
    texts, labels = list(split[text]), list(split[label])
    _check_labelled(labels, names, what)
    if None in texts:
        raise JpqError(f"{what} has no text (None) for sample {texts.index(None)}. Leave such samples out.")
    pairs = zip(texts, labels, strict=True)
    return [(str(words), names[number] if names else str(number)) for words, number in pairs]


def _check_labelled(labels: Sequence[Any], names: tuple[str, ...], what: str) -> None:
    """Raise JpqError for samples without a class, which have None or -1."""
    for place, number in enumerate(labels):
        if number is None or (names and number not in range(len(names))):
            raise JpqError(f"{what} has no class ({number}) for sample {place}. Label such samples, or leave them out.")


def _splits(loaded: Any) -> dict[str, Any]:
    """The splits by part, in Python's own types; a single data set is the training part."""
    if not hasattr(loaded, "keys"):
        return {"train": loaded.with_format(None)}
    return {
        part: loaded[key].with_format(None)
        for part, names in PARTS.items()
        for key in loaded
        if key.casefold() in names
    }


def _class_names(split: Any, label: str) -> tuple[str, ...]:
    """The names that the data set gives its classes; () where it has none."""
    return tuple(getattr(split.features[label], "names", None) or ())


def _images(splits: dict[str, Any], image: str, label: str, whats: dict[str, str], options: ReadOptions) -> Source:
    """Images in memory, with class numbers."""
    names = _class_names(splits["train"], label)
    pairs, notes = {}, []
    for part, split in splits.items():
        images, read, note = _read_images(split, image, options.skip_bad, whats[part])
        labels = list(split[label])
        labels = [labels[n] for n in read]
        _check_labelled(labels, names, whats[part])
        pairs[part] = checked_pair(whats[part], (stack_images(images, whats[part], options.image_size), labels))
        notes.append(note)
    if {pixels.shape[1] for pixels, _ in pairs.values()} == {1, 3}:
        pairs = {part: (pixels.expand(-1, 3, -1, -1).contiguous(), y) for part, (pixels, y) in pairs.items()}
    classes = len(names) or count_classes(pairs["train"][1], whats["train"])
    for part, (pixels, numbers) in pairs.items():
        if pixels.shape[1:] != pairs["train"][0].shape[1:]:
            raise JpqError(f"{whats[part]} has images of another size than training. Use --image-size.")
        if int(numbers.max()) >= classes:
            raise JpqError(f"{whats[part]} has a label beyond the {classes} classes of training.")
    notes.append(gap_note(pairs["train"][1], classes))
    val, test = pairs.get("val"), pairs.get("test")
    return Source(
        pairs["train"], val if test else None, test or val, classes, names, notes=tuple(note for note in notes if note)
    )


def _read_images(split: Any, image: str, skip_bad: bool, what: str) -> tuple[list[Any], list[int], str]:
    """The images of a split, the numbers of their samples, and a note on those that were left out.

    Images are pictures, or arrays with their numbers' own type where the column holds numbers. Raises JpqError for
    those that are missing or cannot be decoded, unless they are to be skipped.
    """
    column = split.select_columns([image])
    images: list[Any] = []
    read: list[int] = []
    bad: list[str] = []
    for number in range(len(column)):
        try:
            value = column[number][image]
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's, for broken files
            bad.append(f"sample {number} ({str(error).partition(' <_io.')[0][:100]})")
            continue
        if value is None:
            bad.append(f"sample {number} (None)")
            continue
        if not isinstance(value, Image.Image):
            value = np.array(column.with_format("numpy")[number][image])
        images.append(value)
        read.append(number)
    try:
        note = check_bad(bad, len(column), skip_bad)
    except JpqError as error:
        raise JpqError(f"{what}: {error}") from error
    return images, read, f"{what}: {note}" if note else ""
