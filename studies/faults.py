"""Faults tried on runs and files, and what happened: studies/results/faults.csv.

    python studies/faults.py [files] [trainings] [system] [signals] [kills]

Runs are of 150 digits and two seconds each; "same bits" compares plan, weights, packed and ONNX model, layers and
history (but its seconds) with those of a run that nothing happened to.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kills
import torch
from kills import MOMENTS, again, tiny

from jpq.cli.main import main as jpq
from jpq.config import Config
from jpq.export.timing.runner import hardware
from jpq.training import checkpoint

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("part", "fault", "how", "exit_code", "sentence", "n", "same_bits_afterwards", "hardware", "command")
FLAGS = [
    "--target-bops",
    "5%",
    "--limit",
    "150",
    "--epochs",
    "4",
    "--float-epochs",
    "1",
    "--batch-size",
    "16",
    "--lr",
    "3e-3",
    "--device",
    "cpu",
    "--threads",
    "1",
]


def folder_of(asked: Config) -> Path:
    return asked.run.out / asked.hash()


def bits(folder: Path) -> list[Any]:
    """What two runs must have in common."""
    table = list(csv.DictReader(io.StringIO((folder / "history.csv").read_text())))
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in table]
    names = ("plan.json", "model.safetensors", "model.packed", "model.onnx", "layers.csv")
    return [history, *((folder / name).read_bytes() for name in names)]


def told(args: list[str]) -> tuple[int, str]:
    """(exit code, the error's sentence, without this machine's paths) of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = jpq(args)
    said = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    return code, shown(said[-1] if said else "")


def shown(text: str) -> str:
    """A sentence without folders of this machine."""
    return re.sub(r"(?:/[\w.-]+)+/", "", text.removeprefix("error: "))


def killed(whole: list[Any], work: Path, rounds: int = 1) -> Iterator[tuple[Any, ...]]:
    """Every moment at which a run is killed, at a random one of its occurrences."""
    draw = random.Random(0)
    for moment, times in MOMENTS.items():
        same = 0
        for i in range(rounds):
            n = draw.randint(1, times)
            asked = tiny(work / f"{moment} {i}", every=4 * (n % 2))
            code = kills.child(asked, moment, n).exitcode
            assert code == -signal.SIGKILL
            assert kills.child(again(asked)).exitcode == 0
            same += bits(folder_of(asked)) == whole
        yield f"kill -9: {moment}", "SIGKILL, then --resume", -9, "", rounds, f"{same} of {rounds}"


def stopped(whole: list[Any], work: Path) -> Iterator[tuple[Any, ...]]:
    """Ctrl-C and SIGTERM in the search, through the command line."""
    for number in (signal.SIGINT, signal.SIGTERM):
        out = work / number.name
        command = [sys.executable, "-m", "jpq", "optimize", *FLAGS, "--out", str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while "search" not in process.stdout.readline():
                assert process.poll() is None
            process.send_signal(number)
            _, err = process.communicate()
        (said,) = (line for line in err.splitlines() if line.startswith("Stopped"))
        assert kills.child(again(tiny(out))).exitcode == 0
        same = bits(folder_of(tiny(out))) == whole
        yield f"{number.name} in the search", "signal", process.returncode, shown(said), 1, f"{int(same)} of 1"


@contextlib.contextmanager
def disk(work: Path, kilobytes: int) -> Iterator[Path]:
    """A small disk of its own."""
    place = work / "disk"
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def refused_by_the_system(whole: list[Any], work: Path) -> Iterator[tuple[Any, ...]]:
    """Full and read-only disks, and a folder that goes away."""
    for kilobytes in (300, 1200):
        with disk(work, kilobytes) as place:
            code, said = told(["optimize", *FLAGS, "--out", str(place)])
            subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
            assert kills.child(again(tiny(place))).exitcode == 0
            same = bits(folder_of(tiny(place))) == whole
        yield "disk full", f"a disk of {kilobytes} KB; more room, then --resume", code, said, 1, f"{int(same)} of 1"
    with disk(work, 64000) as place:
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        yield "read-only disk", "remounted before the run", *told(["optimize", *FLAGS, "--out", str(place)]), 1, ""
    gone = work / "gone"
    process = kills.context().Process(target=kills.removing, args=(tiny(gone),))
    process.start()
    process.join()
    said = shown((work / "said").read_text()) if (work / "said").is_file() else ""
    yield "folder removed", "in the second epoch of the search", process.exitcode, said, 1, ""


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def hostile(run: Path, work: Path) -> Iterator[tuple[Any, ...]]:
    """Files from others; the last column says whether anything in them ran."""
    weights, mark = work / "w.pth", work / "ran"
    load = ["optimize", *FLAGS, "--weights", str(weights), "--out", str(work / "never")]

    def truncated() -> None:
        torch.save({"0.weight": torch.zeros(10**5)}, weights)
        weights.write_bytes(weights.read_bytes()[:-9000])

    def bomb() -> None:
        import zipfile

        with zipfile.ZipFile(weights, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("w/data.pkl", b"\x80\x02}.")
            archive.writestr("w/data/0", bytes(2**28))

    def not_numbers() -> None:
        import jpq

        state = jpq.tasks.models.build("convnet", 10, 1).state_dict()
        state["0.weight"][0] = float("nan")
        torch.save(state, weights)

    makes: dict[str, tuple[str, Callable[[], object]]] = {
        "a .pth that runs a command": ("pickle of os.system", lambda: torch.save(Evil(mark), weights)),
        "a .pth from before torch 1.6 that does": (
            "the same",
            lambda: torch.save([Evil(mark)], weights, _use_new_zipfile_serialization=False),
        ),
        "a zip bomb": ("256 MB of zeros, deflated into a .pth", bomb),
        "a truncated .pth": ("its last 9,000 bytes are missing", truncated),
        "NaN in weights": ("one filter", not_numbers),
    }
    for fault, (how, make) in makes.items():
        make()
        code, said = told(load)
        yield fault, how, code, said, 1, ""
        assert not mark.exists()
    lies = work / "w.safetensors"
    lies.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    yield "a header of 2^62 bytes", ".safetensors", *told([*load[:-4], "--weights", str(lies), *load[-2:]]), 1, ""
    for fault, change in {
        "a plan that names code to run": {"name": "os:abort"},
        "a plan of 10 million classes": {"classes": 10**7},
        "a plan with a path as its model": {"name": "../../etc/passwd"},
    }.items():
        copy = work / "plan"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        tree = json.loads((copy / "plan.json").read_text())
        (copy / "plan.json").write_text(json.dumps({**tree, "model": {**tree["model"], **change}}))
        yield fault, json.dumps(change), *told(["evaluate", str(copy)]), 1, ""
    (work / "c.toml").write_text('[task]\nmodel = "os:abort"\n[budget]\ntarget_bops = "5%"\n')
    yield (
        "settings that name code to run",
        "--config FILE",
        *told(["optimize", "--config", str(work / "c.toml")]),
        1,
        "",
    )
    shutil.copytree(run, work / "cut")
    kept = work / "cut" / checkpoint.NAME
    kept.write_bytes(b"PK\x03\x04" + bytes(1000))
    shutil.copytree(work / "cut", work / "r" / run.name)
    yield ("a damaged checkpoint", "--resume", *told(["optimize", *FLAGS, "--out", str(work / "r"), "--resume"]), 1, "")


def trained_badly(work: Path) -> Iterator[tuple[Any, ...]]:
    """Trainings that go wrong."""
    for fault, more in {
        "a learning rate of 1e30": ["--lr", "1e30"],
        "gates and bits at a rate of 10": ["--gate-lr", "10", "--bit-lr", "10"],
        "a target that nothing can meet": ["--target-bops", "0.0001%"],
    }.items():
        code, said = told(["optimize", *FLAGS, *more, "--out", str(work / "badly")])
        yield fault, " ".join(more), code, said or "(a model within its budget)", 1, ""


def write(rows: list[dict[str, Any]]) -> None:
    with (RESULTS / "faults.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def summary() -> str:
    """The table for README."""
    with (RESULTS / "faults.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["| what happens | exit code | what jpq says | after `--resume`, the same bits |", "|---|---|---|---|"]
    kills = [row for row in rows if row["fault"].startswith("kill -9")]
    same = sum(int(row["same_bits_afterwards"].split()[0]) for row in kills)
    moments = ", ".join(row["fault"].removeprefix("kill -9: ") for row in kills)
    count = sum(int(row["n"]) for row in kills)
    lines.append(f"| kill -9, {count} times: {moments} | -9 | | {same} of {count} |")
    for row in rows:
        if row not in kills:
            said = row["sentence"].replace("|", "/").replace(" ".join(FLAGS), "...")
            code, after = row["exit_code"], row["same_bits_afterwards"]
            lines.append(f"| {row['fault']} ({row['how']}) | {code} | {said} | {after} |".replace("|  |", "| |"))
    lines += ["", f"{rows[0]['hardware']} (`python studies/faults.py`).", ""]
    return "\n".join(lines)


def main() -> None:
    start = time.perf_counter()
    asked = sys.argv[1:] or ["files", "trainings", "system", "signals", "kills"]
    path = RESULTS / "faults.csv"
    rows = []
    if len(sys.argv) > 1 and path.is_file():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["part"] not in asked]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        first = tiny(work / "whole")
        assert kills.child(first).exitcode == 0
        whole = bits(folder_of(first))
        parts: dict[str, Callable[[], Iterator[tuple[Any, ...]]]] = {
            "files": lambda: hostile(folder_of(first), work),
            "trainings": lambda: trained_badly(work),
            "system": lambda: refused_by_the_system(whole, work),
            "signals": lambda: stopped(whole, work),
            "kills": lambda: killed(whole, work),
        }
        for part in asked:
            for row in parts[part]():
                command = f"python studies/faults.py {part}"
                rows.append(dict(zip(COLUMNS, (part, *row, hardware(), command), strict=True)))
                print(*row, f"{time.perf_counter() - start:.0f} s", sep=" | ", flush=True)
                write(rows)


if __name__ == "__main__":
    main()
