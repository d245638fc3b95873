"""Accuracy of pruned and quantized networks at a few budgets of bit-operations (BOPs), test split.

    python studies/budgets.py digits                    # convnet on the built-in digits, five seeds; minutes on a core
    python studies/budgets.py digits_macs               # README's first command with other methods
    python studies/budgets.py fashion_mnist --data-root DIR
    python studies/budgets.py resnet20_cifar10 --data-root DIR --weights resnet20-12fca82f.th
    python studies/budgets.py resnet20_joint --data-root DIR --weights resnet20-12fca82f.th [--methods ...]

Each data set has its own function below, which says what is compared, and its own CSV. On two shared x86-64 cores,
November 2026: digits 98.9 % at 1 % (`djpq`, n = 5, 449 test images), LeNet-5 91.0 % at 1 % (n = 1), ResNet20 91.2 % at
1.58 % (n = 1, 10,000 test images).
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.grid import Grid, run_grid

import jpq
from jpq.config import Budget, Decide, Run, Task, Train

FASHION_MNIST = jpq.Config(
    task=Task(model="lenet5", data="fashion-mnist"),
    train=Train(epochs=6, search=0.34, float_epochs=6, batch_size=128, lr=2e-3),
)
RESNET20 = jpq.Config(
    task=Task(
        model="resnet20",
        data="cifar10",
        data_root=Path("data"),
        weights=Path("data/weights/resnet20-12fca82f.th"),
        held_out=0.02,
    ),
    decide=Decide(bit_lr=0.01, gate_lr=0.01),
    train=Train(epochs=3, search=0.17, batch_size=128, lr=1e-3),
    run=Run(device="auto"),
)


def digits() -> Grid:
    """The built-in job: 1 % and 0.25 % of fp32's BOPs, four methods, five seeds."""
    methods = ["djpq", "djpq-pow2", "l0", "uniform"]
    return Grid(
        "digits",
        "budgets.py digits",
        "convnet on digits (8x8)",
        jpq.Config(),
        methods,
        targets=["1%", "0.25%"],
        seeds=[0, 1, 2, 3, 4],
    )


def digits_macs() -> Grid:
    """README's first command, 1 % of the BOPs and 20 % of the MACs, with the default and other methods, five seeds."""
    return Grid(
        "digits_macs",
        "budgets.py digits_macs",
        "convnet on digits (8x8), 20 % of the MACs",
        jpq.Config(budget=Budget(target_macs="20%"), decide=Decide(channel_multiple=8)),
        ["djpq", "gdp", "l0", "measured", "two-stage"],
        targets=["1%"],
        seeds=[0, 1, 2, 3, 4],
    )


def fashion_mnist() -> Grid:
    """LeNet-5 on Fashion-MNIST, float model trained in the run: 1 % and 0.4 %, one seed."""
    return Grid(
        "fashion_mnist",
        "budgets.py fashion_mnist",
        "LeNet-5 on Fashion-MNIST",
        FASHION_MNIST,
        ["djpq", "uniform"],
        targets=["1%", "0.4%"],
        seeds=[0],
    )


def resnet20_cifar10() -> Grid:
    """ResNet20 on CIFAR-10 from public weights (91.73 %) at the cost of uniform 4, 3 and 2 bits, one seed.

    Both methods have the same data, epochs and recipe; the budgets 1.58 %, 0.9 % and 0.4035 % are what W4A4, W3A3 and
    W2A2 cost (1.5795, 0.8949 and 0.4034 %). The public weights were trained on all 50,000 training images, so the
    held-out accuracy of a run is optimistic; the CSV holds figures of the 10,000 test images, read once per run.
    """
    return Grid(
        "resnet20_cifar10",
        "budgets.py resnet20_cifar10",
        "ResNet20 on CIFAR-10",
        RESNET20,
        ["djpq", "uniform"],
        targets=["1.58%", "0.9%", "0.4035%"],
        seeds=[0],
    )


def resnet20_joint() -> Grid:
    """ResNet20 on CIFAR-10 from public weights: joint decisions beside uniform bits and two stages.

    0.455 and 0.94 % are what bodies of 2 and of 3 bits cost with 8-bit ends, as papers publish them. The public weights
    have seen all training images, so decisions are made on mixed images and held-out accuracies are optimistic; the CSV
    holds figures of the 10,000 test images, read once per run.
    """
    variants: dict[str, dict[str, Any]] = {
        "uniform 2 bits, 8-bit ends": {"bits": "2/2,conv1=8/8,linear=8/8"},
        "uniform 3 bits, 8-bit ends": {"bits": "3/3,conv1=8/8,linear=8/8"},
    }
    return Grid(
        "resnet20_joint",
        "budgets.py resnet20_joint",
        "ResNet20 on CIFAR-10, 3 epochs",
        RESNET20,
        ["uniform 2 bits, 8-bit ends", "measured", "djpq", "two-stage"],
        targets=["0.455%"],
        seeds=[0],
        variants=variants,
    )


GRIDS: dict[str, Callable[[], Grid]] = {
    "digits": digits,
    "digits_macs": digits_macs,
    "fashion_mnist": fashion_mnist,
    "resnet20_cifar10": resnet20_cifar10,
    "resnet20_joint": resnet20_joint,
}


def main() -> None:
    """Run the grid that the first argument names; the rest are its flags."""
    if len(sys.argv) < 2 or sys.argv[1] not in GRIDS:
        print(f"{__doc__}\nfirst argument: one of {', '.join(GRIDS)}; then --help shows its flags")
        raise SystemExit(0 if sys.argv[1:] == ["--help"] else 2)
    run_grid(GRIDS[sys.argv[1]](), sys.argv[2:])


if __name__ == "__main__":
    main()
