"""Real workers of a study: processes that are started, waited for and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jpq

FLAGS = "--limit 300 --epochs 4 --float-epochs 1 --batch-size 32 --no-early-stop --per network --dead-after 3"


def worker(out: Path, *flags: str) -> subprocess.Popen[str]:
    """A `jpq study` process; its output goes to a file in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    path = {"PYTHONPATH": os.pathsep.join([str(Path(jpq.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    said = (out / f"worker{len(list(out.glob('worker*.txt')))}.txt").open("w")
    return subprocess.Popen(
        [sys.executable, "-m", "jpq", "study", *FLAGS.split(), "--out", str(out), *flags],
        env={**os.environ, **path, "OMP_NUM_THREADS": "1"},
        stdout=said,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(holds: Callable[[], bool], what: str, seconds: float = 240) -> None:
    """Wait for something that processes do."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def training(out: Path, beyond: int) -> bool:
    """Whether some run is in the middle of its training, after so many trials have ended."""
    runs = out / "study" / "trials"
    return len(list(runs.glob("*/result.json"))) >= beyond and any(runs.glob("*/checkpoint.pt"))


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL: nothing is cleaned up."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def said(out: Path) -> str:
    """What all workers wrote."""
    return "\n".join(file.read_text() for file in sorted(out.glob("worker*.txt")))
