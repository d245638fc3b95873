"""Exported files against their models, number by number: the file as written, default sessions of two runtimes.

    python studies/exactness.py resnet20 --data-root DIR --weights resnet20-12fca82f.th     # 10,000 CIFAR-10 images
    python studies/exactness.py unet --data-root DIR                                        # CamVid, 233 images

ResNet20 with public weights at 1.58 % of the bit-operations, and a small U-Net for segmentation (trained here for a few
steps, at 8 bits with rounded results), each fine-tuned for a few steps: the question is not how accurate they are, but
whether every runtime computes the same. For each runtime and each type of stored weights: how many decisions (classes
of images or of pixels) are the same as PyTorch's, how many samples have any number that differs by more than rounding
of a sum, and the largest difference. Images are normalised as users feed them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from support.result_rows import RESULTS, append_row, provenance
from support.task_models import UNet
from torch import Tensor, nn

import jpq
from jpq import tasks
from jpq.export import Session, compare, open_session

PATH = RESULTS / "exactness.csv"
WEIGHTS = ("int8", "int4")
SIZE = (176, 128)  # of CamVid's images here, width and height: multiples of 16
CLASSES = 12
MEAN, STD = (0.41, 0.43, 0.43), (0.3, 0.31, 0.3)  # of CamVid's colours

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A compressed model, and the batches that its files are compared on."""

    name: str
    data: str
    budget: str
    small: nn.Module
    example: Tensor
    test: Sequence[Batch]
    task: tasks.Task = tasks.TASKS["classification"]


def train(net: nn.Module, batches: Iterator[Batch], steps: int, lr: float) -> None:
    """Minimise cross entropy with Adam."""
    optimizer = torch.optim.Adam(net.parameters(), lr)
    net.train()
    for _ in range(steps):
        x, y = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        if isinstance(net, jpq.CompressionSession):
            loss = loss + net.pressure()
        loss.backward()
        optimizer.step()
        if isinstance(net, jpq.CompressionSession):
            net.step()


def compressed(
    model: nn.Module, example: Tensor, batches: Iterator[Batch], steps: int, bops: str, **settings: object
) -> nn.Module:
    """The small model: searched and fine-tuned for as many steps each."""
    session = jpq.compress(model.eval(), example, bops=bops, steps=steps, **settings)  # type: ignore[arg-type]
    train(session, batches, steps, 1e-3)
    session.discretize()
    train(session, batches, steps, 1e-3)
    return session.finalize()


def resnet20(args: argparse.Namespace) -> Case:
    """ResNet20 with public weights, mixed widths, all images of CIFAR-10's test split."""
    data = tasks.load_data("cifar10", args.data_root, batch_size=128, held_out=0.02)
    model = tasks.build_model("resnet20", classes=10)
    tasks.load_weights(model, args.weights)
    batches = ((x, y) for epoch in range(99) for x, y in data.train.epoch(epoch))
    small = compressed(model, data.example, batches, args.steps, "1.58%", method="djpq")
    test = [(x, y) for i, (x, y) in enumerate(data.test) if i * len(x) < args.images]
    return Case("resnet20", "cifar10", "1.58%", small, data.example[:8], test)


def unet(args: argparse.Namespace) -> Case:
    """A small U-Net on CamVid at 8 bits with rounded results."""
    training, test = (read_camvid(args.data_root / "camvid", split, args.images) for split in ("train", "test"))
    generator = torch.Generator().manual_seed(0)
    batches = (training[int(i)] for _ in range(99) for i in torch.randperm(len(training), generator=generator))
    model = UNet(CLASSES, channels=3, width=16)
    train(model, batches, 2 * args.steps, 3e-3)
    example = training[0][0]
    settings = {"method": "uniform", "w_bits": (8, 8), "a_bits": (8, 8), "output_bits": 8}
    small = compressed(model, example, batches, args.steps, "100%", **settings)
    return Case("unet", "camvid", "W8A8, results rounded", small, example[:2], test, tasks.TASKS["segmentation"])


def read_camvid(folder: Path, split: str, most: int) -> list[Batch]:
    """Batches of four normalised images and their classes per pixel."""
    batches, images, labels = [], [], []
    for path in sorted((folder / split).glob("*.webp"))[:most]:
        pixels = np.asarray(Image.open(path).convert("RGB").resize(SIZE), np.float32) / 255
        label = Image.open(folder / f"{split}_labels" / f"{path.stem}.png").resize(SIZE, Image.Resampling.NEAREST)
        images.append(torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1))
        labels.append(torch.from_numpy(np.array(label, np.int64)).clamp(0, CLASSES - 1))
        if len(images) == 4:
            batches.append((torch.stack(images), torch.stack(labels)))
            images, labels = [], []
    return batches


CASES = {"resnet20": resnet20, "unet": unet}


class Replay:
    """Outputs that were computed before, in order, as a model."""

    def __init__(self, outputs: Sequence[Tensor]):
        self.outputs = iter(outputs)

    def __call__(self, x: Tensor) -> Tensor:
        return next(self.outputs)


@torch.no_grad()
def measure(case: Case, command: str) -> None:
    """Append a row for each runtime and type of stored weights."""
    outputs = [case.small(x) for x, _ in case.test]
    total = sum(y.numel() for _, y in case.test)
    with tempfile.TemporaryDirectory() as folder:
        for weights in WEIGHTS:
            path = Path(folder, f"{weights}.onnx")
            jpq.export_onnx(case.small, case.example, path, weights)
            sessions = {
                "onnxruntime, as written": Session(path, optimised=False),
                "onnxruntime, default": Session(path),
                "openvino": open_session("openvino", path),
            }
            for runtime, session in sessions.items():
                answers = [session(x) for x, _ in case.test]
                found = compare(Replay(outputs), Replay(answers), case.test, case.task)
                row = {
                    "model": case.name,
                    "data": case.data,
                    "budget": case.budget,
                    "runtime": runtime,
                    "stored": weights,
                    "samples": found["images"],
                    "decisions": found["decisions"],
                    "decisions_that_differ": found["argmax_differs"],
                    "samples_that_differ": found["at_a_rounding_boundary"],
                    "largest_difference": found["largest_relative_difference"],
                    "accuracy_pytorch": round(count_right(outputs, case.test) / total, 5),
                    "accuracy_file": round(count_right(answers, case.test) / total, 5),
                    **provenance(command, packages=("torch", "onnxruntime", "openvino")),
                }
                append_row(PATH, row)
                print(list(row.values())[:12], flush=True)


def count_right(outputs: Sequence[Tensor], batches: Sequence[Batch]) -> int:
    """Number of decisions that are right."""
    return sum(int((output.argmax(1) == y).sum()) for output, (_, y) in zip(outputs, batches, strict=True))


def main() -> None:
    """Parse the flags, and measure one case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--steps", type=int, default=30, help="optimiser steps of search and of fine-tuning")
    parser.add_argument("--images", type=int, default=10_000, help="largest number of images of a split")
    args = parser.parse_args()
    torch.manual_seed(0)
    shown = [f"--steps {args.steps}", f"--images {args.images}"]
    flags = f"{args.case} --data-root DIR {' '.join(shown)}" + (" --weights FILE" if args.weights else "")
    measure(CASES[args.case](args), f"python studies/exactness.py {flags}")


if __name__ == "__main__":
    main()
