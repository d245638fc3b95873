"""Joint decisions beside the usual ones on CIFAR-10: ResNet8, a few epochs, decisions judged on unseen images.

    CIFAR10_ROOT=DIR python studies/joint_cifar.py [--methods ...] [--targets ...] [--seeds ...]

All runs start from studies/weights/resnet8_cifar10_45000.safetensors, train on 8,000 of its 45,000 images and judge
decisions on 5,000 that it has not seen; accuracies are of the 10,000 test images, read once per run. Uniform bits with
wider ends have 8 bits for what the first and last layer read, and 5 or 4 for their weights, whose BOPs count too.
"""

from __future__ import annotations

from support.grid import Grid, run_grid
from support.result_rows import STUDIES

import jpq
from jpq.config import Task, Train

BASE = jpq.Config(
    task=Task(
        model="resnet8",
        data="support.unseen_cifar:images",
        weights=STUDIES / "weights" / "resnet8_cifar10_45000.safetensors",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
    train=Train(epochs=4, search=0.5, batch_size=100, lr=2e-3),
)

GRID = Grid(
    "joint_cifar",
    "joint_cifar.py",
    "ResNet8 on CIFAR-10, 8,000 images, 4 epochs",
    BASE,
    ["measured", "djpq", "uniform", "two-stage"],
    targets=["1%", "0.5%"],
    seeds=[0, 1, 2],
    variants={
        "uniform, wider ends": {"method": "uniform", "wider_ends": True},
        "uniform 3 bits, wider ends": {"bits": "3/3,conv1=5/8,linear=5/8"},
        "uniform 2 bits, wider ends": {"bits": "2/2,conv1=4/8,linear=4/8"},
    },
)

if __name__ == "__main__":
    run_grid(GRID)
