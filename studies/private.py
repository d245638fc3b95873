"""Pruning without data and retraining under the mask: kernel patterns, and a quarter of the kernels removed.

    python studies/private.py --data-root DIR

Four ways to the same structure and density: `one-shot` projects the dense weights (magnitude), `noise` and `matched`
are jpq prune-private on random images, `real` is the same ADMM on training images. Then each is retrained alike with
its mask held, by `jpq.compress` with `Decide(mask=...)`, onto the same budget; without distillation. Accuracies are of
the test images: right after pruning (in floating point) and at the end; nothing was chosen by them. Source of
the claim that retraining recovers what pruning on random images costs: Gong et al., GLSVLSI 2020, arXiv:2003.06513.
BatchNorm is not re-estimated at the end, as jpq optimize would. Two shared x86-64 cores, November 2026: on the digits
(n = 3) 19 % right after pruning on random images, 47 % on real ones; after 300 steps of retraining at 0.5 % of the BOPs
96.2, 95.8 and 95.1 % (random images, real images, one projection).
"""

from __future__ import annotations

import argparse
import logging
import shlex
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import count, islice, product
from pathlib import Path

import methods
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from support.figures import save_figure
from support.result_rows import RESULTS, append_row, provenance
from support.trial import float_model
from torch import nn

import jpq
from jpq.compression import write_mask
from jpq.config import Budget, Decide
from jpq.costs import COSTS, baseline
from jpq.data_free import (
    AdmmSettings,
    DataFreeResult,
    build_layer_gate,
    mask_sites,
    project_weights_once,
    prune_model,
    random_images,
)
from jpq.tasks import CLASSIFICATION, PREPROCESSING, Data, load_dense_model, read_data

WAYS = ("one-shot", "noise", "matched", "real")
DENSITY = 0.75  # of the kernels
ADMM = AdmmSettings(steps=200, images=128, batch_size=64)
PATH = RESULTS / "private.csv"
KEY = ["data", "way", "seed"]


@dataclass(frozen=True)
class Setting:
    """One network on one data set, its budget, and the length of the retraining."""

    model: str
    data: str
    target: str  # bit-operations
    search: int  # optimizer steps
    tune: int  # optimizer steps
    limit: int | None = None  # training images

    def load(self, root: Path, seed: int) -> tuple[nn.Module, Data]:
        """(float model, data)."""
        base = replace(methods.BASE, task=replace(methods.BASE.task, data_root=root))
        task = replace(base.task, model=self.model, data=self.data, limit=self.limit)
        config = replace(base, task=task, train=replace(base.train, batch_size=64), run=replace(base.run, seed=seed))
        data = read_data(config, torch.device("cpu"))
        if self.data == "digits":
            return float_model(seed), data
        shared = methods.with_shared_weights(base).task.weights
        return load_dense_model(replace(config, task=replace(task, weights=shared)), data, torch.device("cpu")), data


SETTINGS = {
    "digits": Setting("convnet", "digits", "0.5%", 200, 100),
    "fashion-mnist": Setting("resnet8", "fashion-mnist", "0.5%", 120, 60, 10_000),
}


def prune(way: str, model: nn.Module, data: Data, seed: int) -> tuple[DataFreeResult, nn.Module]:
    """(masks and errors, the pruned model)."""
    settings = replace(ADMM, matched=way in ("matched", "one-shot"), seed=seed)
    if way == "one-shot":
        return _project(model, data, settings)
    if way == "real":
        generator, train = torch.Generator().manual_seed(seed), data.train

        def draw(n: int) -> torch.Tensor:
            return train.normalise(train.images[torch.randint(train.size, (n,), generator=generator)])
    else:
        recipe = PREPROCESSING[data.name]
        draw = random_images(data.shape, (recipe.mean, recipe.std), seed, torch.device("cpu"))
    result = prune_model(model, draw, "pattern", DENSITY, settings=settings, threads=1)
    return result, result.model


def _project(model: nn.Module, data: Data, settings: AdmmSettings) -> tuple[DataFreeResult, nn.Module]:
    """The dense weights projected onto the structure at once."""
    network = jpq.trace(model, data.example)
    sites = mask_sites(network, "pattern", ())
    gates = [build_layer_gate(network, site, DENSITY, settings) for site in sites]
    projected = project_weights_once(model, sites, gates)
    kept = tuple(gate.keep() for gate in gates)
    return DataFreeResult(projected, sites, kept, (), float("nan"), float("nan")), projected


def retrain(mask: Path, model: nn.Module, data: Data, setting: Setting, seed: int) -> tuple[float, float]:
    """(test accuracy, share of the budget that is used) after retraining under the mask."""
    torch.manual_seed(seed)
    batches = (batch for epoch in count(1000 * seed) for batch in data.train.epoch(epoch))
    calibration = torch.cat([x for x, _ in islice(batches, 4)])
    budget = Budget(target_bops=setting.target)
    session = jpq.compress(model, calibration, decide=Decide(mask=mask), budget=budget, steps=setting.search)
    for steps, lr in ((setting.search, 2e-3), (setting.tune, 5e-4)):
        optimizer = torch.optim.Adam(session.groups(lr=lr))
        session.train()
        for x, y in islice(batches, steps):
            optimizer.zero_grad()
            (F.cross_entropy(session(x), y) + session.pressure()).backward()
            optimizer.step()
            session.step()
        session.discretize()
    uses = session.net.exact_usage()
    used = float(COSTS["bops"](uses)) / baseline(uses)["bops"] / (float(setting.target.rstrip("%")) / 100)
    return CLASSIFICATION.evaluate(session.finalize(), data.test), used


def measure_row(way: str, setting: Setting, root: Path, seed: int, command: str) -> dict[str, object]:
    """One row of the CSV."""
    model, data = setting.load(root, seed)
    start = time.process_time()
    result, pruned = prune(way, model, data, seed)
    seconds = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        write_mask(Path(folder), result.sites, result.kept, pruned, {"name": setting.model})
        accuracy, used = retrain(Path(folder), model, data, setting, seed)

    def layer_mean(name: str) -> float | str:
        layers = result.layers
        return round(sum(getattr(layer, name) for layer in layers) / len(layers), 4) if layers else ""

    return {
        "model": setting.model,
        "data": setting.data,
        "way": way,
        "seed": seed,
        "density": DENSITY,
        "float_accuracy": round(CLASSIFICATION.evaluate(model, data.test), 4),
        "after_pruning": round(CLASSIFICATION.evaluate(pruned, data.test), 4),
        "accuracy": round(accuracy, 4),
        "target": setting.target,
        "target_used": round(used, 4),
        "layer_error": layer_mean("error"),
        "layer_error_one_shot": layer_mean("error_one_shot"),
        "residual": layer_mean("residual"),
        "dead": layer_mean("dead"),
        "admm_steps": ADMM.steps if result.layers else 0,
        "client_steps": setting.search + setting.tune,
        "prune_seconds": round(seconds, 1),
        "test_images": data.test.size,
        **provenance(command),
    }


def draw_accuracies() -> None:
    """Picture of the accuracy right after pruning and after retraining, a bar a way, a dot a seed."""
    table = pd.read_csv(PATH)
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, table.data.nunique(), squeeze=False)[0]
    for axes, (name, runs) in zip(panels, table.groupby("data"), strict=True):
        _draw_panel(axes, str(name), runs)
    panels[0].set_ylabel("test accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, PATH)


def _draw_panel(axes: Axes, name: str, runs: pd.DataFrame) -> None:
    """One data set."""
    for side, (column, label) in enumerate((("after_pruning", "right after"), ("accuracy", "retrained"))):
        means = runs.groupby("way")[column].mean().reindex(WAYS)
        places = [i + 0.4 * side - 0.2 for i in range(len(WAYS))]
        axes.bar(places, 100 * means, 0.38, color=("#E69F00", "#0072B2")[side], label=label)
        for place, way in zip(places, WAYS, strict=True):
            dots = 100 * runs[runs.way == way][column]
            axes.scatter([place] * len(dots), dots, s=10, color="black", zorder=3)
    axes.axhline(100 * runs.float_accuracy.mean(), color="#555555", linestyle="--", linewidth=1, label="float model")
    title = f"{runs.model.iloc[0]}, {name}, n = {runs.seed.nunique()}"
    axes.set(xticks=range(len(WAYS)), ylim=(0, 100), title=title)
    axes.set_xticklabels(WAYS)


def known_keys() -> set[tuple[str, ...]]:
    """The keys of the rows that are there already."""
    return set(pd.read_csv(PATH, dtype=str)[KEY].itertuples(index=False, name=None)) if PATH.exists() else set()


def main() -> None:
    """Run what is missing, print the means, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--plot", action="store_true", help="only draw what is there")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for name, seed, way in product(args.data, args.seeds, args.ways) if not args.plot else ():
        if (name, way, str(seed)) in known_keys():
            continue
        flags = ["--data", name, "--ways", way, "--seeds", str(seed)]
        command = shlex.join(["python", "studies/private.py", *flags])
        row = measure_row(way, SETTINGS[name], args.data_root, seed, command)
        append_row(PATH, row)
        print({k: row[k] for k in (*KEY, "after_pruning", "accuracy", "target_used")}, flush=True)
    means = (
        pd.read_csv(PATH)
        .groupby(["data", "way"])
        .agg(
            n=("seed", "size"),
            float=("float_accuracy", "mean"),
            after_pruning=("after_pruning", "mean"),
            accuracy=("accuracy", "mean"),
            least=("accuracy", "min"),
            layer_error=("layer_error", "mean"),
            layer_error_one_shot=("layer_error_one_shot", "mean"),
            residual=("residual", "mean"),
        )
    )
    print(means.round(4).to_string())
    draw_accuracies()


if __name__ == "__main__":
    main()
