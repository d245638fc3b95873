"""Detection saliency beside L1 and random channels, in rounds: prune a little, train, rank anew, on harder images.

    python studies/detection_rounds.py [--scores saliency l1 random] [--rounds 5 1] [--targets 3%] [--seeds 0 1 2]
                                       [--weights FILE]

The detector is torchvision's ssdlite320_mobilenet_v3_large (its factory, random weights, images of 128 x 128), trained
for 16 epochs on 1,000 of the harder images of support/shapes.py: six classes, 4 to 8 shapes, weak colours, some hidden.
In each of `rounds` rounds the channels are ranked anew, the lowest ones are removed (equal steps in the remaining
MACs), the detector is rebuilt smaller and trained for an epoch on 500 of these images; the last round gives it 8-bit
weights and activations, lands on the target, and is followed by the rest of six epochs and by measuring batch norms
anew. The ranking is one for the network, each layer's values divided by their root mean square, with a floor of 8
channels or a tenth of each site. A row per run; what is there already is skipped.

    score               what ranks channels: saliency (of the 100 best boxes of 64 images), l1, or random; float: the
                        detector before; none: 8 bits alone, every channel kept, the same epochs
    ap50, ap            mean average precision at IoU .5 and over .5 to .95, in [0, 1], by torchmetrics with COCO's
                        conventions, on 200 test images that are read once per run
    bops_share, macs_share   over those of the float32 detector (backbone and head), counted on the rebuilt one
    masked_vs_rebuilt   largest relative difference of their outputs at the last landing
    onnx_largest        largest relative difference of rebuilt and exported outputs in onnxruntime, over 32 images (a
                        value at a rounding boundary makes it large); onnx_ap50: of the exported file
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from detection import MODEL, average_precisions, l1_values, measure_onnx
from support import shapes
from support.result_rows import RESULTS, append_row, provenance, read_rows
from support.shapes_detector import BATCH, detect, detector, train
from torch import nn

import jpq
from jpq.compression import reestimate_batchnorm
from jpq.costs import parse_targets
from jpq.detection import (
    channel_saliency,
    extract_core,
    prepare_images,
    prepare_saliency_batches,
    rank_network,
    rankable_sites,
    reassemble_detector,
)
from jpq.export import difference
from jpq.methods.gates import Ranked
from jpq.methods.quantizers import Fixed

TABLE = RESULTS / "detection_rounds.csv"
KEY = ["score", "rounds", "target", "seed"]
IMAGES = {"train": (1000, 1), "test": (200, 5)}  # number and seed
TUNE, RANKING = 500, 64  # of the training images: for training between rounds, and for ranking
EPOCHS, CYCLE = 16, 20  # of float training, and of the learning rate's curve
TUNE_EPOCHS = 6  # of a whole run: one after each round but the last, the others after the last
BITS = 8
FLOAT_BITS = 32


@cache
def images(split: str) -> shapes.Shapes:
    """The images of a split."""
    return shapes.make(*IMAGES[split], shapes.HARD)


def trained_detector(weights: Path) -> nn.Module:
    """The float detector, trained where its weights are not there yet."""
    torch.manual_seed(0)
    model = detector(len(shapes.ALL_CLASSES))
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
    else:
        train(model, images("train"), EPOCHS, 2e-3, 0, CYCLE, batch=16, save=weights)
    return model.eval()


def prune(model: nn.Module, score: str, bits: int, share: float, draw: torch.Generator) -> tuple[nn.Module, float]:
    """(detector after one round, largest relative difference of masked and rebuilt outputs).

    share: of this detector's own BOPs with 32 bits, which shall stay; ignored by the score "none".
    """
    core = extract_core(model)
    ranking = images("train").first(RANKING)
    batches = [prepare_images(model, inputs) for inputs, _ in ranking.batches(8)]
    network = jpq.trace(core, batches[0][:2])
    if bits == FLOAT_BITS:  # no quantizers, which the next round could not trace
        network = replace(network, layers=tuple(replace(layer, kept_float=True) for layer in network.layers))
    sites, boxes_only = rankable_sites(model, core, network, jpq.channels(network), batches[0])
    assert not boxes_only, boxes_only
    net = jpq.attach(core, network, sites, Ranked, lambda _: (Fixed(bits), Fixed(bits)), batches, "saliency").eval()
    if score == "saliency":
        samples = prepare_saliency_batches(model, ranking.batches(8))
        rank_network(net, channel_saliency(net, net.network, net.sites, samples))
    elif score == "random":
        rank_network(net, {site.name: torch.rand(site.n, generator=draw) for site in net.sites})
    elif score == "l1":
        rank_network(net, {site.name: l1_values(net, site) for site in net.sites})
    if score == "none":
        net.freeze(net.plan())
    else:
        net.freeze(jpq.discretize(net, parse_targets({"bops": f"{100 * share:.6f}%"}, net.exact_usage())))
    small, _ = jpq.rebuild(net.eval(), core)
    return reassemble_detector(model, small), difference(net, small, batches[0])


def run(model: nn.Module, score: str, rounds: int, target: str, seed: int) -> dict[str, object]:
    """One run: all rounds, and its row."""
    start = time.process_time()
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    x = prepare_images(model, next(images("train").batches(2))[0])
    dense = jpq.measure(extract_core(model), x)
    final = float(target.rstrip("%")) / 100  # share of the BOPs
    macs = final * (FLOAT_BITS / BITS) ** 2  # share of the MACs that this leaves with BITS everywhere
    small, left, gap = copy.deepcopy(model), 1.0, 0.0
    for number in range(1, rounds + 1):
        last = number == rounds
        wanted = final if last else 1 - (1 - macs) * number / rounds
        small, gap = prune(small, score, BITS if last else FLOAT_BITS, wanted / left, draw)
        left = jpq.measure(extract_core(small), x)["macs"] / dense["macs"]
        train(small, images("train").first(TUNE), TUNE_EPOCHS - rounds + 1 if last else 1, 1e-3, seed, batch=16)
    core = extract_core(small)
    inputs = ((prepare_images(model, batch), None) for batch, _ in images("train").first(TUNE).batches(BATCH))
    reestimate_batchnorm(core, inputs)
    ap50, ap = average_precisions(detect(small, images("test")), images("test").targets)
    counted = jpq.measure(core.eval(), x)
    largest, onnx_ap50 = measure_onnx(model, core, images("test"))
    command = f"python studies/detection_rounds.py --scores {score} --rounds {rounds} --targets {target} --seeds {seed}"
    return {
        "model": MODEL,
        "data": "hard shapes",
        "score": score,
        "rounds": rounds,
        "target": target,
        "seed": seed,
        "ap50": round(ap50, 4),
        "ap": round(ap, 4),
        "bops_share": round(counted["bops"] / dense["bops"], 6),
        "macs_share": round(counted["macs"] / dense["macs"], 4),
        "masked_vs_rebuilt": float(f"{gap:.2g}"),
        "onnx_largest": largest,
        "onnx_ap50": onnx_ap50,
        "seconds": round(time.process_time() - start),
        **provenance(command, packages=("torch", "torchmetrics")),
    }


def float_row(model: nn.Module) -> dict[str, object]:
    """The row of the float detector."""
    ap50, ap = average_precisions(detect(model, images("test")), images("test").targets)
    return {
        "model": MODEL,
        "data": "hard shapes",
        "score": "float",
        "rounds": 0,
        "target": "100%",
        "seed": 0,
        "ap50": round(ap50, 4),
        "ap": round(ap, 4),
        "bops_share": 1,
        "macs_share": 1,
        **provenance("python studies/detection_rounds.py", packages=("torch", "torchmetrics")),
    }


def rounds_table() -> str:
    """README's table: a row per score, number of rounds and target, means over seeds."""
    table = read_rows(TABLE, KEY)
    lines = ["| ranked by | rounds | n | BOPs % | MACs % | AP50 % | AP % |", "|" + "---|" * 7]
    for (score, rounds, _), runs in table.groupby(["score", "rounds", "target"], sort=False):
        costs = [f"{100 * runs[name].mean():.2f}" for name in ("bops_share", "macs_share")]
        precisions = [_spread(100 * runs[name]) for name in ("ap50", "ap")]
        lines.append("| " + " | ".join(map(str, [score, rounds, len(runs), *costs, *precisions])) + " |")
    caption = f"{MODEL}, 8 bits, 200 test images of the harder shapes; `python studies/detection_rounds.py`."
    return "\n".join([*lines, "", caption, ""])


def _spread(values: pd.Series) -> str:
    """Mean, with the smallest and largest where there are several."""
    around = f" ({values.min():.1f} to {values.max():.1f})" if len(values) > 1 else ""
    return f"{values.mean():.1f}{around}"


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", nargs="+", default=["saliency", "l1", "random", "none"])
    parser.add_argument("--rounds", nargs="+", type=int, choices=range(1, TUNE_EPOCHS + 1), default=[5])
    parser.add_argument("--targets", nargs="+", default=["3%"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--weights", type=Path, default=Path(tempfile.gettempdir()) / "jpq-hard-shapes.pt")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = trained_detector(args.weights)
    if not TABLE.exists():
        append_row(TABLE, float_row(model))
    for seed, target, rounds, score in product(args.seeds, args.targets, args.rounds, args.scores):
        known = read_rows(TABLE, KEY)[KEY].to_numpy().tolist()
        if [score, rounds, target, seed] not in known:
            print(score, rounds, target, seed, flush=True)
            row = run(model, score, rounds, target, seed)
            append_row(TABLE, row)
            print({k: row[k] for k in ("ap50", "ap", "bops_share", "macs_share", "masked_vs_rebuilt", "onnx_ap50")})
    print(rounds_table())


if __name__ == "__main__":
    main()
