"""Throughput of two workers of one study beside one worker: digits, convnet, one thread each.

One worker and two in turns, so that what else the machine does falls on both; each worker in a session of its own, as
Linux shares a busy machine out by session. A row per study in results/workers.csv. On a busy machine trials a minute
say little; processor seconds a trial (the start of Python included) say whether workers get in each other's way. Two
busy x86-64 cores, November 2026: two workers gave 2.0 times the trials a minute over 14 trials (n = 1) and 1.5 times
over 6 (n = 2).

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
from optuna.trial import FrozenTrial, TrialState
from support.result_rows import RESULTS, append_row, provenance

PATH = RESULTS / "workers.csv"


def measure_workers(workers: int, trials: int, epochs: int, weights: Path) -> dict[str, float]:
    """Trials a minute, from the beginning of the first trial to the end of the last."""
    with tempfile.TemporaryDirectory() as folder:
        spent = _run_workers(workers, trials, epochs, weights, folder)
        backend = optuna.storages.journal.JournalFileBackend(str(Path(folder) / "s" / "journal.log"))
        study = optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(backend))
        done = [t for t in study.trials if _is_trained(t)]
        begin, end = min(t.datetime_start for t in done), max(t.datetime_complete for t in done)
        seconds = (end - begin).total_seconds()
        trial_seconds = statistics.mean((t.datetime_complete - t.datetime_start).total_seconds() for t in done)
        return {
            "trials": len(done),
            "seconds": round(seconds, 1),
            "per_minute": round(60 * len(done) / seconds, 2),
            "seconds_a_trial": round(trial_seconds, 2),
            "cpu_seconds_a_trial": round(spent / len(done), 2),
        }


def _run_workers(workers: int, trials: int, epochs: int, weights: Path, folder: str) -> float:
    """Run one study with so many workers; the processor seconds of all of them."""
    flags = f"--trials {trials} --epochs {epochs} --sampler random --no-early-stop --no-anchors --no-pictures --name s"
    command = [sys.executable, "-m", "jpq", "study", *flags.split(), "--weights", str(weights), "--out", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    processes = [
        subprocess.Popen(
            [*command, "--threads", "1"], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )
        for _ in range(workers)
    ]
    assert all([process.wait() == 0 for process in processes])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _is_trained(trial: FrozenTrial) -> bool:
    """Whether a trial trained a model, rather than repeat the decisions of an earlier one."""
    return trial.state == TrialState.COMPLETE and "same_as" not in trial.user_attrs


def main() -> None:
    """Measure in turns; rows are appended as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    weights = Path("runs/workers/s/float.safetensors")
    if not weights.exists():
        flags = "--trials 1 --epochs 2 --float-epochs 10 --name s --out runs/workers"
        subprocess.run([sys.executable, "-m", "jpq", "study", *flags.split()], check=True, stdout=subprocess.DEVNULL)
    command = f"python studies/workers.py --trials {args.trials} --epochs {args.epochs}"
    for turn in range(args.rounds):
        for workers in (1, 2) if turn % 2 == 0 else (2, 1):
            load, date = os.getloadavg()[0], time.strftime("%Y-%m-%d")
            figures = measure_workers(workers, args.trials, args.epochs, weights)
            row = {
                "workers": workers,
                "round": turn,
                **figures,
                "epochs": args.epochs,
                "load_before": round(load, 1),
                "threads_each": 1,
                "date": date,
                **provenance(command, threads=workers),
            }
            append_row(PATH, row)
            print(workers, figures, f"load {load:.1f}", flush=True)
    table = pd.read_csv(PATH)
    speeds = table.pivot_table(index=["trials", "round"], columns="workers", values="per_minute")
    print((speeds[2] / speeds[1]).round(2).to_string())


if __name__ == "__main__":
    main()
