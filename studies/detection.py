"""What detection saliency is worth: a torchvision detector, 8 bits, pruned by three scores to equal BOPs.

    python studies/detection.py [--scores saliency l1 random] [--rankings global uniform] [--targets 3% ...]
                                [--tune 0 1] [--seeds 0 ...] [--weights FILE] [--plot]

The detector is torchvision's ssdlite320_mobilenet_v3_large (its factory, random weights, images of 128 x 128), trained
on 3,000 images of `shapes.py` for the first 13 epochs of a cycle of 18 (20 minutes of one core; kept in --weights).
Each run attaches 8-bit weights and activations and a ranking of channels to its backbone and head, lands on the target,
rebuilds the small detector, trains it for `tune` epochs on 640 of these images, and measures batch norms anew. A row
per run; what is there already is skipped.

    score, ranking      what ranks channels: even (one ranking for the network, each layer's values divided by their
                        root mean square, and a floor of 8 channels or a tenth of each site), global (the same
                        divided by their norm, which favours narrow layers) or uniform (the same share at each site).
                        random: one draw per seed; "none": nothing is pruned
    tune                epochs of fine-tuning; 0: as rebuilt
    split               held-out (200 images, where tune is 0) or test (300 others), both unknown to all training
    ap50, ap            mean average precision at IoU .5 and over .5 to .95, in [0, 1], by torchmetrics with COCO's
                        conventions (101 levels of recall, the 100 best detections of an image)
    bops_share          BOPs over those of the float32 detector (backbone and head), counted on the rebuilt one
    masked_vs_rebuilt   largest relative difference of their outputs in float64, at landing
    onnx_largest        largest relative difference of rebuilt and exported outputs in onnxruntime, over 32 images (a
                        value at a rounding boundary makes it large); onnx_ap50: of the exported file, over `n` images

The figures of the rows before torchmetrics was used come from jpq's own former code, which took the area under the
precision envelope over all levels of recall and all detections: they may differ in the third digit.

SSDlite's heads have no layer that feeds only boxes, so all sites are ranked. We prune in one step, not in the sheet's
five rounds: each would need its own training.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import shapes
import torch
from detection_figures import TABLE, compared, shown
from grid import RESULTS, append, hardware
from shapes_detector import BATCH, data, fit, found, part_of, trained
from torch import nn
from torchmetrics.detection import MeanAveragePrecision

import jpq
from jpq import costs
from jpq.allocation.ranking.rank import rank
from jpq.compression.calibration import reestimate_batchnorm
from jpq.compression.model import CompressedModel
from jpq.costs.target import parse_targets
from jpq.detection import detector
from jpq.detection.saliency import channel_saliency, rank_network
from jpq.export import verify
from jpq.export.runtimes import Session
from jpq.methods.gates import Ranked
from jpq.methods.quantizers import Fixed
from jpq.methods.scores import L1

RANK = 64  # images
DENSE = "6.25%"  # 8 bits, nothing pruned
KEY = ["score", "ranking", "target", "tune", "seed"]


@dataclass(frozen=True)
class Run:
    """One row to be."""

    score: str
    ranking: str
    target: str
    tune: int
    seed: int

    def command(self) -> str:
        """What makes this row alone."""
        own = f"--scores {self.score} --rankings {self.ranking} --targets {self.target} --tune {self.tune}"
        return f"python studies/detection.py {own} --seeds {self.seed}"


def seen(n: int, size: int = 8) -> list[detector.Batch]:
    """The first training images: small batches, since saliency holds every map and its gradient."""
    return list(part_of(data("tune"), n).batches(size))


@cache
def attached(model: nn.Module) -> tuple[detector.DetectorCore, CompressedModel]:
    """The detector's core, and its copy with 8 bits everywhere and all that `rank` needs."""
    core = detector.detector_core(model)
    batches = [detector.prepare_images(model, images) for images, _ in seen(RANK)]
    network = jpq.trace(core, batches[0][:2])
    sites, boxes_only = detector.rankable_sites(model, core, network, jpq.channels(network), batches[0])
    assert not boxes_only, boxes_only
    return core, jpq.attach(core, network, sites, Ranked, lambda _: (Fixed(8), Fixed(8)), batches, "saliency").eval()


@cache
def salient(model: nn.Module) -> dict[str, torch.Tensor]:
    """Saliency of the network that runs: with 8 bits."""
    net = attached(model)[1]
    found = channel_saliency(net, net.network, net.sites, detector.saliency_batches(model, seen(RANK)))
    return {name: values for name, values in found.items() if values is not None}


def rank_by(net: CompressedModel, model: nn.Module, run: Run) -> None:
    """Write the run's ranking into the gates."""
    if run.score == "saliency":
        values = salient(model)
    elif run.score == "random":
        draw = torch.Generator().manual_seed(run.seed)
        values = {site.name: torch.rand(site.n, generator=draw) for site in net.sites}
    else:
        values = {site.name: l1(net, site) for site in net.sites}
    if run.ranking == "global":
        values = {name: own / len(own) ** 0.5 for name, own in values.items()}
    if run.ranking in ("global", "even"):
        rank_network(net, values)
    elif run.score == "l1":
        rank(net, L1())
    else:
        for site, gate in zip(net.sites, net.gates, strict=True):
            gate.margins[0, values[site.name].argsort()] = torch.arange(1.0, site.n + 1) / site.n


@torch.no_grad()
def l1(net: CompressedModel, site: jpq.tracing.sites.Site) -> torch.Tensor:
    """[n], of root mean square 1: the sum of |w| over all that reads each channel, as `L1` counts."""
    sums = sum(tap.structure.pool(net.layer(tap.layer).weight.abs())[0] for tap in site.taps)
    return sums / sums.square().mean().sqrt()


def measured(model: nn.Module, run: Run) -> tuple[nn.Module, dict[str, object]]:
    """The small detector, and its row."""
    start = time.process_time()
    torch.manual_seed(run.seed)
    core, net = copy.deepcopy(attached(model))
    full = costs.baseline(net.exact_usage())
    if run.score != "none":
        rank_by(net, model, run)
        net.freeze(jpq.discretize(net, parse_targets({"bops": run.target}, net.exact_usage())))
    else:
        net.freeze(net.plan())
    small, _ = jpq.rebuild(net.eval(), core)
    x = detector.prepare_images(model, seen(2)[0][0])
    apart = verify.difference(net, small, x)
    del net
    smaller = detector.reassemble(model, small)
    if run.tune:
        fit(smaller, data("tune"), run.tune, 1e-3, run.seed, batch=16)
        reestimate_batchnorm(
            small, ((detector.prepare_images(model, images), None) for images, _ in data("tune").batches(BATCH))
        )
    split = "test" if run.tune else "held-out"
    detections, targets = found(smaller, data(split)), data(split).targets
    ap50, ap = average_precisions(detections, targets)
    counted = jpq.measure(small.eval(), x)
    largest = onnx_ap = None
    if run.tune and run.score == "saliency":
        largest, onnx_ap = outside(model, small, data(split))
    return smaller, {
        "model": "ssdlite320_mobilenet_v3_large",
        "data": "shapes",
        "image": shapes.SIDE,
        "score": run.score,
        "ranking": run.ranking,
        "target": run.target,
        "tune": run.tune,
        "seed": run.seed,
        "split": split,
        "ap50": round(ap50, 4),
        "ap": round(ap, 4),
        "bops_share": round(counted["bops"] / full["bops"], 6),
        "macs": counted["macs"],
        "parameters": sum(p.numel() for p in small.parameters()),
        "dense_macs": full["macs"],
        "masked_vs_rebuilt": float(f"{apart:.2g}"),
        "onnx_largest": largest,
        "onnx_ap50": onnx_ap,
        "n": len(targets),
        "seconds": round(time.process_time() - start),
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "command": run.command(),
    }


def average_precisions(
    detections: Sequence[Mapping[str, torch.Tensor]], targets: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[float, float]:
    """Mean average precision at IoU .5, and over IoU .5 to .95, each in [0, 1]; one entry per image."""
    metric = MeanAveragePrecision()
    metric.warn_on_many_detections = False
    metric.update([dict(x) for x in detections], [dict(x) for x in targets])
    figures = metric.compute()
    return float(figures["map_50"]), float(figures["map"])


def outside(model: nn.Module, small: nn.Module, images: shapes.Shapes) -> tuple[float, float]:
    """(largest difference on 32 images, AP at .5 on all) of the exported core in onnxruntime."""
    batch, _ = next(images.batches(BATCH))
    x = detector.prepare_images(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "core.onnx"
        jpq.export_onnx(small, x[:2], path)
        compared = verify.exported(small, path, [(x, None)])["rebuilt_vs_onnxruntime"]
        runtime = detector.reassemble(model, Session(path, threads=1, optimised=False))
        ap50, _ = average_precisions(found(runtime, images), images.targets)
    return float(f"{compared['largest_relative_difference']:.2g}"), round(ap50, 4)


def float_row(model: nn.Module, split: str, command: str) -> dict[str, object]:
    """The detector as it was trained."""
    detections, targets = found(model, data(split)), data(split).targets
    ap50, ap = average_precisions(detections, targets)
    core = detector.detector_core(model)
    macs = sum(layer.macs for layer in jpq.trace(core, detector.prepare_images(model, seen(2)[0][0])).layers)
    return {
        "model": "ssdlite320_mobilenet_v3_large",
        "data": "shapes",
        "image": shapes.SIDE,
        "score": "float",
        "ranking": "-",
        "target": "100%",
        "tune": int(split == "test"),
        "seed": 0,
        "split": split,
        "ap50": round(ap50, 4),
        "ap": round(ap, 4),
        "bops_share": 1,
        "macs": macs,
        "parameters": sum(p.numel() for p in core.parameters()),
        "dense_macs": macs,
        "masked_vs_rebuilt": None,
        "onnx_largest": None,
        "onnx_ap50": None,
        "n": len(targets),
        "seconds": None,
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "command": command,
    }


def done() -> set[tuple[str, ...]]:
    if not TABLE.exists():
        return set()
    return {tuple(row) for row in pd.read_csv(TABLE, dtype=str)[KEY].itertuples(index=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", nargs="+", default=["saliency", "l1", "random"])
    parser.add_argument(
        "--rankings", nargs="+", default=["even", "global", "uniform"], choices=["global", "even", "uniform", "-"]
    )
    parser.add_argument("--targets", nargs="+", default=["5%", "4%", "3%", "2%"])
    parser.add_argument("--tune", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--weights", type=Path, default=Path(tempfile.gettempdir()) / "jpq-shapes.pt")
    parser.add_argument("--plot", action="store_true", help="only draw what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.plot:
        model = trained(args.weights)
        for split, tune in (("held-out", "0"), ("test", "1")):
            if ("float", "-", "100%", tune, "0") not in done():
                append(TABLE, float_row(model, split, shlex.join(["python", "studies/detection.py"])))
        for run in (Run(*keys) for keys in _grid(args)):
            if tuple(map(str, (run.score, run.ranking, run.target, run.tune, run.seed))) in done():
                continue
            print(run, flush=True)
            smaller, row = measured(model, run)
            append(TABLE, row)
            print({k: row[k] for k in ("ap50", "ap", "bops_share", "masked_vs_rebuilt", "onnx_largest", "onnx_ap50")})
            if (run.score, run.ranking, run.target, run.tune, run.seed) == ("saliency", "even", "3%", 1, 0):
                titles = "float", f"8 bits, {row['bops_share']:.2%} of the BOPs"
                shown(model, smaller, RESULTS / "detection_boxes.png", titles)
    table = pd.read_csv(TABLE)
    print(
        table.groupby(["tune", "target", "ranking", "score"])
        .agg(
            runs=("ap50", "size"),
            ap50=("ap50", "mean"),
            ap=("ap", "mean"),
            bops_share=("bops_share", "mean"),
        )
        .to_string()
    )
    compared(TABLE)


def _grid(args: argparse.Namespace) -> list[tuple[str, str, str, int, int]]:
    return [
        (score, ranking, target, tune, seed)
        for seed in args.seeds
        for tune in args.tune
        for target in args.targets
        for ranking in args.rankings
        for score in args.scores
    ]


if __name__ == "__main__":
    main()
