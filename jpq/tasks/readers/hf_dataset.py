"""A data set of Hugging Face's `datasets` on the disk, `hf-dataset:FOLDER`, as its `save_to_disk` writes it.

A split has a column of images (or of texts) and one of labels: "image" or "img", "text" or "sentence", "label". Splits
are train, validation and test; nothing is downloaded. Needs the package `datasets` (the extra of that name).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from jpq.files.paths import expand_home
from jpq.tasks.datasets import ReadOptions, Source, stack_images
from jpq.tasks.folders import PARTS
from jpq.tasks.labels import class_numbers, count_classes
from jpq.tasks.readers.text import LABEL, TEXT, source_of_rows
from jpq.types import JpqError

IMAGE = ("image", "img", "pixel_values")


def read(path: str, options: ReadOptions) -> Source:
    """The splits of a folder. Raises JpqError without the package, and for folders without the columns."""
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
    label = next((name for name in LABEL if name in columns), None)
    text, image = (next((name for name in names if name in columns), None) for names in (TEXT, IMAGE))
    if label is None or (text is None and image is None):
        raise JpqError(
            f"'{folder}' has the columns {', '.join(columns)}; rename them to 'image' (or 'text') and 'label'."
        )
    if image is None:
        names = _class_names(splits["train"], label)
        rows = {
            part: _text_rows(split, str(text), label, names, f"The {part} split of '{folder}'")
            for part, split in splits.items()
        }
        return source_of_rows(rows, {part: f"The {part} split of '{folder}'" for part in splits}, options)
    return _images(splits, image, label, str(folder), options)


def _text_rows(split: Any, text: str, label: str, names: tuple[str, ...], what: str) -> list[tuple[str, str]]:
    """(text, name of its class) of each sample. Raises JpqError for samples without a class, which have None or -1."""
    labels = list(split[label])
    for place, number in enumerate(labels):
        if number is None or (names and number not in range(len(names))):
            raise JpqError(f"{what} has no class ({number}) for sample {place}. Label such samples, or leave them out.")
    pairs = zip(split[text], labels, strict=True)
    return [(str(words), names[number] if names else str(number)) for words, number in pairs]


def _splits(loaded: Any) -> dict[str, Any]:
    """The splits by part; a single data set is the training part."""
    if not hasattr(loaded, "keys"):
        return {"train": loaded}
    return {part: loaded[key] for part, names in PARTS.items() for key in loaded if key.casefold() in names}


def _class_names(split: Any, label: str) -> tuple[str, ...]:
    """The names that the data set gives its classes; () where it has none."""
    return tuple(getattr(split.features[label], "names", None) or ())


def _images(splits: dict[str, Any], image: str, label: str, folder: str, options: ReadOptions) -> Source:
    """Images in memory, with class numbers."""
    pairs = {}
    for part, split in splits.items():
        what = f"The {part} split of '{folder}'"
        pixels = stack_images([split[n][image] for n in range(len(split))], what, options.image_size)
        pairs[part] = pixels, class_numbers(list(split[label]), what)
    names = _class_names(splits["train"], label)
    classes = len(names) or count_classes(pairs["train"][1], f"The train split of '{folder}'")
    for part, (pixels, labels) in pairs.items():
        if pixels.shape[1:] != pairs["train"][0].shape[1:]:
            raise JpqError(
                f"The {part} split of '{folder}' has images of another size than training. Use --image-size."
            )
        if int(torch.as_tensor(labels).max()) >= classes:
            raise JpqError(f"The {part} split of '{folder}' has a label beyond the {classes} classes of training.")
    val, test = pairs.get("val"), pairs.get("test")
    return Source(pairs["train"], val if test else None, test or val, classes, names)
