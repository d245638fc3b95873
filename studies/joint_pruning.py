"""Where pruning should pay: a ResNet8 of twice its width on Fashion-MNIST, at 0.5 and 0.25 % of the BOPs.

    python studies/joint_pruning.py --data-root DIR
    python studies/joint_pruning.py --data-root DIR --methods djpq "djpq, bits only" --seeds 0

Joint decisions (`measured`, `djpq`) against each half of them: bits alone (`djpq` with every layer skipped, so that
all channels stay) and channels alone, at 8, 4 and 2 bits everywhere (`--width fixed`). At 0.25 % bits alone have no
plan: 2 bits everywhere cost 0.39 %. All runs share the float weights (trained once by this script and kept in
runs/joint_pruning), 3,000 training images, epochs, batches and rates; the accuracies are of the 10,000 test images,
read once per run. `channels_kept` is the share of layers' output channels.
"""

from functools import partial
from pathlib import Path
from typing import Any

from support.grid import Grid, run_grid, with_float_weights
from support.wide_resnet import layer_names

import jpq
from jpq.config import Task, Train

WEIGHTS = Path("runs/joint_pruning/wide-resnet8-fashion-mnist.safetensors")
BASE = jpq.Config(
    task=Task(model="support.wide_resnet:wide_resnet8", data="fashion-mnist", limit=3_000),
    train=Train(epochs=8, search=0.5, float_epochs=12, batch_size=50, lr=2e-3),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "measured": {"method": "measured"},
    "djpq": {"method": "djpq"},
    "djpq, bits only": {"method": "djpq", "skip": layer_names()},
    "djpq, channels only, 8 bits": {"method": "djpq", "width": "fixed"},
    "djpq, channels only, 4 bits": {"method": "djpq", "width": "fixed", "w_bits": (4, 4), "a_bits": (4, 4)},
    "djpq, channels only, 2 bits": {"method": "djpq", "width": "fixed", "w_bits": (2, 2), "a_bits": (2, 2)},
}


GRID = Grid(
    "joint_pruning",
    "joint_pruning.py",
    "Twice as wide ResNet8 on Fashion-MNIST, 3,000 images, 8 epochs",
    BASE,
    list(VARIANTS),
    targets=["0.5%", "0.25%"],
    seeds=[0, 1, 2],
    prepare=partial(with_float_weights, path=WEIGHTS),
    variants=VARIANTS,
)

if __name__ == "__main__":
    run_grid(GRID)
