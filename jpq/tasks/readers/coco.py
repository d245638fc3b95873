"""Detection data in COCO's format, `coco:PATH`: images with boxes in JSON files.

| arrangement | example |
|---|---|
| COCO's own | PATH/annotations/instances_train2017.json with the images in PATH/train2017 ... |
| a file in each part | PATH/train/_annotations.coco.json beside the part's images ... |

An image's target is a dict of boxes, float32 [k, 4] as (x1, y1, x2, y2) in pixels of the image as it is used, and
labels, int64 [k], that count from 1 in the order of the categories' ids. Crowds and empty boxes are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jpq.files import untrusted
from jpq.files.paths import expand_home
from jpq.tasks.batches import ListColumn, Preprocessing
from jpq.tasks.datasets import ReadOptions, Source
from jpq.tasks.folder_parts import PARTS
from jpq.tasks.lazy_images import open_images, read_header
from jpq.types import JpqError

LARGEST_JSON = 2**31  # bytes


def read(path: str, options: ReadOptions) -> Source:
    """The images and boxes of a folder.

    Raises JpqError for annotations that are missing or damaged, and for boxes of unknown images or categories.
    """
    folder = expand_home(Path(path))
    found = _find_annotations(folder)
    if "train" not in found:
        raise JpqError(
            f"No annotations for training in '{folder}': they are read from annotations/instances_train*.json, or from "
            "train/_annotations.coco.json."
        )
    records = {part: _read_json(file) for part, (file, _) in found.items()}
    categories = _categories(records["train"], found["train"][0])
    columns, notes = {}, []
    for part, record in records.items():
        _check_same_categories(record, found[part][0], categories)
        entries = _entries(record, found[part], categories)
        if not any(len(target["labels"]) for _, target in entries):
            raise JpqError(f"'{found[part][0]}' has no box, beside crowds and empty ones, so there is nothing to find.")
        if max(float(target["boxes"].max()) for _, target in entries if len(target["labels"])) <= 1:
            raise JpqError(
                f"The boxes in '{found[part][0]}' end at 1 at most, which look like shares of the images. Give x, y, "
                "width, height in pixels."
            )
        images = open_images(
            [file for file, _ in entries], options.image_size, options.skip_bad, options.cache, colour=True
        )
        places = [(read_header(entries[n][0]).shape, entries[n][1]) for n in images.read]
        outside = _check_places(places, found[part][0])
        targets = [_fit_boxes(shape, target, options.image_size) for shape, target in places]
        if not any(len(target["labels"]) for target in targets):
            raise JpqError(f"No box in '{found[part][0]}' lies in the part of its image that --image-size keeps.")
        columns[part] = images.pixels, ListColumn(targets)
        notes += [note for note in (images.note, outside) if note]
    val, test = columns.get("val"), columns.get("test")
    names = ("none", *(name for name, _ in categories.values()))
    return Source(
        columns["train"],
        val if test else None,
        test or val,
        len(names),
        names,
        tuple(notes),
        task="detection",
        preprocessing=Preprocessing((0.0,) * 3, (1.0,) * 3),  # torchvision's detectors normalise themselves
    )


def _find_annotations(folder: Path) -> dict[str, tuple[Path, Path]]:
    """(JSON file, folder of images) of each part."""
    if not folder.is_dir():
        raise JpqError(f"The folder '{folder}' is not there, or is a file.")
    found: dict[str, tuple[Path, Path]] = {}
    for part, names in PARTS.items():
        for name in names:
            inside = [file for file in (folder / name).glob("*.json") if "coco" in file.name or "annot" in file.name]
            central = sorted((folder / "annotations").glob(f"instances_{name}*.json"))
            if inside:
                found.setdefault(part, (inside[0], folder / name))
            elif central:
                images = folder / central[0].stem.removeprefix("instances_")
                found.setdefault(part, (central[0], images if images.is_dir() else folder / "images"))
    return found


def _read_json(file: Path) -> Mapping[str, Any]:
    """The content of an annotation file. Raises JpqError where it is no JSON of COCO's form."""
    try:
        record = json.loads(untrusted.read_text(file, "annotations", LARGEST_JSON))
        for key in ("images", "annotations", "categories"):
            if not isinstance(record[key], list):
                raise TypeError(f"'{key}' is no list")
    except (ValueError, KeyError, TypeError) as error:
        raise JpqError(f"'{file}' is no annotation file of COCO's form ({type(error).__name__}: {error}).") from error
    return dict(record)


def _categories(record: Mapping[str, Any], file: Path) -> dict[int, tuple[str, int]]:
    """Category id -> (name, class number from 1). Raises JpqError where an id is missing, or has two names."""
    try:
        ordered = sorted((int(entry["id"]), str(entry["name"])) for entry in record["categories"])
    except (KeyError, TypeError, ValueError) as error:
        raise JpqError(f"'{file}' has a category without an id and a name.") from error
    if not ordered:
        raise JpqError(f"'{file}' names no categories.")
    repeated = next((key for (key, _), (other, _) in pairwise(ordered) if key == other), None)
    if repeated is not None:
        raise JpqError(f"'{file}' lists category {repeated} twice. Give each category an id of its own.")
    return {key: (name, number) for number, (key, name) in enumerate(ordered, 1)}


def _check_same_categories(record: Mapping[str, Any], file: Path, categories: Mapping[int, tuple[str, int]]) -> None:
    """Raise JpqError where a part gives a category of training another name."""
    for key, (name, _) in _categories(record, file).items():
        if key in categories and categories[key][0] != name:
            raise JpqError(
                f"'{file}' calls category {key} '{name}', and the training part '{categories[key][0]}'. Use one set."
            )


def _entries(
    record: Mapping[str, Any], place: tuple[Path, Path], categories: Mapping[int, tuple[str, int]]
) -> list[tuple[Path, dict[str, Tensor]]]:
    """(file, boxes and labels in its pixels) of every image of a part."""
    source, folder = place
    boxes: dict[Any, list[list[float]]] = {}
    labels: dict[Any, list[int]] = {}
    try:
        files: dict[Any, Path] = {}
        for image in record["images"]:
            file = folder / str(image["file_name"])
            if files.setdefault(image["id"], file) != file:
                raise JpqError(f"'{source}' lists the image {image['id']} twice, with different files.")
        for entry in record["annotations"]:
            x, y, width, height = (float(value) for value in entry["bbox"])
            if not all(map(math.isfinite, (x, y, width, height))):
                raise JpqError(f"'{source}' has a box with NaN or infinity, for the image {entry['image_id']}.")
            if entry["image_id"] not in files:
                raise JpqError(f"'{source}' has a box for the image {entry['image_id']}, which it does not list.")
            if int(entry["category_id"]) not in categories:
                raise JpqError(f"'{source}' has a box of category {entry['category_id']}, which training lacks.")
            if entry.get("iscrowd") or width <= 0 or height <= 0:
                continue
            boxes.setdefault(entry["image_id"], []).append([x, y, x + width, y + height])
            labels.setdefault(entry["image_id"], []).append(categories[int(entry["category_id"])][1])
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise JpqError(f"'{source}' has an entry that is not of COCO's form ({reason}).") from error
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing or not files:
        raise JpqError(
            f"'{source}' lists {len(files)} images, of which {len(missing)} are not there"
            + (f", such as '{missing[0]}'." if missing else ".")
        )
    return [
        (
            file,
            {
                "boxes": torch.tensor(boxes.get(key, []), dtype=torch.float32).reshape(-1, 4),
                "labels": torch.tensor(labels.get(key, []), dtype=torch.int64),
            },
        )
        for key, file in files.items()
    ]


def _check_places(places: Sequence[tuple[tuple[int, int], dict[str, Tensor]]], source: Path) -> str:
    """A note on boxes that lie outside of their images, "" where there are none.

    Args:
        places: height and width of every image, and its boxes in pixels.
        source: the annotation file.

    Raises JpqError where most boxes lie outside, and where boxes end outside that fit as corners (x1, y1, x2, y2).
    """
    boxes = torch.cat([target["boxes"] for _, target in places])
    ends = torch.cat([torch.tensor([[w, h]] * len(t["boxes"])).reshape(-1, 2) for (h, w), t in places])
    beyond = (boxes[:, 2:] > ends + 1).any(1)  # by more than rounding
    corners = boxes[:, 2:] - boxes[:, :2]  # what the file gives for width and height
    if beyond.any() and ((corners > boxes[:, :2]) & (corners <= ends + 1)).all():
        raise JpqError(
            f"{int(beyond.sum())} of {len(boxes)} boxes in '{source}' end outside of their images, and all would fit "
            "as x1, y1, x2, y2. COCO's form is x, y, width, height: give bbox so."
        )
    outside = int(((boxes[:, 2:] <= 0) | (boxes[:, :2] >= ends)).any(1).sum())
    if 2 * outside > len(boxes):
        share = "All" if outside == len(boxes) else f"{outside} of {len(boxes)}"
        raise JpqError(f"{share} boxes in '{source}' lie outside of their images. Give them in pixels of these.")
    if not outside:
        return ""
    return f"{outside} of {len(boxes)} boxes in '{source}' lie outside of their images and are left out."


def _fit_boxes(shape: tuple[int, int], target: dict[str, Tensor], size: Any) -> dict[str, Tensor]:
    """The boxes inside their image, after it was scaled and cropped to `size`; those that lie outside are left out.

    Where the image is scaled, so are boxes of less than a pixel then.
    """
    image_height, image_width = shape
    height, width = (size[0], size[-1]) if size else (image_height, image_width)
    scale = max(height / image_height, width / image_width)
    left, top = (image_width * scale - width) / 2, (image_height * scale - height) / 2
    boxes = target["boxes"] * scale - torch.tensor([left, top, left, top])
    limits = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = torch.minimum(boxes.clamp_min(0), limits)
    sides = boxes[:, 2:] - boxes[:, :2]
    kept = (sides >= 1 if size else sides > 0).all(1)
    return {"boxes": boxes[kept], "labels": target["labels"][kept]}
