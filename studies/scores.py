"""All scores at equal budgets, with and without fine-tuning; how well each foretells what removing a channel does.

    python studies/scores.py --data-root DIR --weights resnet20-12fca82f.th [--parts removal pruned tuned plot]
    python studies/scores.py --data-root DIR --model resnet56 --weights FILE --parts pruned --scores l1 taylor ...

ResNet20 on CIFAR-10 from public weights (91.73 % on the test split), 8 bits everywhere. `pruned`: channels close at
once (`ranked`, one-shot) until a share of the MACs is left, to within a channel, and the network is tried on 2,000
held-out images as it is; BatchNorm's statistics stay those of the dense network. `tuned`: the same at one share, after
STEPS steps of training. `removal`: each channel is closed alone, and the squared change of the mean loss over 256
training images is compared with its score from the same images, over all channels of all layers (Pearson, Spearman):
the oracle of Molchanov et al., arXiv:1906.10771, who report a correlation above 93 % for their score with gates behind
the normalisation.

The public weights were trained on the held-out images too, so accuracies here are optimistic for all scores alike. The
test split is not read. Lines are appended as they are found; what is there already is skipped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from grid import RESULTS, append, hardware
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

import jpq
from jpq.allocation.ranking.rank import scores
from jpq.compression.calibration import reestimate_batchnorm
from jpq.methods.scores import SCORES
from jpq.session import CompressionSession
from jpq.tasks.classification import evaluate
from jpq.tasks.data import Batches, Data, load

NAME, MODEL = "scores", "resnet20"
DENSITIES = (0.9, 0.8)
TUNED, STEPS, BATCH = 0.5, 40, 64
ORDER = ("random", "l1", "taylor", "lookahead-forward", "catro", *SCORES)  # what is wanted first
IMAGES = 256  # of the removal oracle
SEEDS = {"random": (0, 1, 2)}


def float_model(name: str, weights: Path) -> nn.Module:
    model = jpq.tasks.models.build(name, 10, 3)
    jpq.tasks.models.load_weights(model, weights)
    return model.eval()


def closed(model: nn.Module, data: Data, score: str, density: float, seed: int = 0) -> CompressionSession:
    """The network with its channels closed, landed on its share of the MACs to within a channel."""
    torch.manual_seed(seed)
    batches = list(islice(data.train.epoch(10**6 + seed), 8))
    net = jpq.compress(
        model,
        batches[0][0],
        "ranked",
        score=score,
        schedule="one-shot",
        density=density,
        evidence=batches,
        macs=f"{density:.0%}",
        width="fixed",
    )
    net.discretize()
    return net


def line(
    part: str, score: str, seed: int, density: float, net: CompressionSession | None, name: str = MODEL, **found: object
) -> dict[str, object]:
    """One measurement as a row."""
    uses = net.net.exact_usage() if net else []
    share = float(jpq.costs.macs(uses)) / jpq.costs.baseline(uses)["macs"] if net else 1.0
    every = {"accuracy": "", "float_accuracy": "", "pearson": "", "spearman": "", "units": "", "images": "", **found}
    return {
        "part": part,
        "model": name,
        "data": "cifar10",
        "score": score,
        "seed": seed,
        "density": density,
        "macs_share": round(share, 4),
        **every,
        "steps": STEPS if part == "tuned" else 0,
        "n": 1,
        "threads": 1,
        "hardware": hardware(),
        "torch": torch.__version__,
        "command": f"python studies/scores.py --model {name} --parts {part}",
    }


def pruned(model: nn.Module, data: Data, path: Path, tune: bool, name: str, wanted: Sequence[str]) -> None:
    """Accuracy of every score at every density, as it is or after a short training."""
    part = "tuned" if tune else "pruned"
    reference = evaluate(model, data.held_out)
    for density in (TUNED,) if tune else DENSITIES:
        for score in wanted:
            for seed in (0,) if tune else SEEDS.get(score, (0,)):
                if known(path, part, score, seed, density, name):
                    continue
                start = time.perf_counter()
                net = closed(model, data, score, density, seed)
                if tune:
                    train(net, data.train)
                accuracy = evaluate(net.net, data.held_out)
                row = line(
                    part,
                    score,
                    seed,
                    density,
                    net,
                    name,
                    accuracy=round(accuracy, 4),
                    float_accuracy=round(reference, 4),
                    images=data.held_out.size,
                )
                append(path, {**row, "seconds": round(time.perf_counter() - start, 1)})
                print(part, score, density, seed, f"{accuracy:.4f}", flush=True)


def train(net: CompressionSession, batches: Batches) -> None:
    """Some steps with the decisions as they stand, then the normalisations' statistics anew."""
    net.train()
    optimizer = torch.optim.Adam(net.groups(lr=5e-4))
    for x, y in islice(batches.epoch(0), STEPS):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    reestimate_batchnorm(net.net, batches.epoch(1), 8)


def loss(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean cross-entropy, in evaluation mode."""
    net.eval()
    with torch.no_grad():
        parts = [(float(F.cross_entropy(net(x), y, reduction="sum")), len(y)) for x, y in batches]
    return sum(total for total, _ in parts) / sum(n for _, n in parts)


def removal(model: nn.Module, data: Data, path: Path) -> None:
    """The oracle of every channel, and how each score goes with it."""
    missing = [score for score in SCORES if not known(path, "removal", score, 0, 1.0)]
    if not missing:
        return
    batches = [(data.train.normalise(data.train.images[:IMAGES]), data.train.labels[:IMAGES])]
    net = jpq.compress(model, batches[0][0], "ranked", macs="50%", width="fixed").net
    file = RESULTS / f"{NAME}_removal.csv"
    if not file.exists():
        start = loss(net, batches)
        rows = []
        for site, gate in zip(net.sites, net.gates, strict=True):
            for unit in range(site.n):
                gate.margins[0, unit] = -1.0
                rows.append((site.name, unit, len(site.taps), (loss(net, batches) - start) ** 2))
                gate.margins[0, unit] = 1.0
            print("removal", site.name, flush=True)
        pd.DataFrame(rows, columns=["site", "unit", "uses", "oracle"]).to_csv(file, index=False)
    table = pd.read_csv(file)
    for score in missing:
        begin = time.perf_counter()
        found = torch.cat(list(scores(net, SCORES[score], batches).values()))
        table[score] = found.numpy()
        own = table[score] * (table.uses if "taylor" in score else 1)  # what removing it does, not what it does per use
        both = pd.DataFrame({"score": own, "oracle": table.oracle})
        numbers = {m: round(float(both.corr(m).iloc[0, 1]), 4) for m in ("pearson", "spearman")}
        row = line("removal", score, 0, 1.0, None, units=len(table), images=IMAGES, **numbers)
        append(path, {**row, "seconds": round(time.perf_counter() - begin, 1)})
        print("removal", score, numbers, flush=True)
    table.to_csv(file, index=False)


def known(path: Path, part: str, score: str, seed: int, density: float, name: str = MODEL) -> bool:
    """Whether the line is there already."""
    if not path.exists():
        return False
    t = pd.read_csv(path)
    return bool(
        ((t.part == part) & (t.score == score) & (t.seed == seed) & (t.density == density) & (t.model == name)).any()
    )


def draw(path: Path) -> None:
    """Accuracy of each score at each density; Taylor's score of each channel against what removing it does."""
    table = pd.read_csv(path)
    table = table[table.model == MODEL]
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    found = table[table.part == "pruned"].pivot_table(index="score", columns="density", values="accuracy")
    order = found.mean(axis=1).sort_values().index
    places = {score: i for i, score in enumerate(order)}
    colours = dict(zip(DENSITIES, ("#0072B2", "#009E73"), strict=True))
    for density in found:
        left.plot(
            100 * found.loc[order, density],
            range(len(order)),
            "o",
            color=colours[density],
            label=f"{density:.0%} of the MACs, not trained",
        )
    tuned = table[table.part == "tuned"]
    if len(tuned):
        left.plot(
            100 * tuned.accuracy,
            [places[s] for s in tuned.score],
            "D",
            color="#D55E00",
            mfc="none",
            label=f"{TUNED:.0%}, {STEPS} steps of training",
        )
    left.axvline(100 * table.float_accuracy.mean(), color="#555555", linestyle="--", linewidth=1, label="dense")
    left.set_yticks(range(len(order)), order)
    left.set(xlabel="% of 2,000 held-out images right", title="ResNet20, CIFAR-10: channels closed at once")
    left.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    units = pd.read_csv(RESULTS / f"{NAME}_removal.csv")
    for score, colour in (("l1", "#999999"), ("taylor", "#0072B2"), ("taylor2", "#D55E00")):
        r = table[(table.part == "removal") & (table.score == score)].iloc[0]
        own = units[score] * (units.uses if "taylor" in score else 1)
        right.scatter(
            units.oracle,
            own / own.max(),
            s=9,
            color=colour,
            alpha=0.6,
            label=f"{score}: Pearson {r.pearson:.2f}, Spearman {r.spearman:.2f}",
        )
    right.set(
        xscale="log",
        yscale="log",
        xlabel="squared change of the loss without the channel",
        ylabel="score, share of the largest",
        title=f"{len(units)} channels, one at a time",
    )
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    FigureCanvasAgg(figure)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--weights", type=Path, default=Path("data/weights/resnet20-12fca82f.th"))
    parser.add_argument("--model", default=MODEL, choices=[MODEL, "resnet32", "resnet44", "resnet56"])
    parser.add_argument("--scores", nargs="+", default=list(dict.fromkeys(ORDER)))
    parser.add_argument("--parts", nargs="+", default=["removal", "pruned", "tuned", "plot"])
    args = parser.parse_args()
    path = RESULTS / f"{NAME}.csv"
    if {*args.parts} - {"plot"}:
        torch.set_num_threads(1)
        data = load("cifar10", args.data_root, batch_size=BATCH, held_out=0.04)
        model = float_model(args.model, args.weights)
    for part in args.parts:
        if part == "removal":
            removal(model, data, path)
        elif part == "plot":
            draw(path)
        else:
            pruned(model, data, path, part == "tuned", args.model, args.scores)


if __name__ == "__main__":
    main()
