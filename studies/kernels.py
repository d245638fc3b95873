"""What --output-bits and --channel-multiple cost in accuracy and gain in time: ResNet8 on Fashion-MNIST, in 8 bits.

With all bits at 8 only channels can meet the budget, as on a CPU that computes in int8. All runs start from the same
float weights and differ in nothing but those two settings. Times are the processor's, one thread, one image, in
onnxruntime: all files of one seed and target take turns in one process, plain int8 (every channel) among them. The
accuracies are of the 10,000 test images, read once per run.

    python studies/kernels.py --data-root DIR
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import grid
import methods
import pandas as pd
import torch

import jpq
from jpq.config import Budget, Decide, Run
from jpq.export.timing.compare import INT8, model_files, time_in_turns
from jpq.export.timing.runner import hardware
from jpq.results.record import Result

RESULTS = Path(__file__).parent / "results" / "kernels.csv"
BASE = replace(methods.BASE, decide=Decide(w_bits=(8, 8), a_bits=(8, 8)))
VARIANTS = {"neither": (0, None), "results": (8, None), "results, 4": (8, 4), "results, 8": (8, 8)}
TARGETS = ("3%", "1.5%")


def runs(base: jpq.Config, target: str, seed: int, folder: Path) -> dict[str, Result]:
    """By variant."""
    found = {}
    for name, (bits, multiple) in VARIANTS.items():
        decide = replace(base.decide, output_bits=bits, channel_multiple=multiple)
        config = replace(
            base,
            decide=decide,
            budget=Budget(target_bops=target),
            run=Run(seed=seed, out=folder, threads=1),
        )
        found[name] = jpq.optimize(config, grid.Print())
    return found


def rows(base: jpq.Config, target: str, seed: int, rounds: int, command: str) -> list[dict[str, object]]:
    """A line for each variant, timed in turns."""
    with tempfile.TemporaryDirectory() as place:
        found = runs(base, target, seed, Path(place))
        last = list(found.values())[-1]  # its int8 rounds results too
        paths = model_files(last.folder, (1, 28, 28), Path(place))
        paths = {INT8: paths[INT8]} | {name: r.folder / "model.onnx" for name, r in found.items()}
        times = {t.model: t for t in time_in_turns(paths, ["onnxruntime"], [1], [1], rounds, clock=time.process_time)}
        return [
            {
                "model": "resnet8",
                "data": "fashion-mnist",
                "method": r.method,
                "target": target,
                "seed": seed,
                "output_bits": VARIANTS[name][0],
                "channel_multiple": VARIANTS[name][1] or 1,
                "epochs": base.train.epochs,
                "float_accuracy": round(r.float.accuracy, 4),
                "accuracy": round(r.compressed.accuracy, 4),
                "target_used": round(r.targets["bops"]["used"], 4),
                "channels_kept": round(sum(x.outputs for x in r.layers) / sum(x.outputs_all for x in r.layers), 3),
                "onnx_bytes": times[name].bytes,
                "median_ms": round(times[name].median_ms, 4),
                "times_as_fast_as_int8": round(times[INT8].median_ms / times[name].median_ms, 3),
                "n": rounds,
                "hardware": hardware(),
                "onnxruntime": version("onnxruntime"),
                "torch": torch.__version__,
                "command": command,
            }
            for name, r in found.items()
        ]


def summary() -> str:
    """README's table."""
    table = pd.read_csv(RESULTS)
    lines = [
        "| BOPs | `--output-bits` | `--channel-multiple` | % right | ms | as fast as int8 | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for (target, bits, multiple), some in table.groupby(["target", "output_bits", "channel_multiple"], sort=False):
        lines.append(
            f"| {target} | {bits or '-'} | {multiple if multiple > 1 else '-'} | {100 * some.accuracy.mean():.2f} "
            f"| {some.median_ms.median():.3f} | {some.times_as_fast_as_int8.median():.2f}x | {len(some)} |"
        )
    first = table.iloc[0]
    lines += [
        "",
        f"ResNet8 on Fashion-MNIST, 10,000 training images, {first.epochs} epochs, `djpq`, all bits 8, float "
        f"{100 * first.float_accuracy:.2f} %; test split, means over n seeds; onnxruntime on {first.hardware}, the "
        f"processor's time with one thread, medians of {first.n} turns. `python studies/kernels.py`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Every target and seed; lines are appended as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--weights", type=Path, help="float weights, instead of training them")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    command = shlex.join(["python", "studies/kernels.py", "--seeds", *map(str, args.seeds)])
    base = methods.prepare(replace(BASE, task=replace(BASE.task, data_root=args.data_root, weights=args.weights)))
    for seed in args.seeds:
        for target in args.targets:
            for row in rows(base, target, seed, args.rounds, command):
                grid.append(RESULTS, row)
                print(row, flush=True)


if __name__ == "__main__":
    sys.exit(main())
