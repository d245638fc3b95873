"""A network whose layers differ much: mobilenet_v2 on Fashion-MNIST, joint decisions beside the usual ones.

    python studies/uneven.py --data-root DIR
    python studies/uneven.py --data-root DIR --methods measured "uniform 3 bits, 8-bit ends" --targets 1% --seeds 0

torchvision's mobilenet_v2 with its own stem (stride 2) on 28 x 28 grey images padded to 32 x 32: 6.0 M MACs in 53
layers, depthwise ones with 9 weights a channel beside 1 x 1 ones with up to 1,280 channels. Uniform bits with 8-bit
ends are the widest bodies within the budget, 4/4 at 2 % (they use 1.63 %) and 3/3 at 1 % (0.96 %); plain `uniform`
uses 1.98 and 0.98 %. All runs share the float weights (trained once by this script and kept in runs/uneven), images,
epochs, batches and rates; the accuracies are of the 10,000 test images, read once per run.
"""

from functools import partial
from pathlib import Path
from typing import Any

from support.grid import Grid, run_grid, with_float_weights

import jpq
from jpq.config import Task, Train

WEIGHTS = Path("runs/uneven/mobilenet-v2-fashion-mnist.safetensors")
BASE = jpq.Config(
    task=Task(model="support.padded_mobilenet:mobilenet_v2", data="fashion-mnist", limit=4_000),
    train=Train(epochs=6, search=0.34, float_epochs=12, batch_size=50, lr=2e-3),
)
ENDS = "features.0.0=8/8,classifier.1=8/8"
VARIANTS: dict[str, dict[str, Any]] = {
    "measured": {"method": "measured"},
    "djpq": {"method": "djpq"},
    "uniform": {"method": "uniform"},
    "uniform 3 bits, 8-bit ends": {"bits": f"3/3,{ENDS}"},
    "uniform 4 bits, 8-bit ends": {"bits": f"4/4,{ENDS}"},  # more than 1 % of the BOPs: not possible there
    "two-stage": {"method": "two-stage"},
}


GRID = Grid(
    "uneven",
    "uneven.py",
    "mobilenet_v2 on Fashion-MNIST at 32 x 32",
    BASE,
    list(VARIANTS),
    targets=["1%", "2%"],
    seeds=[0, 1, 2],
    prepare=partial(with_float_weights, path=WEIGHTS),
    variants=VARIANTS,
)

if __name__ == "__main__":
    run_grid(GRID)
