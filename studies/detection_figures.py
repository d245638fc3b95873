"""Pictures and the README's table of the detection study, from its CSV."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import shapes
import torch
from grid import RESULTS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from shapes_detector import data, found, part_of
from torch import nn
from torchvision.utils import draw_bounding_boxes

TABLE = RESULTS / "detection.csv"
COLOURS = {"saliency": "#0072B2", "l1": "#E69F00", "random": "#555555"}


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
