"""Which weight of the gates' penalty (--gate-weight) a short search of djpq should have, judged on held-out samples.

    python studies/gate_penalty.py [--weights 0.01 0.03 ...] [--targets 1% 0.25%] [--seeds 0 1 2 3 4]

The convnet on the digits, 20 epochs of search and 20 of fine-tuning; a third of the training samples (449) are held out
and judge: mean cross entropy and accuracy of the small model. The test split is not read. The float model of a seed is
trained once. Rows: results/gate_penalty.csv; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from support.grid import channels_kept
from support.result_rows import RESULTS, append_row, provenance, read_rows

import jpq
from jpq.config import Budget, Decide, Run, Task
from jpq.results import Result
from jpq.tasks import load_data

PATH = RESULTS / "gate_penalty.csv"
KEY = ["target", "weight", "seed"]
HELD_OUT = 1 / 3  # of the training samples
BASE = jpq.Config(task=Task(held_out=HELD_OUT))
WEIGHTS = [0.01, 0.03, 0.1, 0.3, 1.0]


def config_of(target: str, weight: float, seed: int, folder: Path, floats: Path) -> jpq.Config:
    """The settings of one run; the float weights of its seed are taken from `floats` where they are there."""
    known = floats / f"{seed}.safetensors"
    return replace(
        BASE,
        task=replace(BASE.task, weights=known if known.exists() else None),
        budget=Budget(target_bops=target),
        decide=Decide(method="djpq", gate_weight=weight),
        run=Run(seed=seed, out=folder, device="cpu", threads=1),
    )


def held_out_loss(result: Result, seed: int) -> float:
    """Mean cross entropy of the small model of a run over its held-out samples."""
    data = load_data("digits", held_out=HELD_OUT, seed=seed)
    model, _ = jpq.load(result.folder)
    with torch.no_grad():
        pairs = [(torch.nn.functional.cross_entropy(model(x), y, reduction="sum"), len(y)) for x, y in data.held_out]
    return float(sum(loss for loss, _ in pairs)) / sum(n for _, n in pairs)


def run_one(target: str, weight: float, seed: int, floats: Path) -> dict[str, object]:
    """One run, as a row."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = jpq.optimize(config_of(target, weight, seed, Path(folder), floats), final=False)
        trained, kept = result.folder / "float.safetensors", floats / f"{seed}.safetensors"
        if not kept.exists():
            shutil.copy(trained, kept)
        loss = held_out_loss(result, seed)
    return {
        "model": BASE.task.model,
        "data": BASE.task.data,
        "method": "djpq",
        "target": target,
        "weight": weight,
        "seed": seed,
        "epochs": BASE.train.epochs,
        "held_out_loss": round(loss, 5),
        "held_out_accuracy": round(result.held_out["compressed"], 4),
        "float_held_out_accuracy": round(result.held_out["float"], 4),
        "held_out_samples": load_data("digits", held_out=HELD_OUT, seed=seed).held_out.size,
        "channels_kept": channels_kept(result),
        "bops_share": round(result.compressed.bops_share, 7),
        "cpu_seconds": round(time.process_time() - start, 1),
        **provenance(
            f"python studies/gate_penalty.py --weights {weight} --targets {shlex.quote(target)} --seeds {seed}"
        ),
    }


def summary(table: pd.DataFrame) -> str:
    """Means over seeds, and paired differences from the default weight, with standard errors."""
    lines = []
    default = Decide.gate_weight
    for target, part in table.groupby("target"):
        losses = part.pivot(index="seed", columns="weight", values="held_out_loss")
        shares = part.pivot(index="seed", columns="weight", values="held_out_accuracy")
        kept = part.pivot(index="seed", columns="weight", values="channels_kept").mean()
        for weight in losses:
            line = (
                f"{target} weight {weight}: n {losses[weight].count()}, loss {losses[weight].mean():.4f}, accuracy "
                f"{shares[weight].mean():.4f}, channels {kept[weight]:.3f}"
            )
            if default in losses:
                differences = ((x[weight] - x[default]).dropna() for x in (losses, shares))
                line += f"; against {default}: {', '.join(f'{d.mean():+.4f} +- {d.sem():.4f}' for d in differences)}"
            lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and print the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", type=float, default=WEIGHTS)
    parser.add_argument("--targets", nargs="+", default=["0.25%", "1%"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as floats:
        for seed in args.seeds:
            for target in args.targets:
                for weight in args.weights:
                    known = read_rows(PATH, KEY)
                    if not ((known.target == target) & (known.weight == weight) & (known.seed == seed)).any():
                        append_row(PATH, row := run_one(target, weight, seed, Path(floats)))
                        print(row, flush=True)
    print(summary(read_rows(PATH, KEY)))


if __name__ == "__main__":
    main()
