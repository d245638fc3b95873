"""Scores of channels at equal budgets, with and without fine-tuning, and their correlation with removals.

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
test split is not read. Rows are appended as they come; what is there already is skipped. Two shared x86-64 cores,
November 2026, n = 1 (random: 3): Spearman 0.52 (`taylor`), 0.67 (`taylor-full`), 0.89 (`taylor2`).
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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from support.figures import save_figure
from support.result_rows import RESULTS, append_row, provenance, read_rows
from torch import Tensor, nn

import jpq
from jpq.allocation import site_scores
from jpq.compression import reestimate_batchnorm
from jpq.config import Budget, Decide
from jpq.methods.scores import SCORES
from jpq.tasks import CLASSIFICATION, Batches, Data, build_model, load_data, load_weights

MODEL = "resnet20"
PATH, REMOVAL_PATH = RESULTS / "scores.csv", RESULTS / "scores_removal.csv"
DENSITIES = (0.9, 0.8)
TUNED, STEPS, BATCH = 0.5, 40, 64  # density and optimizer steps of `tuned`; images of a batch
ORDER = tuple(dict.fromkeys(("random", "l1", "taylor", "lookahead-forward", "catro", *SCORES)))
IMAGES = 256  # of the removal oracle
SEEDS = {"random": (0, 1, 2)}
KEY = ["part", "score", "seed", "density", "model"]
TEXTS = {
    "l1": "sum of absolute weights that read the channel",
    "l2": "root of the sum of their squares",
    "fpgm": "distance of these weights from all other channels'",
    "lamp": "norm over the norms that are not smaller; one ranking over all layers",
    "hrank": "rank of the feature maps",
    "taylor": "squared gradient of a gate on the channel; one ranking over all layers",
    "taylor-full": "the same, mean of squares over samples",
    "taylor2": "with the second derivative; a backward pass for each channel",
    "lookahead": "filter's weight in the product with the layers on both sides",
    "lookahead-forward": "the same, on what the layers before keep",
    "lookahead-backward": "the same, on what the layers behind keep",
    "lfp": "filter and the layers behind",
    "lbp": "filter and the layers before",
    "catro": "the set that separates the classes best",
    "bn-scale": "scale of the normalisation; one ranking over all layers",
    "random": "the baseline",
}


def float_model(name: str, weights: Path) -> nn.Module:
    """The network with its public weights."""
    model = build_model(name, 10, 3)
    load_weights(model, weights)
    return model.eval()


def close_channels(model: nn.Module, data: Data, score: str, density: float, seed: int = 0) -> jpq.CompressionSession:
    """The network with its channels closed, discretized to its share of the MACs within a channel."""
    torch.manual_seed(seed)
    batches = list(islice(data.train.epoch(10**6 + seed), 8))
    decide = Decide(method="ranked", score=score, schedule="one-shot", density=density, width="fixed")
    session = jpq.compress(
        model, batches[0][0], decide=decide, budget=Budget(target_macs=f"{density:.0%}"), evidence=batches
    )
    session.discretize()
    return session


def score_row(part: str, score: str, seed: int, density: float, name: str, **figures: object) -> dict[str, object]:
    """One measurement as a row; figures that a part does not have stay empty."""
    columns = ("macs_share", "accuracy", "float_accuracy", "pearson", "spearman", "units", "images")
    return {
        "part": part,
        "model": name,
        "data": "cifar10",
        "score": score,
        "seed": seed,
        "density": density,
        **{**dict.fromkeys(columns, ""), **figures},
        "steps": STEPS if part == "tuned" else 0,
        **provenance(f"python studies/scores.py --model {name} --parts {part}", threads=1),
    }


def measure_pruned(model: nn.Module, data: Data, part: str, name: str, scores: Sequence[str]) -> None:
    """Append the accuracy of each score: "pruned", at every density as it is; "tuned", after a short training."""
    tune = part == "tuned"
    reference = CLASSIFICATION.evaluate(model, data.held_out)
    for density in (TUNED,) if tune else DENSITIES:
        for score in scores:
            for seed in (0,) if tune else SEEDS.get(score, (0,)):
                if is_known(part, score, seed, density, name):
                    continue
                start = time.perf_counter()
                session = close_channels(model, data, score, density, seed)
                if tune:
                    train(session, data.train)
                uses = session.net.exact_usage()
                row = score_row(
                    part,
                    score,
                    seed,
                    density,
                    name,
                    macs_share=round(float(jpq.costs.macs(uses)) / jpq.costs.baseline(uses)["macs"], 4),
                    accuracy=round(CLASSIFICATION.evaluate(session.net, data.held_out), 4),
                    float_accuracy=round(reference, 4),
                    images=data.held_out.size,
                )
                append_row(PATH, {**row, "seconds": round(time.perf_counter() - start, 1)})
                print(part, score, density, seed, row["accuracy"], flush=True)


def train(session: jpq.CompressionSession, batches: Batches) -> None:
    """STEPS steps with the decisions as they stand, then BatchNorm's statistics anew."""
    session.train()
    optimizer = torch.optim.Adam(session.groups(lr=5e-4))
    for x, y in islice(batches.epoch(0), STEPS):
        optimizer.zero_grad()
        F.cross_entropy(session(x), y).backward()
        optimizer.step()
    reestimate_batchnorm(session.net, batches.epoch(1), 8)


def mean_loss(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean cross-entropy, in evaluation mode."""
    net.eval()
    with torch.no_grad():
        parts = [(float(F.cross_entropy(net(x), y, reduction="sum")), len(y)) for x, y in batches]
    return sum(total for total, _ in parts) / sum(n for _, n in parts)


def removal_oracle(net: jpq.CompressedModel, batches: Sequence[tuple[Tensor, Tensor]]) -> pd.DataFrame:
    """A row per channel: the squared change of the loss when that channel alone is closed."""
    dense = mean_loss(net, batches)
    rows = []
    for site, gate in zip(net.sites, net.gates, strict=True):
        for unit in range(site.n):
            gate.margins[0, unit] = -1.0
            rows.append((site.name, unit, len(site.taps), (mean_loss(net, batches) - dense) ** 2))
            gate.margins[0, unit] = 1.0
        print("removal", site.name, flush=True)
    return pd.DataFrame(rows, columns=["site", "unit", "uses", "oracle"])


def measure_removal(model: nn.Module, data: Data) -> None:
    """Append the correlation of each score with the removal oracle."""
    missing = [score for score in SCORES if not is_known("removal", score, 0, 1.0, MODEL)]
    if not missing:
        return
    batches = [(data.train.normalise(data.train.images[:IMAGES]), data.train.labels[:IMAGES])]
    decide = Decide(method="ranked", width="fixed")
    net = jpq.compress(model, batches[0][0], decide=decide, budget=Budget(target_macs="50%")).net
    if not REMOVAL_PATH.exists():
        removal_oracle(net, batches).to_csv(REMOVAL_PATH, index=False)
    table = pd.read_csv(REMOVAL_PATH)
    for score in missing:
        start = time.perf_counter()
        table[score] = torch.cat(list(site_scores(net, SCORES[score], batches).values())).numpy()
        pair = pd.DataFrame({"score": whole_effect(table, score), "oracle": table.oracle})
        figures = {m: round(float(pair.corr(m).iloc[0, 1]), 4) for m in ("pearson", "spearman")}
        row = score_row("removal", score, 0, 1.0, MODEL, macs_share=1.0, units=len(table), images=IMAGES, **figures)
        append_row(PATH, {**row, "seconds": round(time.perf_counter() - start, 1)})
        print("removal", score, figures, flush=True)
    command = "python studies/scores.py --parts removal"
    table.assign(**provenance(command, IMAGES, threads=1)).to_csv(REMOVAL_PATH, index=False)


def whole_effect(table: pd.DataFrame, score: str) -> pd.Series:
    """A score of each channel's removal: Taylor scores are per layer that shares the gate, so times their number."""
    return table[score] * (table.uses if "taylor" in score else 1)


def is_known(part: str, score: str, seed: int, density: float, name: str) -> bool:
    """Whether the row is there already."""
    known = read_rows(PATH, KEY)[KEY].itertuples(index=False, name=None)
    return (part, score, seed, density, name) in set(known)


def scores_table() -> str:
    """README's table: each score's correlation with removals, and its accuracy at equal MACs."""
    rows = pd.read_csv(PATH)
    table = rows[rows.model == MODEL]
    pruned, tuned, removal = (table[table.part == part] for part in ("pruned", "tuned", "removal"))
    deeper = rows[(rows.model != MODEL) & (rows.part == "pruned")]
    columns = [(f"% right at {s:.0%} of the MACs", pruned, s) for s in sorted(pruned.density.unique(), reverse=True)]
    steps = f"{int(tuned.steps.max())} steps of training"
    columns += [(f"at {s:.0%}, {steps}", tuned, s) for s in tuned.density.unique()]
    columns += [
        (f"{name}: at {s:.0%}, untrained", deeper[deeper.model == name], s)
        for name in sorted(set(deeper.model))
        for s in sorted(set(deeper.density), reverse=True)
    ]
    head = ["`--score`", "ranks by", "Pearson", "Spearman", *(title for title, _, _ in columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for score, text in TEXTS.items():
        correlations = removal[removal.score == score]
        cells = [f"{correlations[m].iloc[0]:.2f}" if len(correlations) else "-" for m in ("pearson", "spearman")]
        cells += [_accuracy_cell(runs[(runs.score == score) & (runs.density == share)]) for _, runs, share in columns]
        lines.append(f"| `{score}` | {text} | " + " | ".join(cells) + " |")
    units, images = int(removal.units.max()), int(removal.images.max())
    lines += [
        "",
        f"ResNet20 on CIFAR-10, 8 bits, {int(pruned.images.max()):,} held-out images that the public weights were "
        f"trained on ({100 * pruned.float_accuracy.max():.1f} % right before; the same for all scores), channels "
        "closed at once; one seed where no n is given. Pearson, Spearman: with the squared change of the loss when a "
        f"channel is removed, over {units} channels, on {images} training images, Taylor scores times the layers that "
        "share the gate "
        "(`python studies/scores.py`).",
        "",
    ]
    return "\n".join(lines)


def _accuracy_cell(runs: pd.DataFrame) -> str:
    """Mean accuracy in per cent, with n where there are several."""
    several = f" (n={len(runs)})" if len(runs) > 1 else ""
    return f"{100 * runs.accuracy.mean():.1f}{several}" if len(runs) else "-"


def draw_scores() -> None:
    """Picture of each score's accuracy by density, and of some scores against the removal oracle."""
    table = pd.read_csv(PATH)
    table = table[table.model == MODEL]
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    _draw_accuracies(left, table)
    _draw_removals(right, table[table.part == "removal"])
    save_figure(figure, PATH)


def _draw_accuracies(axes: Axes, table: pd.DataFrame) -> None:
    """Accuracy of each score at each density."""
    pruned = table[table.part == "pruned"].pivot_table(index="score", columns="density", values="accuracy")
    order = pruned.mean(axis=1).sort_values().index
    places = {score: i for i, score in enumerate(order)}
    colours = dict(zip(DENSITIES, ("#0072B2", "#009E73"), strict=True))
    for density in pruned:
        label = f"{density:.0%} of the MACs, not trained"
        axes.plot(100 * pruned.loc[order, density], range(len(order)), "o", color=colours[density], label=label)
    tuned = table[table.part == "tuned"]
    if len(tuned):
        label = f"{TUNED:.0%}, {STEPS} steps of training"
        rows = [places[s] for s in tuned.score]
        axes.plot(100 * tuned.accuracy, rows, "D", color="#D55E00", mfc="none", label=label)
    axes.axvline(100 * table.float_accuracy.mean(), color="#555555", linestyle="--", linewidth=1, label="dense")
    axes.set_yticks(range(len(order)), order)
    axes.set(xlabel="% of 2,000 held-out images right", title="ResNet20, CIFAR-10: channels closed at once")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def _draw_removals(axes: Axes, rows: pd.DataFrame) -> None:
    """Three scores of each channel against the change of the loss without it."""
    units = pd.read_csv(REMOVAL_PATH)
    for score, colour in (("l1", "#999999"), ("taylor", "#0072B2"), ("taylor2", "#D55E00")):
        row, effect = rows[rows.score == score].iloc[0], whole_effect(units, score)
        label = f"{score}: Pearson {row.pearson:.2f}, Spearman {row.spearman:.2f}"
        axes.scatter(units.oracle, effect / effect.max(), s=9, color=colour, alpha=0.6, label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="squared change of the loss without the channel",
        ylabel="score, share of the largest",
        title=f"{len(units)} channels, one at a time",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def main() -> None:
    """Measure the parts that are named, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--weights", type=Path, default=Path("data/weights/resnet20-12fca82f.th"))
    parser.add_argument("--model", default=MODEL, choices=[MODEL, "resnet32", "resnet44", "resnet56"])
    parser.add_argument("--scores", nargs="+", default=list(ORDER))
    parser.add_argument("--parts", nargs="+", default=["removal", "pruned", "tuned", "plot"])
    args = parser.parse_args()
    if {*args.parts} - {"plot"}:
        torch.set_num_threads(1)
        data = load_data("cifar10", args.data_root, batch_size=BATCH, held_out=0.04)
        model = float_model(args.model, args.weights)
    for part in args.parts:
        if part == "removal":
            measure_removal(model, data)
        elif part == "plot":
            draw_scores()
        else:
            measure_pruned(model, data, part, args.model, args.scores)


if __name__ == "__main__":
    main()
