"""Synthetic detection data: circles, squares and triangles on noisy backgrounds, drawn from a seed alone.

An image holds 2 to 5 shapes, 20 to 60 pixels wide, up to 1.4 times as high or as wide as the other side, of any colour
that stands out from the background; boxes overlap by at most a tenth (IoU). `HARD` images hold more and smaller shapes
of six classes, in weaker colours, with more noise, and some hide others. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CLASSES = ("background", "circle", "square", "triangle")  # 0 is the background, as torchvision counts
ALL_CLASSES = (*CLASSES, "diamond", "cross", "ring")
SIDE = 128  # pixels
Target = dict[str, Tensor]  # {"boxes": [k, 4] as x1, y1, x2, y2 in pixels, "labels": [k]}


@dataclass(frozen=True)
class Style:
    """How images are drawn."""

    classes: int = 3  # the first so many of ALL_CLASSES, without the background
    counts: tuple[int, int] = (2, 5)  # fewest and most shapes of an image
    sizes: tuple[float, float] = (20, 60)  # pixels
    contrast: float = 0.3  # least difference from the background, in one channel
    overlap: float = 0.1  # largest IoU of two boxes
    noise: float = 0.06  # standard deviation, of 1


EASY, HARD = Style(), Style(6, (4, 8), (14, 44), 0.15, 0.25, 0.1)


@dataclass(frozen=True)
class Shapes:
    """Images, and the boxes and labels of the shapes in each."""

    images: Tensor  # [n, 3, SIDE, SIDE], uint8
    targets: list[Target]

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int, order: torch.Generator | None = None) -> Iterator[tuple[list[Tensor], list[Target]]]:
        """Inputs of a torchvision detector: images in [0, 1], and targets; with `order` shuffled, half mirrored."""
        indices = torch.arange(len(self)) if order is None else torch.randperm(len(self), generator=order)
        for part in indices.split(size):
            images = [self.images[i].float() / 255 for i in part]
            targets = [self.targets[i] for i in part]
            if order is not None:
                flips = torch.rand(len(part), generator=order) < 0.5
                images = [x.flip(-1) if f else x for x, f in zip(images, flips, strict=True)]
                targets = [mirrored(t) if f else t for t, f in zip(targets, flips, strict=True)]
            yield images, targets

    def first(self, n: int) -> Shapes:
        """The first n images."""
        return Shapes(self.images[:n], self.targets[:n])


def mirrored(target: Target) -> Target:
    """The target of an image whose left and right change places."""
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = SIDE - boxes[:, [2, 0]]
    return {**target, "boxes": boxes}


def make(n: int, seed: int, style: Style = EASY) -> Shapes:
    """`n` images; the same seed and style give the same ones."""
    rng = np.random.default_rng(seed)
    pairs = [_draw_image(rng, style) for _ in range(n)]
    return Shapes(torch.from_numpy(np.stack([image for image, _ in pairs])), [target for _, target in pairs])


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes."""
    w, h = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = max(w, 0) * max(h, 0)
    return float(shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared))


def _draw_image(rng: np.random.Generator, style: Style) -> tuple[np.ndarray, Target]:
    """One image, uint8 [3, SIDE, SIDE], and its target."""
    background = rng.uniform(0.1, 0.9, 3)
    cloud = np.kron(rng.normal(0, 0.08, (3, 8, 8)), np.ones((SIDE // 8, SIDE // 8)))
    image = background[:, None, None] + cloud
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    boxes: list[np.ndarray] = []
    labels: list[int] = []
    count = rng.integers(style.counts[0], style.counts[1] + 1)
    for _ in range(40):
        if len(boxes) == count:
            break
        box = _draw_box(rng, style)
        if any(iou(box, placed) > style.overlap for placed in boxes):
            continue
        label = int(rng.integers(1, style.classes + 1))
        colour = _draw_colour(rng, background, style)
        image = np.where(_inside(label, box, x, y), colour[:, None, None], image)
        boxes.append(box)
        labels.append(label)
    image = image + rng.normal(0, style.noise, image.shape)
    target = {"boxes": torch.tensor(np.stack(boxes), dtype=torch.float32), "labels": torch.tensor(labels)}
    return (image.clip(0, 1) * 255).astype(np.uint8), target


def _draw_box(rng: np.random.Generator, style: Style) -> np.ndarray:
    """A random box within the image: x1, y1, x2, y2."""
    size, aspect = rng.uniform(*style.sizes), np.exp(rng.uniform(-np.log(1.4), np.log(1.4)) / 2)
    w, h = size * aspect, size / aspect
    left, top = rng.uniform(1, SIDE - 1 - w), rng.uniform(1, SIDE - 1 - h)
    return np.array([left, top, left + w, top + h])


def _draw_colour(rng: np.random.Generator, background: np.ndarray, style: Style) -> np.ndarray:
    """A random colour that differs from the background by more than the style's contrast in a channel."""
    while True:
        colour = rng.uniform(0, 1, 3)
        if np.abs(colour - background).max() > style.contrast:
            return colour


def _inside(label: int, box: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mask of a shape over the image; its outermost points touch the box."""
    u, v = (x - box[0]) / (box[2] - box[0]), (y - box[1]) / (box[3] - box[1])  # [0, 1] inside the box
    radius = (u - 0.5) ** 2 + (v - 0.5) ** 2  # squared
    square = (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)
    across, down = np.abs(u - 0.5), np.abs(v - 0.5)
    shape: np.ndarray = {
        "circle": radius <= 0.25,
        "square": square,
        "triangle": square & (across <= v / 2),
        "diamond": across + down <= 0.5,
        "cross": square & ((across <= 1 / 6) | (down <= 1 / 6)),
        "ring": (radius <= 0.25) & (radius >= 0.09),
    }[ALL_CLASSES[label]]
    return shape
