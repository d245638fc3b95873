"""The synthetic shapes as a folder in COCO's format, as `--data coco:PATH` reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from support import shapes


def write_coco(folder: Path, parts: Mapping[str, tuple[int, int]], style: shapes.Style) -> str:
    """Draw the images of each part, write them with their boxes into PATH/part, and return "coco:PATH".

    Args:
        folder: an empty one.
        parts: part (train, val, test) -> (number of images, seed).
        style: of the images.
    """
    names = shapes.ALL_CLASSES[1 : style.classes + 1]
    for part, (count, seed) in parts.items():
        drawn = shapes.make(count, seed, style)
        (folder / part).mkdir()
        record: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
        record["categories"] = [{"id": n, "name": name} for n, name in enumerate(names, 1)]
        for n, (image, target) in enumerate(zip(drawn.images, drawn.targets, strict=True)):
            name = f"{n:05}.png"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / part / name)
            record["images"].append({"id": n, "file_name": name, "height": shapes.SIDE, "width": shapes.SIDE})
            for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
                entry = {"id": len(record["annotations"]), "image_id": n, "category_id": label, **box}
                record["annotations"].append(entry)
        (folder / part / "_annotations.coco.json").write_text(json.dumps(record), encoding="utf-8")
    return f"coco:{folder}"
