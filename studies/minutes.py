"""The tier of minutes: accuracy and seconds of a trained network that is quantized without training.

For the same plan a row for each number of steps: 0 rounds weights to nearest, with ranges of least squared error and
BatchNorm measured anew; above 0 their rounding is learned block by block. Seconds are of the whole run (decisions,
reconstruction, export, checks); `cpu_seconds` depend less on what else the machine does. The test split is read once a
run, at its end.

    python studies/minutes.py --model resnet20 --weights w.th --data cifar10 --data-root data --bits 4/4
"""

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch
from support.result_rows import RESULTS, append_row, provenance

import jpq
from jpq.config import Config, Decide, Run, Task, Train

TABLE = RESULTS / "minutes.csv"


def parse() -> argparse.Namespace:
    """The flags of this study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--bits", default="4/4", help="weight bits / activation bits, as of jpq optimize")
    parser.add_argument("--target-bops", default="", help="in place of --bits: a plan of --method measured")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 500], help="steps a block; 0 rounds to nearest")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Append a row for each number of steps."""
    flags = parse()
    torch.set_num_threads(1)
    given = [a for a in sys.argv[1:] if a not in (str(flags.weights), "--weights", str(flags.data_root), "--data-root")]
    command = shlex.join(["python", "studies/minutes.py", "--weights", flags.weights.name, *given])
    for steps in flags.steps:
        append_row(TABLE, {**measure(flags, steps), **provenance(command, threads=1)})


def measure(flags: argparse.Namespace, steps: int) -> dict[str, object]:
    """The figures of one run."""
    with tempfile.TemporaryDirectory() as folder:
        decide = Decide(method="measured") if flags.target_bops else Decide(bits=flags.bits)
        config = Config(
            task=Task(model=flags.model, weights=flags.weights, data=flags.data, data_root=flags.data_root),
            budget=jpq.Budget(target_bops=flags.target_bops or None),
            decide=decide,
            train=Train(effort="minutes", reconstruction_steps=steps, reconstruction_samples=flags.samples),
            run=Run(seed=flags.seed, threads=1, out=Path(folder)),
        )
        began, cpu_began = time.perf_counter(), time.process_time()
        result = jpq.optimize(config)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return {
        "model": flags.model,
        "data": flags.data,
        "plan": f"measured, {flags.target_bops} of the BOPs" if flags.target_bops else f"--bits {flags.bits}",
        "bops_share": result.compressed.bops_share,
        "rounding": f"learned, {steps} steps a block" if steps else "nearest",
        "samples": flags.samples if steps else 0,
        "seed": flags.seed,
        "float_accuracy": result.float.accuracy,
        "accuracy": result.compressed.accuracy,
        "held_out": result.held_out["compressed"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "reconstruction_seconds": result.seconds.get("reconstruction", 0.0),
    }


if __name__ == "__main__":
    main()
