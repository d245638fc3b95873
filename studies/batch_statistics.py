"""What BatchNorm's statistics are worth when they are measured anew on few samples, with nothing quantized.

    python studies/batch_statistics.py [--shared DIR]

DnCNN's public weights for noise of sigma 25, whose statistics come from batches of 128 crops: PSNR on the centres
(80 x 80) of Set12 with those, and with averages over training batches of 40 x 40 crops of Train400. This is what
`--batchnorm auto` looks at before a run (`jpq.training.batchnorm_choice`). Rows: results/batch_statistics.csv.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from support.result_rows import RESULTS, append_row, provenance
from support.task_models import DnCNN
from tasks import grey_images

from jpq.compression import reestimate_batchnorm
from jpq.tasks import load_data, load_weights

PATH = RESULTS / "batch_statistics.csv"
CASES = ((4, 10), (4, 400), (64, 400))  # crops of a batch, images that they are cut from (a tenth of them held out)
BATCHES = 16  # that statistics are averaged over, at most


def main() -> None:
    """A row for each size of batches and number of images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="folder of the real data")
    shared = parser.parse_args().shared
    torch.set_num_threads(1)
    for crops, images in CASES:
        with tempfile.TemporaryDirectory() as folder:
            source = grey_images(shared, Path(folder), "set12", images)
            data = load_data(source, batch_size=crops, noise=25, crop=(40,), image_size=(80,), task="restoration")
            net = DnCNN().eval()
            load_weights(net, shared / "weights" / "dncnn_sigma25.safetensors")
            own = data.task.evaluate(net, data.test)
            batches = [batch for epoch in range(BATCHES) for batch in data.train.epoch(epoch)][:BATCHES]
            reestimate_batchnorm(net, batches)
            row = {
                "network": "DnCNN, public weights",
                "data": "crops of Train400, Set12's centres of 80 x 80, sigma 25",
                "samples_per_batch": crops,
                "images": images,
                "batches": len(batches),
                "psnr_own_statistics": round(own, 3),
                "psnr_measured_anew": round(data.task.evaluate(net, data.test), 3),
            }
        append_row(PATH, row | provenance("python studies/batch_statistics.py"))
        print(row, flush=True)


if __name__ == "__main__":
    main()
