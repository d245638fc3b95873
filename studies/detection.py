"""What detection saliency is worth: a torchvision detector, pruned by three scores to equal BOPs. (header to be written)"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import shapes
import torch
from torch import nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from jpq.average_precision import average_precision, coco

BATCH = 32


def detector() -> nn.Module:
    """torchvision's SSDlite with MobileNetV3, random weights, for images of 128 x 128."""
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=len(shapes.CLASSES))
    side = shapes.SIDE
    model.transform = GeneralizedRCNNTransform(
        side, side, [0.5] * 3, [0.5] * 3, size_divisible=1, fixed_size=(side, side)
    )
    return model


def fit(model: nn.Module, data: shapes.Shapes, epochs: int, lr: float, seed: int, save: Path | None = None) -> float:
    """Train with AdamW on the detector's own losses, cosine to 0; gives the last epoch's mean loss."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optim = torch.optim.AdamW(groups, lr=lr)
    steps = epochs * -(-len(data) // BATCH)
    curve = torch.optim.lr_scheduler.OneCycleLR(optim, lr, total_steps=steps, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    mean = 0.0
    for epoch in range(epochs):
        model.train()
        losses, start = [], time.time()
        for images, targets in data.batches(BATCH, order):
            loss = sum(model(images, targets).values())
            optim.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optim.step()
            curve.step()
            losses.append(float(loss.detach()))
        mean = sum(losses) / len(losses)
        print(f"  epoch {epoch + 1}/{epochs} loss {mean:.3f} {time.time() - start:.0f} s", flush=True)
        if save is not None:
            torch.save(model.state_dict(), save)
    return mean


@torch.no_grad()
def found(model: nn.Module, data: shapes.Shapes) -> list[dict[str, torch.Tensor]]:
    """Detections on every image."""
    model.eval()
    return [d for images, _ in data.batches(BATCH) for d in model(images)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--n", type=int, default=3000)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    train, held = shapes.make(args.n, 1), shapes.make(300, 2)
    model = detector()
    fit(model, train, args.epochs, 2e-3, 0, args.save)
    d = found(model, held)
    print("AP50", average_precision(d, held.targets), "AP", coco(d, held.targets))
