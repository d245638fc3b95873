"""The tables of studies/README.md, made from the CSV files in studies/results and written between their markers.

python studies/support/tables.py                      # all of them
python studies/support/tables.py figures coverage     # some, by the names in SECTIONS
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder alone

import allocation
import analysis_speed
import claims
import coverage
import coverage_third_party
import detection
import detection_rounds
import estimators
import faults
import fronts
import fuzz
import kernels
import methods
import one_run
import other_tools
import pandas as pd
import qat_recipe
import scores
import search_share
import speed
import step_cost
import tasks
import trainers
import unconstrained

import jpq
from support.result_rows import RESULTS, STUDIES

README = STUDIES / "README.md"
NO_COMMIT = "before the column existed"


def figures() -> str:
    """Accuracy at a few budgets, and costs of a training step and of reading a network."""
    lines = [
        *budget_table("digits", "Digits, convnet, float model trained in the run"),
        *budget_table("fashion_mnist", "Fashion-MNIST, LeNet-5, float model trained in the run"),
        *budget_table("resnet20_cifar10", "CIFAR-10, ResNet20 from public weights"),
        *step_cost.step_cost_table(),
        *analysis_speed.analysis_speed_table(),
        *unconstrained.unconstrained_table(),
    ]
    return "\n".join(lines)


def budget_table(name: str, title: str) -> list[str]:
    """One CSV of studies/budgets.py: a row per target and method, means over seeds."""
    table = pd.read_csv(RESULTS / f"{name}.csv")
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
        f"**{title}** (`studies/results/{name}.csv`; each line holds the command that made it, today "
        f"`python studies/budgets.py {name}`)",
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


JOINT = {  # CSV file -> what is shown of it
    "joint_cifar": ("ResNet8, CIFAR-10, 8,000 images", "joint_cifar.py"),
    "resnet20_joint": ("ResNet20, CIFAR-10, public weights", "budgets.py resnet20_joint"),
    "joint_pruning": ("ResNet8 of twice its width, Fashion-MNIST, 3,000 images", "joint_pruning.py"),
    "uneven": ("mobilenet_v2, Fashion-MNIST at 32 x 32, 4,000 images", "uneven.py"),
}


def joint_table() -> str:
    """Joint decisions beside bits alone, channels alone and two stages: accuracy, and channels that were kept."""
    lines = [
        "| network and data | BOPs asked | method | epochs | n | test accuracy % | channels kept % | float % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (what, script) in JOINT.items():
        table = pd.read_csv(RESULTS / f"{name}.csv")
        means = table.groupby(["target", "method", "epochs"]).accuracy.mean().sort_values(ascending=False)
        for key in sorted(means.index, key=lambda key: (-float(key[0].rstrip("%")), -means[key])):
            target, method, epochs = key
            runs = table[(table.target == target) & (table.method == method) & (table.epochs == epochs)]
            accuracy = 100 * runs.accuracy
            spread = f" ({accuracy.min():.2f} to {accuracy.max():.2f})" if len(runs) > 1 else ""
            lines.append(
                f"| {what} (`{script}`) | {target} | {method} | {epochs} | {len(runs)} | {accuracy.mean():.2f}{spread} "
                f"| {100 * runs.channels_kept.mean():.0f} | {100 * runs.float_accuracy.mean():.2f} |"
            )
    return "\n".join([*lines, "", "Test split of 10,000 images, one processor thread a run.", ""])


def methods_table() -> str:
    """Every method: what it decides, and what it reached beside the others."""
    table = pd.read_csv(RESULTS / "methods.csv")
    budgets = sort_budgets(table.target)
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
    row = table.iloc[0]
    lines += [
        "",
        f"{row.model} on {row.data}, {methods.BASE.task.limit:,} training images, {row.epochs} epochs, "
        f"{table.search_epochs.max()} of them search, the same "
        f"float weights ({100 * table.float_accuracy.mean():.2f} %), means over n seeds; {row.hardware}. At so short "
        "a training, and with so few seeds, half a point says nothing. Structured BOPs: what hardware "
        "pays that cannot skip zeros that lie anywhere, times the budget (`python studies/methods.py`).",
        "",
    ]
    return "\n".join(lines)


def allocation_table() -> str:
    """The allocators at equal BOPs and at equal latency."""
    return "\n".join([*_equal_bops_lines(), *_equal_latency_lines()])


def _equal_bops_lines() -> list[str]:
    """The allocators with one score, one network and the same budgets."""
    table = pd.read_csv(RESULTS / "allocation.csv")
    budgets = sort_budgets(table.target)
    groups = table.groupby(["method", "target"]).accuracy
    means, counts = groups.mean(), groups.size()
    lines = [
        "| `--allocator` | " + " | ".join(f"% right at {b}" for b in budgets) + " | seconds of a run |",
        "|---|" + "---|" * (len(budgets) + 1),
    ]
    for name in dict.fromkeys(table.method):
        cells = [
            f"{100 * means[name, b]:.2f} (n={counts[name, b]})" if (name, b) in means.index else "-" for b in budgets
        ]
        seconds = table[table.method == name].seconds.median()
        lines.append(f"| {_allocator_cell(name)} | {' | '.join(cells)} | {seconds:.0f} |")
    row = table.iloc[0]
    return [
        *lines,
        "",
        f"{row.model} on {row.data}, {methods.BASE.task.limit:,} training images, {row.epochs} epochs, `two-stage` "
        f"with score `{allocation.SCORE}`, float {100 * table.float_accuracy.mean():.2f} %, test split, means over n "
        f"seeds; {row.hardware} (`python studies/allocation.py`).",
        "",
    ]


def _equal_latency_lines() -> list[str]:
    """The allocators under one latency target."""
    table = pd.read_csv(RESULTS / "allocation_latency.csv")
    lines = ["| `--allocator` | % right | predicted ms | measured ms | n |", "|---|---|---|---|---|"]
    for name, runs in table.groupby("method", sort=False):
        lines.append(
            f"| {_allocator_cell(str(name))} | {100 * runs.accuracy.mean():.2f} | {runs.predicted_ms.mean():.4f} "
            f"| {runs.measured_ms.mean():.4f} | {len(runs)} |"
        )
    return [
        *lines,
        "",
        f"At equal latency: {table.model.iloc[0]} on {table.data.iloc[0]}, {table.target.iloc[0].split()[-1]} of the "
        f"float model's {table.float_ms.mean():.4f} ms, float {100 * table.float_accuracy.mean():.2f} %; predicted by "
        "the table, measured in onnxruntime (`python studies/allocation.py --latency --seeds 0 1 2`).",
        "",
    ]


def _allocator_cell(name: str) -> str:
    return "beside them: method `djpq`" if name == "djpq" else f"`{name}`"


def sort_budgets(targets: Sequence[str]) -> list[str]:
    """The different budgets, largest first."""
    return sorted(set(targets), key=lambda text: -float(text.rstrip("%")))


SECTIONS: dict[str, tuple[Callable[[], str], tuple[str, ...]]] = {  # name -> (table, CSV files that it shows)
    "joint": (joint_table, tuple(JOINT)),
    "other tools": (other_tools.other_tools_table, ("other_tools", "joint_cifar")),
    "figures": (
        figures,
        ("digits", "fashion_mnist", "resnet20_cifar10", "step_cost", "analysis_speed", "unconstrained"),
    ),
    "coverage": (coverage.coverage_table, ("coverage",)),
    "coverage third party": (coverage_third_party.coverage_third_party_table, ("coverage_third_party",)),
    "fuzz": (fuzz.fuzz_table, ("fuzz",)),
    "methods": (methods_table, ("methods",)),
    "scores": (scores.scores_table, ("scores",)),
    "allocation": (allocation_table, ("allocation", "allocation_latency")),
    "claims": (claims.claims_table, ("claims",)),
    "speed": (speed.speed_table, ("speed",)),
    "kernels": (kernels.kernels_table, ("kernels",)),
    "detection": (detection.detection_table, ("detection",)),
    "detection rounds": (detection_rounds.rounds_table, ("detection_rounds",)),
    "one run": (one_run.one_run_table, ("one_run",)),
    "estimators": (estimators.estimators_table, ("estimators",)),
    "recipe": (qat_recipe.recipe_table, ("qat_recipe",)),
    "search share": (search_share.share_table, ("search_share",)),
    "tasks": (tasks.tasks_table, ("tasks",)),
    "trainers": (trainers.trainers_table, ("trainers",)),
    "faults": (faults.faults_table, ("faults",)),
    "fronts": (fronts.hypervolume_table, ("front_digits", "front_fashion_mnist", "front_resnet20")),
}


def section(name: str) -> str:
    """One section between its markers: the table, and the commits of its rows."""
    table, files = SECTIONS[name]
    return f"<!-- {name} -->\n{table().rstrip()}\n\n{commit_line(files)}\n<!-- end of {name} -->"


def commit_line(files: Sequence[str]) -> str:
    """The commits that the rows of some CSV files were measured at."""
    by_text: dict[str, list[str]] = {}
    for name in files:
        table = pd.read_csv(RESULTS / f"{name}.csv")
        commits = table.commit.fillna(NO_COMMIT) if "commit" in table else pd.Series([NO_COMMIT] * len(table))
        counts = commits.value_counts()
        rows = ", ".join(f"{commit} for {n} of {len(table)} rows" for commit, n in counts.items())
        by_text.setdefault(counts.index[0] if len(counts) == 1 else rows, []).append(f"`{name}.csv`")
    return "Commit: " + "; ".join(f"{text} ({', '.join(names)})" for text, names in by_text.items()) + "."


def main() -> None:
    """Write the sections that are named, or all of them, into README.md."""
    text = README.read_text(encoding="utf-8")
    for name in sys.argv[1:] or SECTIONS:
        before, rest = text.split(f"<!-- {name} -->")
        after = rest.split(f"<!-- end of {name} -->")[1]
        text = f"{before}{section(name)}{after}"
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
