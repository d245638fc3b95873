"""Accuracy and time of --output-bits and --channel-multiple: ResNet8 on Fashion-MNIST, all bits 8.

With all bits at 8 only channels can meet the budget, as on a CPU that computes in int8. All runs start from the same
float weights and differ in nothing but those two settings. Times are the processor's, one thread, one image, in
onnxruntime: all files of one seed and target take turns in one process, plain int8 (every channel) among them. The
accuracies are of the 10,000 test images, read once per run. AMD EPYC, two cores, November 2026, n = 2: at 3 % neither
switch costs accuracy, at 1.5 % rounded results cost 0.9 points.

    python studies/kernels.py --data-root DIR
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import methods
import pandas as pd
from support.grid import EpochPrinter, channels_kept
from support.result_rows import RESULTS, append_row, provenance

import jpq
from jpq.config import Budget, Decide, Run
from jpq.export.timing import INT8, model_files, time_in_turns
from jpq.results import Result

PATH = RESULTS / "kernels.csv"
BASE = replace(methods.BASE, decide=Decide(w_bits=(8, 8), a_bits=(8, 8)))
VARIANTS = {"neither": (0, None), "results": (8, None), "results, 4": (8, 4), "results, 8": (8, 8)}
TARGETS = ("3%", "1.5%")


def run_variants(base: jpq.Config, target: str, seed: int, folder: Path) -> dict[str, Result]:
    """A finished run for each variant."""
    results = {}
    for name, (bits, multiple) in VARIANTS.items():
        config = replace(
            base,
            decide=replace(base.decide, output_bits=bits, channel_multiple=multiple),
            budget=Budget(target_bops=target),
            run=Run(seed=seed, out=folder, threads=1),
        )
        results[name] = jpq.optimize(config, EpochPrinter())
    return results


def measure_rows(base: jpq.Config, target: str, seed: int, rounds: int, command: str) -> list[dict[str, object]]:
    """A row for each variant, timed in turns."""
    with tempfile.TemporaryDirectory() as place:
        results = run_variants(base, target, seed, Path(place))
        rounded = list(results.values())[-1]  # its int8 reference rounds results too
        paths = {INT8: model_files(rounded.folder, (1, 28, 28), Path(place))[INT8]}
        paths |= {name: result.folder / "model.onnx" for name, result in results.items()}
        times = {t.model: t for t in time_in_turns(paths, ["onnxruntime"], [1], [1], rounds, clock=time.process_time)}
        return [
            {
                "model": "resnet8",
                "data": "fashion-mnist",
                "method": result.method,
                "target": target,
                "seed": seed,
                "output_bits": VARIANTS[name][0],
                "channel_multiple": VARIANTS[name][1] or 1,
                "epochs": base.train.epochs,
                "float_accuracy": round(result.float.accuracy, 4),
                "accuracy": round(result.compressed.accuracy, 4),
                "target_used": round(result.targets["bops"]["used"], 4),
                "channels_kept": channels_kept(result),
                "onnx_bytes": times[name].bytes,
                "median_ms": round(times[name].median_ms, 4),
                "times_as_fast_as_int8": round(times[INT8].median_ms / times[name].median_ms, 3),
                **provenance(command, rounds, ("onnxruntime", "torch"), threads=1),
            }
            for name, result in results.items()
        ]


def kernels_table() -> str:
    """README's table: accuracy and time by target and variant."""
    table = pd.read_csv(PATH)
    lines = [
        "| BOPs | `--output-bits` | `--channel-multiple` | % right | ms | as fast as int8 | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for (target, bits, multiple), runs in table.groupby(["target", "output_bits", "channel_multiple"], sort=False):
        lines.append(
            f"| {target} | {bits or '-'} | {multiple if multiple > 1 else '-'} | {100 * runs.accuracy.mean():.2f} "
            f"| {runs.median_ms.median():.3f} | {runs.times_as_fast_as_int8.median():.2f}x | {len(runs)} |"
        )
    row = table.iloc[0]
    lines += [
        "",
        f"ResNet8 on Fashion-MNIST, 10,000 training images, {row.epochs} epochs, `djpq`, all bits 8, float "
        f"{100 * row.float_accuracy:.2f} %; test split, means over n seeds; onnxruntime on {row.hardware}, the "
        f"processor's time with one thread, medians of {row.n} turns. `python studies/kernels.py`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run every target and seed; rows are appended as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--weights", type=Path, help="float weights, instead of training them")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    command = shlex.join(["python", "studies/kernels.py", "--seeds", *map(str, args.seeds)])
    task = replace(BASE.task, data_root=args.data_root, weights=args.weights)
    base = methods.with_shared_weights(replace(BASE, task=task))
    for seed in args.seeds:
        for target in args.targets:
            for row in measure_rows(base, target, seed, args.rounds, command):
                append_row(PATH, row)
                print(row, flush=True)


if __name__ == "__main__":
    main()
