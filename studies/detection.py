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
    ap50, ap            mean average precision at IoU .5 and over .5 to .95, in [0, 1]
    bops_share          BOPs over those of the float32 detector (backbone and head), counted on the rebuilt one
    masked_vs_rebuilt   largest relative difference of their outputs in float64, at landing
    onnx_largest        largest relative difference of rebuilt and exported outputs in onnxruntime, over 32 images (a
                        value at a rounding boundary makes it large); onnx_ap50: of the exported file, over `n` images

SSDlite's heads have no layer that feeds only boxes, so all sites are ranked. We prune in one step, not in the sheet's
five rounds: each would need its own training.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import shapes
import torch
from grid import RESULTS, append, hardware
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.utils import draw_bounding_boxes

import jpq
from jpq import costs, detection
from jpq.allocators import rank
from jpq.allocators.salient import rank_everywhere, saliency
from jpq.average_precision import average_precision, coco
from jpq.budget import targets
from jpq.exporters import verify
from jpq.exporters.onnx import Session
from jpq.gates import Ranked
from jpq.network.compressed import Compressed
from jpq.quantizers import Fixed
from jpq.scores import L1
from jpq.train import reestimate

BATCH = 32
EPOCHS, CYCLE = 13, 18  # of float training, and of the learning rate's curve
TRAIN, TUNE, RANK = 3000, 640, 64  # images
DENSE = "6.25%"  # 8 bits, nothing pruned
TABLE = RESULTS / "detection.csv"
KEY = ["score", "ranking", "target", "tune", "seed"]
COLOURS = {"saliency": "#0072B2", "l1": "#E69F00", "random": "#555555"}


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


@cache
def data(split: str) -> shapes.Shapes:
    """Images by their seeds; "tune" are the first of "train"."""
    return shapes.make(*{"train": (TRAIN, 1), "tune": (TUNE, 1), "held-out": (200, 2), "test": (300, 5)}[split])


def part_of(whole: shapes.Shapes, n: int) -> shapes.Shapes:
    return shapes.Shapes(whole.images[:n], whole.targets[:n])


def detector() -> nn.Module:
    """torchvision's SSDlite with MobileNetV3, random weights, for images of 128 x 128."""
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=len(shapes.CLASSES))
    side = shapes.SIDE
    model.transform = GeneralizedRCNNTransform(
        side, side, [0.5] * 3, [0.5] * 3, size_divisible=1, fixed_size=(side, side)
    )
    return model


def fit(
    model: nn.Module,
    images: shapes.Shapes,
    epochs: int,
    lr: float,
    seed: int,
    cycle: int = 0,
    batch: int = BATCH,
    save: Path | None = None,
) -> None:
    """Train with AdamW on the detector's own losses, one cycle of the learning rate over `cycle` epochs."""
    own = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in own if p.dim() > 1], "weight_decay": 0.01},
              {"params": [p for p in own if p.dim() <= 1], "weight_decay": 0.0}]  # fmt: skip
    optim = torch.optim.AdamW(groups, lr=lr)
    steps = (cycle or epochs) * -(-len(images) // batch)
    curve = torch.optim.lr_scheduler.OneCycleLR(optim, lr, total_steps=steps, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        losses, start = [], time.time()
        for shown, wanted in images.batches(batch, order):
            loss = sum(model(shown, wanted).values())
            optim.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(own, 5.0)
            optim.step()
            curve.step()
            losses.append(float(loss.detach()))
        mean = sum(losses) / len(losses)
        print(f"  epoch {epoch + 1}/{epochs} loss {mean:.3f} {time.time() - start:.0f} s", flush=True)
        if save is not None:
            torch.save(model.state_dict(), save)


@torch.no_grad()
def found(model: nn.Module, images: shapes.Shapes) -> list[dict[str, torch.Tensor]]:
    """Detections on every image."""
    model.eval()
    return [d for batch, _ in images.batches(BATCH) for d in model(batch)]


def trained(weights: Path) -> nn.Module:
    """The float detector; trained once."""
    torch.manual_seed(0)
    model = detector()
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
    else:
        fit(model, data("train"), EPOCHS, 2e-3, 0, CYCLE, save=weights)
    return model.eval()


def seen(n: int, size: int = 8) -> list[detection.Batch]:
    """The first training images: small batches, since saliency holds every map and its gradient."""
    return list(part_of(data("tune"), n).batches(size))


@cache
def attached(model: nn.Module) -> tuple[detection.Core, Compressed]:
    """The detector's core, and its copy with 8 bits everywhere and all that `rank` needs."""
    core = detection.core(model)
    batches = [detection.prepared(model, images) for images, _ in seen(RANK)]
    network = jpq.trace(core, batches[0][:2])
    sites, boxes_only = detection.rankable(model, core, network, jpq.channels(network), batches[0])
    assert not boxes_only, boxes_only
    return core, jpq.attach(core, network, sites, Ranked, lambda _: (Fixed(8), Fixed(8)), batches, "saliency").eval()


@cache
def salient(model: nn.Module) -> dict[str, torch.Tensor]:
    """Saliency of the network that runs: with 8 bits."""
    net = attached(model)[1]
    found = saliency(net, net.network, net.sites, detection.scenes(model, seen(RANK)))
    return {name: values for name, values in found.items() if values is not None}


def rank_by(net: Compressed, model: nn.Module, run: Run) -> None:
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
        rank_everywhere(net, values)
    elif run.score == "l1":
        rank(net, L1())
    else:
        for site, gate in zip(net.sites, net.gates, strict=True):
            gate.margins[0, values[site.name].argsort()] = torch.arange(1.0, site.n + 1) / site.n


@torch.no_grad()
def l1(net: Compressed, site: jpq.network.sites.Site) -> torch.Tensor:
    """[n], of root mean square 1: the sum of |w| over all that reads each channel, as `L1` counts."""
    sums = sum(tap.structure.pool(net.layer(tap.layer).weight.abs())[0] for tap in site.taps)
    return sums / sums.square().mean().sqrt()


def measured(model: nn.Module, run: Run) -> tuple[nn.Module, dict[str, object]]:
    """The small detector, and its row."""
    start = time.process_time()
    torch.manual_seed(run.seed)
    core, net = copy.deepcopy(attached(model))
    full = costs.baseline(net.exact())
    if run.score != "none":
        rank_by(net, model, run)
        net.settle(jpq.land(net, targets({"bops": run.target}, net.exact())))
    else:
        net.settle(net.plan())
    small, _ = jpq.rebuild(net.eval(), core)
    x = detection.prepared(model, seen(2)[0][0])
    apart = verify.difference(net, small, x)
    del net
    smaller = detection.around(model, small)
    if run.tune:
        fit(smaller, data("tune"), run.tune, 1e-3, run.seed, batch=16)
        reestimate(small, ((detection.prepared(model, images), None) for images, _ in data("tune").batches(BATCH)))
    split = "test" if run.tune else "held-out"
    detections, wanted = found(smaller, data(split)), data(split).targets
    counted = jpq.measure(small.eval(), x)
    largest = onnx_ap = None
    if run.tune and run.score == "saliency":
        largest, onnx_ap = outside(model, small, data(split))
    return smaller, {
        "model": "ssdlite320_mobilenet_v3_large", "data": "shapes", "image": shapes.SIDE, "score": run.score,
        "ranking": run.ranking, "target": run.target, "tune": run.tune, "seed": run.seed, "split": split,
        "ap50": round(average_precision(detections, wanted), 4), "ap": round(coco(detections, wanted), 4),
        "bops_share": round(counted["bops"] / full["bops"], 6), "macs": counted["macs"],
        "parameters": sum(p.numel() for p in small.parameters()), "dense_macs": full["macs"],
        "masked_vs_rebuilt": float(f"{apart:.2g}"), "onnx_largest": largest, "onnx_ap50": onnx_ap, "n": len(wanted),
        "seconds": round(time.process_time() - start), "threads": torch.get_num_threads(), "hardware": hardware(),
        "torch": torch.__version__, "command": run.command(),
    }  # fmt: skip


def outside(model: nn.Module, small: nn.Module, images: shapes.Shapes) -> tuple[float, float]:
    """(largest difference on 32 images, AP at .5 on all) of the exported core in onnxruntime."""
    batch, _ = next(images.batches(BATCH))
    x = detection.prepared(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "core.onnx"
        jpq.export_onnx(small, x[:2], path)
        compared = verify.exported(small, path, [(x, None)])["rebuilt_vs_onnxruntime"]
        runtime = detection.around(model, Session(path, threads=1, optimised=False))
        ap50 = average_precision(found(runtime, images), images.targets)
    return float(f"{compared['largest_relative_difference']:.2g}"), round(ap50, 4)


def float_row(model: nn.Module, split: str, command: str) -> dict[str, object]:
    """The detector as it was trained."""
    detections, wanted = found(model, data(split)), data(split).targets
    core = detection.core(model)
    macs = sum(layer.macs for layer in jpq.trace(core, detection.prepared(model, seen(2)[0][0])).layers)
    return {
        "model": "ssdlite320_mobilenet_v3_large", "data": "shapes", "image": shapes.SIDE, "score": "float",
        "ranking": "-", "target": "100%", "tune": int(split == "test"), "seed": 0, "split": split,
        "ap50": round(average_precision(detections, wanted), 4), "ap": round(coco(detections, wanted), 4),
        "bops_share": 1, "macs": macs, "parameters": sum(p.numel() for p in core.parameters()), "dense_macs": macs,
        "masked_vs_rebuilt": None, "onnx_largest": None, "onnx_ap50": None, "n": len(wanted), "seconds": None,
        "threads": torch.get_num_threads(), "hardware": hardware(), "torch": torch.__version__, "command": command,
    }  # fmt: skip


def done() -> set[tuple[str, ...]]:
    if not TABLE.exists():
        return set()
    return {tuple(row) for row in pd.read_csv(TABLE, dtype=str)[KEY].itertuples(index=False)}


def compared(path: Path) -> None:
    """AP as pruned and as trained, a bar for each target, ranking and score; the float detector as a line."""
    table = pd.read_csv(path)
    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, (tune, title) in zip(
        figure.subplots(1, 2), [(0, "as pruned (held-out)"), (1, "after one epoch (test)")], strict=True
    ):
        rows = table[(table.tune == tune) & table.score.isin(COLOURS)].sort_values(["target", "ranking", "score"])
        names = [f"{row.target} {row.ranking}, {row.score}" for row in rows.itertuples()]
        bars = axes.barh(names, 100 * rows.ap50, color=[COLOURS[score] for score in rows.score])
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
        dense = table[(table.tune == tune) & (table.score == "float")].ap50.mean()
        axes.axvline(100 * dense, color="#999999", linestyle="--", linewidth=1, label="float")
        axes.set(xlabel="AP at IoU .5, %", title=title, xlim=(0, 112))
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    FigureCanvasAgg(figure)
    figure.savefig(path.with_suffix(".png"), dpi=100)


def shown(before: nn.Module, after: nn.Module, path: Path, titles: tuple[str, str]) -> None:
    """Detections above .5 on the first test images, before and after."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    some = part_of(data("test"), 5)
    for row, model, title in zip(figure.subplots(2, len(some)), (before, after), titles, strict=True):
        row[0].set_ylabel(title, fontsize=8)
        for axes, image, boxes in zip(row, some.images, found(model, some), strict=True):
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
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=80)


def summary() -> str:
    """What README says: AP at IoU .5 with 3 % of the BOPs, a row for each score and ranking."""
    table = pd.read_csv(TABLE)
    rows = table[(table.target == "3%") & (table.seed == 0)]
    lines = ["| score | ranking | as pruned, % | after 40 steps of training, % |", "|---|---|---|---|"]
    for (score, ranking), runs in rows.groupby(["score", "ranking"], sort=False):
        shown = {int(tune): f"{100 * own.ap50.iloc[0]:.1f}" for tune, own in runs.groupby("tune")}
        lines.append(f"| {score} | {ranking} | {shown.get(0, '-')} | {shown.get(1, '-')} |")
    dense = {int(tune): 100 * own.ap50.iloc[0] for tune, own in table[table.score == "float"].groupby("tune")}
    n = {int(tune): int(own.n.max()) for tune, own in rows.groupby("tune")}
    about = (
        f"AP at IoU .5 of ssdlite320_mobilenet_v3_large on synthetic shapes with 8 bits and 3 % of the BOPs, one seed; "
        f"as pruned on {n[0]} held-out images (float {dense[0]:.1f}), trained on {n[1]} test images (float "
        f"{dense[1]:.1f})"
    )
    return "\n".join([f"{about}; `python studies/detection.py`:", "", *lines])


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
    print(table.groupby(["tune", "target", "ranking", "score"]).agg(
        runs=("ap50", "size"), ap50=("ap50", "mean"), ap=("ap", "mean"), bops_share=("bops_share", "mean"),
    ).to_string())  # fmt: skip
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
