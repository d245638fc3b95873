"""Do two workers of one study give twice the trials a minute? Digits, convnet, one thread each.

One worker and two in turns, so that what else the machine does falls on both; each worker in a session of its own, as
Linux shares a busy machine out by session. A row per study in results/workers.csv. On a busy machine trials a minute
say little; processor seconds a trial (the start of Python included) say whether workers get in each other's way.

    python studies/workers.py --rounds 2
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import pandas as pd
import torch
from grid import RESULTS, append, hardware

from jpq.trials.trial import counts

PATH = RESULTS / "workers.csv"


def measured(workers: int, trials: int, epochs: int, weights: Path) -> dict[str, float]:
    """Trials a minute, from the beginning of the first trial to the end of the last."""
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--trials {trials} --epochs {epochs} --sampler random --no-early-stop --no-anchors --no-pictures --name s"
        )
        command = [sys.executable, "-m", "jpq", "study", *flags.split(), "--weights", str(weights), "--out", folder]
        own = {**os.environ, "OMP_NUM_THREADS": "1"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = [
            subprocess.Popen([*command, "--threads", "1"], env=own, stdout=subprocess.DEVNULL, start_new_session=True)
            for _ in range(workers)
        ]
        assert all([process.wait() == 0 for process in started])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        backend = optuna.storages.journal.JournalFileBackend(str(Path(folder) / "s" / "journal.log"))
        study = optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(backend))
        done = [t for t in study.trials if counts(t)]
        begin, end = min(t.datetime_start for t in done), max(t.datetime_complete for t in done)
        seconds = (end - begin).total_seconds()
        own_seconds = statistics.mean((t.datetime_complete - t.datetime_start).total_seconds() for t in done)
        return {
            "trials": len(done),
            "seconds": round(seconds, 1),
            "per_minute": round(60 * len(done) / seconds, 2),
            "seconds_a_trial": round(own_seconds, 2),
            "cpu_seconds_a_trial": round(spent / len(done), 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    weights = Path("runs/workers/s/float.safetensors")
    if not weights.exists():
        first = "--trials 1 --epochs 2 --float-epochs 10 --name s --out runs/workers"
        subprocess.run([sys.executable, "-m", "jpq", "study", *first.split()], check=True, stdout=subprocess.DEVNULL)
    for turn in range(args.rounds):
        for workers in (1, 2) if turn % 2 == 0 else (2, 1):
            load = os.getloadavg()[0]
            clock = time.strftime("%Y-%m-%d")
            row = measured(workers, args.trials, args.epochs, weights)
            append(
                PATH,
                {
                    "workers": workers,
                    "round": turn,
                    **row,
                    "epochs": args.epochs,
                    "load_before": round(load, 1),
                    "threads_each": 1,
                    "hardware": hardware(),
                    "torch": torch.__version__,
                    "date": clock,
                    "command": f"python studies/workers.py --trials {args.trials} --epochs {args.epochs}",
                },
            )
            print(workers, row, f"load {load:.1f}", flush=True)
    table = pd.read_csv(PATH)
    by = table.pivot_table(index=["trials", "round"], columns="workers", values="per_minute")
    print((by[2] / by[1]).round(2).to_string())


if __name__ == "__main__":
    main()
