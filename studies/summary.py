"""The figures that README shows, made from the CSVs in results/ and written between its markers.

python studies/summary.py [figures] [coverage] ...: the names of SECTIONS; all of them without any
"""

import sys
from pathlib import Path

import allocation as where
import detection_figures as detectors
import faults
import fronts
import kernels
import methods as every
import one_run
import pandas as pd
import speed_table
import unconstrained
from coverage_table import coverage

import jpq

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def compared(name: str, title: str) -> list[str]:
    """One study: a row per target and method, means over seeds."""
    table = pd.read_csv(HERE / "results" / f"{name}.csv")
    groups = table.groupby(["target", "method", "epochs", "search_epochs"], sort=False)
    rows = groups.agg(
        n=("accuracy", "size"),
        accuracy=("accuracy", "mean"),
        least=("accuracy", "min"),
        float_accuracy=("float_accuracy", "mean"),
        share=("bops_share", "mean"),
        size=("size_bytes", "mean"),
    ).reset_index()
    rows = rows.assign(order=rows.target.str.rstrip("%").astype(float)).sort_values(
        ["order", "method", "search_epochs"], ascending=[False, True, True]
    )
    lines = [
        f"**{title}** (`studies/results/{name}.csv`; each line holds the command that made it)",
        "",
        "| BOPs asked | method | epochs (of search) | n | test accuracy % | float % | BOPs used % | KB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.itertuples():
        least = f" (least {100 * row.least:.2f})" if row.n > 1 else ""
        epochs = f"{row.epochs} ({row.search_epochs})"
        lines.append(
            f"| {row.target} | {row.method} | {epochs} | {row.n} | {100 * row.accuracy:.2f}{least} "
            f"| {100 * row.float_accuracy:.2f} | {100 * row.share:.3f} | {row.size / 1000:.1f} |"
        )
    return [*lines, ""]


def step_cost() -> list[str]:
    """The cost of one training step."""
    table = pd.read_csv(HERE / "results" / "step_cost.csv")
    lines = [
        "**One training step of ResNet20**, CPU, one thread, times the float model's in the same process (median; "
        "`python studies/step_cost.py`)",
        "",
        "| step | batch | n | ratio | smallest to largest |",
        "|---|---|---|---|---|",
    ]
    for row in table[table.step != "float"].itertuples():
        lines.append(
            f"| {row.step} | {row.batch} | {row.n} | {row.ratio_to_float:.2f} "
            f"| {row.ratio_min:.2f} to {row.ratio_max:.2f} |"
        )
    return [*lines, ""]


def analysis_speed() -> list[str]:
    """Seeing a network and removing half of it, beside Torch-Pruning."""
    table = pd.read_csv(HERE / "results" / "analysis_speed.csv")
    first = table.iloc[0]
    lines = [
        f"**Seconds to see a network and to remove every second unit**, 224 x 224 images, {first.hardware}, "
        f"{first.threads} thread, processor time, median of {first.n} in one process, beside Torch-Pruning "
        f"{first.torch_pruning} (group search and pruning of all groups; `python studies/analysis_speed.py`)",
        "",
        "| model | export | labels | check | sites | rebuild | jpq | Torch-Pruning | Torch-Pruning / jpq |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table.itertuples():
        stages = (row.jpq_export_s, row.jpq_labels_s, row.jpq_check_s, row.jpq_sites_s, row.jpq_rebuild_s)
        note = "" if row.tp_runs else " (its model does not run until sizes in its code are set by hand)"
        lines.append(
            f"| {row.model} | {' | '.join(f'{s:.2f}' for s in stages)} | {row.jpq_total_s:.1f} "
            f"| {row.tp_total_s:.1f}{note} | {row.ratio:.2f} ({row.ratio_min:.2f} to {row.ratio_max:.2f}) |"
        )
    return [*lines, ""]


def figures() -> str:
    """The whole section."""
    lines = [
        *compared("digits", "Digits, convnet, float model trained in the run"),
        *compared("fashion_mnist", "Fashion-MNIST, LeNet-5, float model trained in the run"),
        *compared("resnet20_cifar10", "CIFAR-10, ResNet20 from public weights"),
        *step_cost(),
        *analysis_speed(),
        *unconstrained.table(),
    ]
    return "\n".join(lines)


def methods() -> str:
    """Every method: what it decides, what it reached beside the others, and what became of its paper's claims."""
    table = pd.read_csv(HERE / "results" / "methods.csv")
    budgets = sorted(set(table.target), key=lambda text: -float(text.rstrip("%")))
    means = table.groupby(["method", "target"])[["accuracy", "size_bytes", "bops_structured", "bops"]].mean()
    counts = table.groupby(["method", "target"]).size()
    lines = [
        "| `--method` | decides | structure | "
        + " | ".join(f"% right at {b}" for b in budgets)
        + f" | KB at {budgets[0]} | structured BOPs | choose it for |",
        "|---|---|---|" + "---|" * (len(budgets) + 3),
    ]
    for name, method in jpq.METHODS.items():
        cells = [
            f"{100 * means.accuracy[name, b]:.2f} (n={counts[name, b]})" if (name, b) in means.index else "-"
            for b in budgets
        ]
        size = structured = "-"
        if (name, budgets[0]) in means.index:
            row = means.loc[(name, budgets[0])]
            size, structured = f"{row.size_bytes / 1000:.1f}", f"x {row.bops_structured / row.bops:.2f}"
        where = "-" if method.gate is None else method.structure
        lines.append(
            f"| `{name}` | {method.decides} | {where} | {' | '.join(cells)} | {size} | {structured} | {method.choose} |"
        )
    first = table.iloc[0]
    lines += [
        "",
        f"{first.model} on {first.data}, {every.BASE.task.limit:,} training images, {first.epochs} epochs, "
        f"{table.search_epochs.max()} of them search, the same "
        f"float weights ({100 * table.float_accuracy.mean():.2f} %), means over n seeds; {first.hardware}. At so short "
        "a training, and with so few seeds, half a point says nothing. Structured BOPs: what hardware "
        "pays that cannot skip zeros that lie anywhere, times the budget (`python studies/methods.py`).",
        "",
    ]
    return "\n".join(lines)


SCORES = {
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


def scores() -> str:
    """Every score on one network: how it foretells removals, and accuracy at equal MACs."""
    whole = pd.read_csv(HERE / "results" / "scores.csv")
    table = whole[whole.model == "resnet20"]
    others = whole[(whole.model != "resnet20") & (whole.part == "pruned")]
    pruned, tuned, removal = (table[table.part == part] for part in ("pruned", "tuned", "removal"))
    shares = sorted(pruned.density.unique(), reverse=True)
    head = ["`--score`", "ranks by", "Pearson", "Spearman", *(f"% right at {s:.0%} of the MACs" for s in shares)]
    head += [f"at {s:.0%}, {int(tuned.steps.max())} steps of training" for s in tuned.density.unique()]
    more = [(name, share) for name in sorted(set(others.model)) for share in sorted(set(others.density), reverse=True)]
    head += [f"{name}: at {share:.0%}, untrained" for name, share in more]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for score, text in SCORES.items():
        found = removal[removal.score == score]
        cells = [f"{found[m].iloc[0]:.2f}" if len(found) else "-" for m in ("pearson", "spearman")]
        for part, densities in ((pruned, shares), (tuned, tuned.density.unique())):
            for share in densities:
                runs = part[(part.score == score) & (part.density == share)]
                several = f" (n={len(runs)})" if len(runs) > 1 else ""
                cells.append(f"{100 * runs.accuracy.mean():.1f}{several}" if len(runs) else "-")
        for name, share in more:
            runs = others[(others.model == name) & (others.score == score) & (others.density == share)]
            several = f" (n={len(runs)})" if len(runs) > 1 else ""
            cells.append(f"{100 * runs.accuracy.mean():.1f}{several}" if len(runs) else "-")
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


def claims() -> str:
    """What the methods' papers claim, tested on digits."""
    table = pd.read_csv(HERE / "results" / "claims.csv")
    lines = ["| method | claim | measured | holds |", "|---|---|---|---|"]
    lines += [f"| {row.method} | {row.claim} | {row.measured} | {row.holds} |" for row in table.itertuples()]
    return "\n".join([*lines, ""])


# between <!-- NAME --> and <!-- end of NAME -->
def allocation() -> str:
    """What the allocators do with one score, one network and the same budgets."""
    table = pd.read_csv(HERE / "results" / "allocation.csv")
    budgets = sorted(set(table.target), key=lambda text: -float(text.rstrip("%")))
    means = table.groupby(["method", "target"]).agg(
        accuracy=("accuracy", "mean"), least=("accuracy", "min"), n=("accuracy", "size"), seconds=("seconds", "median")
    )
    lines = [
        "| `--allocator` | " + " | ".join(f"% right at {b}" for b in budgets) + " | seconds of a run |",
        "|---|" + "---|" * (len(budgets) + 1),
    ]
    for name in dict.fromkeys(table.method):
        cells = []
        for budget in budgets:
            row = means.loc[(name, budget)] if (name, budget) in means.index else None
            cells.append("-" if row is None else f"{100 * row.accuracy:.2f} (n={row.n:.0f})")
        shown = f"`{name}`" if name != "djpq" else "beside them: method `djpq`"
        lines.append(f"| {shown} | {' | '.join(cells)} | {table[table.method == name].seconds.median():.0f} |")
    first = table.iloc[0]
    lines += [
        "",
        f"{first.model} on {first.data}, {every.BASE.task.limit:,} training images, {first.epochs} epochs, `two-stage` "
        f"with score `{where.SCORE}`, float {100 * table.float_accuracy.mean():.2f} %, test split, means over n seeds; "
        f"{first.hardware} (`python studies/allocation.py`).",
        "",
    ]
    timed = pd.read_csv(HERE / "results" / "allocation_latency.csv")
    lines += ["| `--allocator` | % right | predicted ms | measured ms | n |", "|---|---|---|---|---|"]
    for name, runs in timed.groupby("method", sort=False):
        shown = f"`{name}`" if name != "djpq" else "beside them: method `djpq`"
        lines.append(
            f"| {shown} | {100 * runs.accuracy.mean():.2f} | {runs.predicted_ms.mean():.4f} "
            f"| {runs.measured_ms.mean():.4f} | {len(runs)} |"
        )
    lines += [
        "",
        f"At equal latency: {timed.model.iloc[0]} on {timed.data.iloc[0]}, {timed.target.iloc[0].split()[-1]} of the "
        f"float model's {timed.float_ms.mean():.4f} ms, float {100 * timed.float_accuracy.mean():.2f} %; predicted by "
        "the table, measured in onnxruntime (`python studies/allocation.py --latency --seeds 0 1 2`).",
        "",
    ]
    return "\n".join(lines)


SECTIONS = {
    "figures": figures,
    "coverage": coverage,
    "methods": methods,
    "scores": scores,
    "allocation": allocation,
    "claims": claims,
    "speed": speed_table.speed,
    "kernels": kernels.summary,
    "detection": lambda: detectors.summary() + "\n",
    "one run": one_run.summary,
    "faults": faults.summary,
    "fronts": fronts.summary,
}


def main() -> None:
    text = README.read_text()
    for name in sys.argv[1:] or SECTIONS:
        made = SECTIONS[name]()
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n{made}{end}{rest.split(end)[1]}"
    README.write_text(text)


if __name__ == "__main__":
    main()
