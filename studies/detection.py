"""Detection saliency beside L1 and random channels: a torchvision detector, 8 bits, pruned to equal BOPs.

    python studies/detection.py [--scores saliency l1 random] [--rankings global uniform] [--targets 3% ...]
                                [--tune 0 1] [--seeds 0 ...] [--weights FILE] [--plot]

The detector is torchvision's ssdlite320_mobilenet_v3_large (its factory, random weights, images of 128 x 128), trained
on 3,000 images of support/shapes.py for the first 13 epochs of a cycle of 18 (20 minutes of a core; kept in --weights).
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
five rounds: each would need its own training. Two shared x86-64 cores, November 2026, n = 1: with 3 % of the BOPs and
no training after pruning, saliency is ahead in all three rankings; after 40 steps random channels reach 97 %.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from support import shapes
from support.figures import save_figure
from support.result_rows import RESULTS, append_row, provenance
from support.shapes_detector import BATCH, data, detect, train, trained_detector
from torch import nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.utils import draw_bounding_boxes

import jpq
from jpq import costs
from jpq.allocation import rank_units
from jpq.compression import reestimate_batchnorm
from jpq.costs import parse_targets
from jpq.detection import (
    DetectorCore,
    channel_saliency,
    extract_core,
    prepare_images,
    prepare_saliency_batches,
    rank_network,
    rankable_sites,
    reassemble_detector,
)
from jpq.export import Session, compare, difference
from jpq.methods.gates import Ranked
from jpq.methods.quantizers import Fixed
from jpq.methods.scores import L1
from jpq.tracing import Site

TABLE = RESULTS / "detection.csv"
RANKING_IMAGES = 64
KEY = ["score", "ranking", "target", "tune", "seed"]
COLOURS = {"saliency": "#0072B2", "l1": "#E69F00", "random": "#555555"}
MODEL = "ssdlite320_mobilenet_v3_large"


@dataclass(frozen=True)
class Run:
    """The settings of one row."""

    score: str
    ranking: str
    target: str
    tune: int
    seed: int

    def command(self) -> str:
        """The command that measures this row alone."""
        flags = f"--scores {self.score} --rankings {self.ranking} --targets {self.target} --tune {self.tune}"
        return f"python studies/detection.py {flags} --seeds {self.seed}"


def training_batches(n: int, size: int = 8) -> list[tuple[list[torch.Tensor], list[shapes.Target]]]:
    """The first n training images: small batches, since saliency holds every map and its gradient."""
    return list(data("tune").first(n).batches(size))


@cache
def attach_ranked(model: nn.Module) -> tuple[DetectorCore, jpq.CompressedModel]:
    """The detector's core, and its copy with 8 bits everywhere and a `Ranked` gate at each site."""
    core = extract_core(model)
    batches = [prepare_images(model, images) for images, _ in training_batches(RANKING_IMAGES)]
    network = jpq.trace(core, batches[0][:2])
    sites, boxes_only = rankable_sites(model, core, network, jpq.channels(network), batches[0])
    assert not boxes_only, boxes_only
    return core, jpq.attach(core, network, sites, Ranked, lambda _: (Fixed(8), Fixed(8)), batches, "saliency").eval()


@cache
def saliency_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Saliency of every site's channels in the network that runs: with 8 bits."""
    net = attach_ranked(model)[1]
    batches = prepare_saliency_batches(model, training_batches(RANKING_IMAGES))
    values = channel_saliency(net, net.network, net.sites, batches)
    return {name: saliency for name, saliency in values.items() if saliency is not None}


def write_ranking(net: jpq.CompressedModel, model: nn.Module, run: Run) -> None:
    """Write the run's ranking into the gates."""
    if run.score == "saliency":
        values = saliency_values(model)
    elif run.score == "random":
        draw = torch.Generator().manual_seed(run.seed)
        values = {site.name: torch.rand(site.n, generator=draw) for site in net.sites}
    else:
        values = {site.name: l1_values(net, site) for site in net.sites}
    if run.ranking == "global":
        values = {name: channels / len(channels) ** 0.5 for name, channels in values.items()}
    if run.ranking in ("global", "even"):
        rank_network(net, values)
    elif run.score == "l1":
        rank_units(net, L1())
    else:
        for site, gate in zip(net.sites, net.gates, strict=True):
            gate.margins[0, values[site.name].argsort()] = torch.arange(1.0, site.n + 1) / site.n


@torch.no_grad()
def l1_values(net: jpq.CompressedModel, site: Site) -> torch.Tensor:
    """[n], of root mean square 1: the sum of |w| over all that reads each channel, as `L1` counts."""
    sums = sum(tap.structure.pool(net.layer(tap.layer).weight.abs())[0] for tap in site.taps)
    return sums / sums.square().mean().sqrt()


def measure_run(model: nn.Module, run: Run) -> tuple[nn.Module, dict[str, object]]:
    """The small detector of one run, and its row."""
    start = time.process_time()
    torch.manual_seed(run.seed)
    core, net = copy.deepcopy(attach_ranked(model))
    dense = costs.baseline(net.exact_usage())
    if run.score != "none":
        write_ranking(net, model, run)
        net.freeze(jpq.discretize(net, parse_targets({"bops": run.target}, net.exact_usage())))
    else:
        net.freeze(net.plan())
    small_core, _ = jpq.rebuild(net.eval(), core)
    x = prepare_images(model, training_batches(2)[0][0])
    gap = difference(net, small_core, x)
    del net
    small = reassemble_detector(model, small_core)
    if run.tune:
        train(small, data("tune"), run.tune, 1e-3, run.seed, batch=16)
        tune_batches = ((prepare_images(model, images), None) for images, _ in data("tune").batches(BATCH))
        reestimate_batchnorm(small_core, tune_batches)
    images = data("test" if run.tune else "held-out")
    ap50, ap = average_precisions(detect(small, images), images.targets)
    counted = jpq.measure(small_core.eval(), x)
    onnx_difference = onnx_ap50 = None
    if run.tune and run.score == "saliency":
        onnx_difference, onnx_ap50 = measure_onnx(model, small_core, images)
    return small, {
        "model": MODEL,
        "data": "shapes",
        "image": shapes.SIDE,
        "score": run.score,
        "ranking": run.ranking,
        "target": run.target,
        "tune": run.tune,
        "seed": run.seed,
        "split": "test" if run.tune else "held-out",
        "ap50": round(ap50, 4),
        "ap": round(ap, 4),
        "bops_share": round(counted["bops"] / dense["bops"], 6),
        "macs": counted["macs"],
        "parameters": sum(p.numel() for p in small_core.parameters()),
        "dense_macs": dense["macs"],
        "masked_vs_rebuilt": float(f"{gap:.2g}"),
        "onnx_largest": onnx_difference,
        "onnx_ap50": onnx_ap50,
        "seconds": round(time.process_time() - start),
        **provenance(run.command(), len(images), ("torch", "torchmetrics")),
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


def measure_onnx(model: nn.Module, small_core: nn.Module, images: shapes.Shapes) -> tuple[float, float]:
    """(largest difference on 32 images, AP at .5 on all) of the exported core in onnxruntime."""
    batch, _ = next(images.batches(BATCH))
    x = prepare_images(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "core.onnx"
        jpq.export_onnx(small_core, x[:2], path)
        session = Session(path, threads=1, optimised=False)
        gap = compare(small_core, session, [(x, None)])["largest_relative_difference"]
        ap50, _ = average_precisions(detect(reassemble_detector(model, session), images), images.targets)
    return float(f"{gap:.2g}"), round(ap50, 4)


def float_row(model: nn.Module, split: str, command: str) -> dict[str, object]:
    """The row of the float detector."""
    images = data(split)
    ap50, ap = average_precisions(detect(model, images), images.targets)
    core = extract_core(model)
    macs = sum(layer.macs for layer in jpq.trace(core, prepare_images(model, training_batches(2)[0][0])).layers)
    return {
        "model": MODEL,
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
        "seconds": None,
        **provenance(command, len(images), ("torch", "torchmetrics")),
    }


def draw_scores() -> None:
    """Picture of AP as pruned and as trained, a bar per target, ranking and score; the float detector as a line."""
    table = pd.read_csv(TABLE)
    figure = Figure(figsize=(10, 5), layout="constrained")
    titles = [(0, "as pruned (held-out)"), (1, "after one epoch (test)")]
    for axes, (tune, title) in zip(figure.subplots(1, 2), titles, strict=True):
        rows = table[(table.tune == tune) & table.score.isin(COLOURS)].sort_values(["target", "ranking", "score"])
        names = [f"{row.target} {row.ranking}, {row.score}" for row in rows.itertuples()]
        bars = axes.barh(names, 100 * rows.ap50, color=[COLOURS[score] for score in rows.score])
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
        dense = table[(table.tune == tune) & (table.score == "float")].ap50.mean()
        axes.axvline(100 * dense, color="#999999", linestyle="--", linewidth=1, label="float")
        axes.set(xlabel="AP at IoU .5, %", title=title, xlim=(0, 112))
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    save_figure(figure, TABLE, dpi=100)


def draw_detections(before: nn.Module, after: nn.Module, path: Path, titles: tuple[str, str]) -> None:
    """Picture of the detections above .5 on the first test images, before and after."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    images = data("test").first(5)
    for row, model, title in zip(figure.subplots(2, len(images)), (before, after), titles, strict=True):
        row[0].set_ylabel(title, fontsize=8)
        for axes, image, boxes in zip(row, images.images, detect(model, images), strict=True):
            sure = boxes["scores"] > 0.5
            large = torch.nn.functional.interpolate(image[None].float(), scale_factor=3)[0].byte()
            names = [
                f"{shapes.CLASSES[k]} {s:.2f}"
                for k, s in zip(boxes["labels"][sure], boxes["scores"][sure], strict=True)
            ]
            if names:
                large = draw_bounding_boxes(large, 3 * boxes["boxes"][sure], names, colors="white", width=2)
            axes.imshow(large.permute(1, 2, 0).numpy())
            axes.set(xticks=[], yticks=[])
    save_figure(figure, path, dpi=80)


def detection_table() -> str:
    """README's table: AP at IoU .5 with 3 % of the BOPs, a row for each score and ranking."""
    table = pd.read_csv(TABLE)
    rows = table[(table.target == "3%") & (table.seed == 0)]
    lines = ["| score | ranking | as pruned, % | after 40 steps of training, % |", "|---|---|---|---|"]
    for (score, ranking), runs in rows.groupby(["score", "ranking"], sort=False):
        cells = {int(tune): f"{100 * ap50.iloc[0]:.1f}" for tune, ap50 in runs.groupby("tune").ap50}
        lines.append(f"| {score} | {ranking} | {cells.get(0, '-')} | {cells.get(1, '-')} |")
    dense = {int(tune): 100 * ap50.iloc[0] for tune, ap50 in table[table.score == "float"].groupby("tune").ap50}
    n = {int(tune): int(images.max()) for tune, images in rows.groupby("tune").n}
    about = (
        f"AP at IoU .5 of {MODEL} on synthetic shapes with 8 bits and 3 % of the BOPs, one seed; "
        f"as pruned on {n[0]} held-out images (float {dense[0]:.1f}), trained on {n[1]} test images (float "
        f"{dense[1]:.1f})"
    )
    return "\n".join([f"{about}; `python studies/detection.py`:", "", *lines, ""])


def known_keys() -> set[tuple[str, ...]]:
    """The keys of the rows that are there already."""
    if not TABLE.exists():
        return set()
    return {tuple(row) for row in pd.read_csv(TABLE, dtype=str)[KEY].itertuples(index=False)}


def main() -> None:
    """Run what is missing, print the means, draw."""
    args = _arguments()
    torch.set_num_threads(1)
    if not args.plot:
        _run_missing(args)
    columns = {"runs": ("ap50", "size"), "ap50": ("ap50", "mean"), "ap": ("ap", "mean")}
    means = pd.read_csv(TABLE).groupby(["tune", "target", "ranking", "score"])
    print(means.agg(**columns, bops_share=("bops_share", "mean")).to_string())
    draw_scores()


def _arguments() -> argparse.Namespace:
    """The parsed command line."""
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
    return parser.parse_args()


def _run_missing(args: argparse.Namespace) -> None:
    """Measure and append every row that is not there yet."""
    model = trained_detector(args.weights)
    for split, tune in (("held-out", "0"), ("test", "1")):
        if ("float", "-", "100%", tune, "0") not in known_keys():
            append_row(TABLE, float_row(model, split, shlex.join(["python", "studies/detection.py"])))
    for seed, tune, target, ranking, score in product(args.seeds, args.tune, args.targets, args.rankings, args.scores):
        run = Run(score, ranking, target, tune, seed)
        if tuple(map(str, astuple(run))) in known_keys():
            continue
        print(run, flush=True)
        small, row = measure_run(model, run)
        append_row(TABLE, row)
        print({k: row[k] for k in ("ap50", "ap", "bops_share", "masked_vs_rebuilt", "onnx_largest", "onnx_ap50")})
        if run == Run("saliency", "even", "3%", 1, 0):
            titles = "float", f"8 bits, {row['bops_share']:.2%} of the BOPs"
            draw_detections(model, small, RESULTS / "detection_boxes.png", titles)


if __name__ == "__main__":
    main()
