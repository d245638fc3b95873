"""The detector of the detection study: torchvision's SSDlite, its synthetic images, and its training."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from support import shapes

BATCH = 32  # images
EPOCHS, CYCLE = 13, 18  # of float training, and of the learning rate's curve
TRAIN, TUNE = 3000, 640  # images


@cache
def data(split: str) -> shapes.Shapes:
    """Images by their seeds; "tune" are the first of "train"."""
    return shapes.make(*{"train": (TRAIN, 1), "tune": (TUNE, 1), "held-out": (200, 2), "test": (300, 5)}[split])


def detector(classes: int = len(shapes.CLASSES)) -> nn.Module:
    """torchvision's SSDlite with MobileNetV3, random weights, for images of 128 x 128; `classes` with background."""
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=classes)
    side = shapes.SIDE
    model.transform = GeneralizedRCNNTransform(
        side, side, [0.5] * 3, [0.5] * 3, size_divisible=1, fixed_size=(side, side)
    )
    return model


def train(
    model: nn.Module,
    images: shapes.Shapes,
    epochs: int,
    lr: float,
    seed: int,
    cycle: int = 0,
    batch: int = BATCH,
    save: Path | None = None,
) -> None:
    """Train with AdamW on the detector's losses, one cycle of the learning rate over `cycle` epochs."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    steps = (cycle or epochs) * -(-len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        losses, start = [], time.time()
        for inputs, targets in images.batches(batch, order):
            loss = sum(model(inputs, targets).values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trainable, 5.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        mean = sum(losses) / len(losses)
        print(f"  epoch {epoch + 1}/{epochs} loss {mean:.3f} {time.time() - start:.0f} s", flush=True)
        if save is not None:
            torch.save(model.state_dict(), save)


@torch.no_grad()
def detect(model: nn.Module, images: shapes.Shapes) -> list[dict[str, torch.Tensor]]:
    """Detections on every image."""
    model.eval()
    return [d for batch, _ in images.batches(BATCH) for d in model(batch)]


def trained_detector(weights: Path) -> nn.Module:
    """The float detector, trained where its weights are not there yet."""
    torch.manual_seed(0)
    model = detector()
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
    else:
        train(model, data("train"), EPOCHS, 2e-3, 0, CYCLE, save=weights)
    return model.eval()
