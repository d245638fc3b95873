"""Pruning without data: does retraining make up for it? Kernel patterns, and a quarter of the kernels gone whole.

    python studies/private.py --data-root DIR

Four ways to the same structure and density: `one-shot` projects the dense weights (magnitude), `noise` and `matched`
are jpq prune-private on random images, `real` is the same ADMM on training images. Then each is retrained alike with
its mask held, by jpq.compress(mask=...), onto the same budget; without distillation. Accuracies are of the test
images: right after pruning (in floating point) and at the end; nothing was chosen by them. Source of
the claim that retraining recovers what pruning on random images costs: Gong et al., GLSVLSI 2020, arXiv:2003.06513.
Norms are not measured anew at the end, as jpq optimize would.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path

import grid
import methods
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn
from trial import float_model

import jpq
from jpq.compression import external_mask
from jpq.costs import COSTS, baseline
from jpq.data_free.layerwise_admm import AdmmSettings, DrawImages
from jpq.data_free.prune import DataFreeResult, layer_gate, mask_sites, project_once, prune_model, random_images
from jpq.tasks import load
from jpq.tasks.classification import evaluate
from jpq.tasks.data import RECIPES, Data

WAYS = ("one-shot", "noise", "matched", "real")
DENSITY = 0.75  # of the kernels
HOW = AdmmSettings(steps=200, images=128, batch_size=64)
PATH = grid.RESULTS / "private.csv"
KEY = ["data", "way", "seed"]


@dataclass(frozen=True)
class Setting:
    """One network on one data set, and how long the client trains."""

    model: str
    data: str
    target: str  # bit-operations
    search: int  # optimiser steps
    tune: int
    limit: int | None = None

    def load(self, root: Path, seed: int) -> tuple[nn.Module, Data]:
        """(float model, data)."""
        base = replace(methods.BASE, task=replace(methods.BASE.task, data_root=root))
        task = replace(base.task, model=self.model, data=self.data, limit=self.limit)
        config = replace(base, task=task, train=replace(base.train, batch_size=64), run=replace(base.run, seed=seed))
        data = load.read_data(config, torch.device("cpu"))
        if self.data == "digits":
            return float_model(seed), data
        shared = methods.prepare(base).task.weights
        return load.dense_model(replace(config, task=replace(task, weights=shared)), data, torch.device("cpu")), data


SETTINGS = {
    "digits": Setting("convnet", "digits", "0.5%", 200, 100),
    "fashion-mnist": Setting("resnet8", "fashion-mnist", "0.5%", 120, 60, 10_000),
}


def images(data: Data, seed: int) -> DrawImages:
    """Training images, without augmentation."""
    generator = torch.Generator().manual_seed(seed)
    train = data.train
    return lambda n: train.normalise(train.images[torch.randint(train.size, (n,), generator=generator)])


def prune(way: str, model: nn.Module, data: Data, seed: int) -> tuple[DataFreeResult, nn.Module]:
    """(masks and errors, the pruned model)."""
    r = RECIPES[data.name]
    draw = (
        images(data, seed) if way == "real" else random_images(data.shape, (r.mean, r.std), seed, torch.device("cpu"))
    )
    how = replace(HOW, matched=way in ("matched", "one-shot"), seed=seed)
    if way != "one-shot":
        done = prune_model(model, draw, "pattern", DENSITY, settings=how, threads=1)
        return done, done.model
    network = jpq.trace(model, data.example)
    sites = mask_sites(network, "pattern", ())
    gates = [layer_gate(network, site, DENSITY, how) for site in sites]
    crude = project_once(model, sites, gates)
    return DataFreeResult(crude, sites, tuple(g.keep() for g in gates), (), float("nan"), float("nan")), crude


def retrain(mask: Path, model: nn.Module, data: Data, asked: Setting, seed: int) -> tuple[float, float]:
    """(test accuracy, share of the budget that is used) after the client's part."""
    torch.manual_seed(seed)
    batches = (batch for epoch in count(1000 * seed) for batch in data.train.epoch(epoch))
    first = torch.cat([x for x, _ in islice(batches, 4)])
    net = jpq.compress(model, first, mask=mask, bops=asked.target, steps=asked.search)
    for steps, lr in ((asked.search, 2e-3), (asked.tune, 5e-4)):
        optimizer = torch.optim.Adam(net.groups(lr=lr))
        net.train()
        for x, y in islice(batches, steps):
            optimizer.zero_grad()
            (F.cross_entropy(net(x), y) + net.pressure()).backward()
            optimizer.step()
            net.step()
        net.discretize()
    uses = net.net.exact_usage()
    used = float(COSTS["bops"](uses)) / baseline(uses)["bops"] / (float(asked.target.rstrip("%")) / 100)
    return evaluate(net.finalize(), data.test), used


def one(way: str, asked: Setting, root: Path, seed: int, command: str) -> dict[str, object]:
    """One line of the CSV."""
    model, data = asked.load(root, seed)
    begun = time.process_time()
    done, small = prune(way, model, data, seed)
    seconds = time.process_time() - begun
    after = evaluate(small, data.test)
    with tempfile.TemporaryDirectory() as folder:
        external_mask.write(Path(folder), done.sites, done.kept, small, {"name": asked.model})
        accuracy, used = retrain(Path(folder), model, data, asked, seed)
    rows = done.layers
    mean = lambda name: round(sum(getattr(r, name) for r in rows) / len(rows), 4) if rows else ""  # noqa: E731
    return {
        "model": asked.model,
        "data": asked.data,
        "way": way,
        "seed": seed,
        "density": DENSITY,
        "float_accuracy": round(evaluate(model, data.test), 4),
        "after_pruning": round(after, 4),
        "accuracy": round(accuracy, 4),
        "target": asked.target,
        "target_used": round(used, 4),
        "layer_error": mean("error"),
        "layer_error_one_shot": mean("error_one_shot"),
        "residual": mean("residual"),
        "dead": mean("dead"),
        "admm_steps": HOW.steps if rows else 0,
        "client_steps": asked.search + asked.tune,
        "prune_seconds": round(seconds, 1),
        "test_images": data.test.size,
        "threads": torch.get_num_threads(),
        "hardware": grid.hardware(),
        "torch": torch.__version__,
        "command": command,
    }


def picture() -> None:
    """Accuracy right after pruning and after retraining, a bar a way, a dot a seed."""
    table = pd.read_csv(PATH)
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (name, runs) in zip(
        figure.subplots(1, table.data.nunique(), squeeze=False)[0], table.groupby("data"), strict=True
    ):
        for side, (column, label) in enumerate((("after_pruning", "right after"), ("accuracy", "retrained"))):
            means = runs.groupby("way")[column].mean().reindex(WAYS)
            places = [i + 0.4 * side - 0.2 for i in range(len(WAYS))]
            axes.bar(places, 100 * means, 0.38, color=("#E69F00", "#0072B2")[side], label=label)
            for place, way in zip(places, WAYS, strict=True):
                dots = 100 * runs[runs.way == way][column]
                axes.scatter([place] * len(dots), dots, s=10, color="black", zorder=3)
        axes.axhline(
            100 * runs.float_accuracy.mean(), color="#555555", linestyle="--", linewidth=1, label="float model"
        )
        axes.set(
            xticks=range(len(WAYS)), ylim=(0, 100), title=f"{runs.model.iloc[0]}, {name}, n = {runs.seed.nunique()}"
        )
        axes.set_xticklabels(WAYS)
    figure.axes[0].set_ylabel("test accuracy, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    FigureCanvasAgg(figure)
    figure.savefig(PATH.with_suffix(".png"), dpi=110)


def main() -> None:
    """Runs what is missing, prints the means, draws."""
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--plot", action="store_true", help="only draw what is there")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for name in args.data if not args.plot else []:
        for seed in args.seeds:
            for way in args.ways:
                table = pd.read_csv(PATH, dtype=str) if PATH.exists() else pd.DataFrame(columns=KEY)
                if (name, way, str(seed)) in set(table[KEY].itertuples(index=False, name=None)):
                    continue
                command = shlex.join(
                    ["python", "studies/private.py", "--data", name, "--ways", way, "--seeds", str(seed)]
                )
                row = one(way, SETTINGS[name], args.data_root, seed, command)
                grid.append(PATH, row)
                print({k: row[k] for k in (*KEY, "after_pruning", "accuracy", "target_used")}, flush=True)
    table = pd.read_csv(PATH)
    means = table.groupby(["data", "way"]).agg(
        n=("seed", "size"),
        float=("float_accuracy", "mean"),
        after_pruning=("after_pruning", "mean"),
        accuracy=("accuracy", "mean"),
        least=("accuracy", "min"),
        layer_error=("layer_error", "mean"),
        layer_error_one_shot=("layer_error_one_shot", "mean"),
        residual=("residual", "mean"),
    )
    print(means.round(4).to_string())
    picture()


if __name__ == "__main__":
    main()
