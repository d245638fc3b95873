"""The figures that README shows, made from the CSVs in results/ and written between its markers.

python studies/summary.py
"""

from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
START, END = "<!-- figures -->", "<!-- end of figures -->"


FIRST = (
    "Made before two faults of the calibration were found: ranges were fitted to one column of each image, and those "
    "of `uniform` for 8 bits instead of its own. Both matter most in few epochs and at few bits."
)


def compared(name: str, title: str, note: str = "") -> list[str]:
    """One study: a row per target and method, means over seeds."""
    table = pd.read_csv(HERE / "results" / f"{name}.csv")
    groups = table.groupby(["target", "method", "epochs", "search_epochs"], sort=False)
    rows = groups.agg(
        n=("accuracy", "size"), accuracy=("accuracy", "mean"), least=("accuracy", "min"),
        float_accuracy=("float_accuracy", "mean"), share=("bops_share", "mean"), size=("size_bytes", "mean"),
    ).reset_index()  # fmt: skip
    rows = rows.assign(order=rows.target.str.rstrip("%").astype(float)).sort_values(
        ["order", "method", "search_epochs"], ascending=[False, True, True]
    )
    lines = [
        f"**{title}** (`studies/results/{name}.csv`; each line holds the command that made it)",
        "",
        *([note, ""] if note else []),
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
        *compared("resnet20_cifar10_first", "CIFAR-10, ResNet20, first measurement, to be repeated", FIRST),
        *step_cost(),
    ]
    return "\n".join(lines)


def main() -> None:
    text = README.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1] if END in rest else rest
    README.write_text(f"{before}{START}\n{figures()}{END}{after}")


if __name__ == "__main__":
    main()
