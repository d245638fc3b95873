"""CIFAR-10, ResNet20 from public weights (91.73 %): djpq beside uniform bits at the cost of W4A4, W3A3 and W2A2.

    python studies/resnet20_cifar10.py --data-root DIR --weights resnet20-12fca82f.th
    python studies/resnet20_cifar10.py --front --data-root DIR --weights resnet20-12fca82f.th

Same data, same epochs, same recipe for both; the targets 1.58 %, 0.9 % and 0.4 % of fp32's bit-operations are what
uniform 4, 3 and 2 bits cost (1.5795, 0.8949 and 0.4034 %; the last is allowed as 0.4035 %).
The given weights were trained on all 50,000 training images, so the held-out accuracy of a run is optimistic; the
figures in the CSV are of the 10,000 test images, read once per run.

With --front whole fronts are compared at the same number of epochs, on 5,000 of the training images (see fronts.py).
"""

import sys
from dataclasses import replace
from pathlib import Path

import fronts
import grid

import jpq
from jpq.config import Decide, Run, Task, Train

BASE = jpq.Config(
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

FRONT = replace(BASE, task=replace(BASE.task, limit=5_000), train=replace(BASE.train, search=0.5))

if __name__ == "__main__":
    if "--front" in sys.argv:
        rest = [arg for arg in sys.argv[1:] if arg != "--front"]
        title = "ResNet20 on CIFAR-10, 5,000 training images: 12 epochs for a front"
        fronts.main("front_resnet20", title, FRONT, fronts.Plan(each=3, trial=2), [0], rest)
    else:
        budgets = ["1.58%", "0.9%", "0.4035%"]
        grid.main("resnet20_cifar10", "ResNet20 on CIFAR-10", BASE, ["djpq", "uniform"], budgets, [0])
