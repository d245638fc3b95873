"""Faults tried on runs and files, and the outcome of each: studies/results/faults.csv.

    python studies/faults.py [files] [trainings] [system] [signals] [kills]

Runs are of 150 digits and two seconds each; "same bits" compares plan, weights, packed and ONNX model, layers and
history (but its seconds) with those of a run that nothing happened to. AMD EPYC, two cores, November 2026: every run
that went on after a kill, a signal or a full disk gave the same bits (n = 1 each). `system` needs root, to mount.
"""

from __future__ import annotations

import argparse
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
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support import kills
from support.kills import CHECKPOINT, MOMENTS, resumed, tiny_config
from support.result_rows import RESULTS, provenance

from jpq.config import Config
from jpq.tasks import build_model

PATH = RESULTS / "faults.csv"
PARTS = ("files", "trainings", "system", "signals", "kills")
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


@dataclass(frozen=True)
class Fault:
    """A fault and its outcome: one row of the CSV."""

    fault: str
    how: str
    exit_code: int | None
    sentence: str
    n: int = 1
    same_bits_afterwards: str = ""  # "k of n" runs that went on and gave the same bits


COLUMNS = ("part", *(f.name for f in fields(Fault)), "threads", "hardware", "torch", "commit", "command")


def run_folder(config: Config) -> Path:
    """The folder of a run."""
    return config.run.out / config.hash()


def comparable_bits(folder: Path) -> list[Any]:
    """The contents that two runs must have in common."""
    table = list(csv.DictReader(io.StringIO((folder / "history.csv").read_text(encoding="utf-8"))))
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in table]
    names = ("plan.json", "model.safetensors", "model.packed", "model.onnx", "layers.csv")
    return [history, *((folder / name).read_bytes() for name in names)]


def run_jpq(args: list[str]) -> tuple[int, str]:
    """(exit code, the error's sentence, without this machine's paths) of a command."""
    done = subprocess.run([sys.executable, "-m", "jpq", *args], capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return done.returncode, without_folders(errors[-1] if errors else "")


def without_folders(text: str) -> str:
    """A sentence without folders of this machine."""
    return re.sub(r"(?:/[\w.-]+)+/", "", text.removeprefix("error: "))


def same_after_resume(config: Config, reference: list[Any]) -> bool:
    """Let a run go on in a child process, and compare its bits with the reference's."""
    assert kills.run_in_child(resumed(config)).exitcode == 0
    return comparable_bits(run_folder(config)) == reference


def try_kills(reference: list[Any], work: Path, rounds: int = 1) -> Iterator[Fault]:
    """Every moment at which a run is killed, at a random one of its occurrences."""
    draw = random.Random(0)
    for moment, times in MOMENTS.items():
        same = 0
        for i in range(rounds):
            n = draw.randint(1, times)
            config = tiny_config(work / f"{moment} {i}", every=4 * (n % 2))
            code = kills.run_in_child(config, moment, n).exitcode
            assert code == -signal.SIGKILL
            same += same_after_resume(config, reference)
        yield Fault(f"kill -9: {moment}", "SIGKILL, then --resume", -9, "", rounds, f"{same} of {rounds}")


def try_signals(reference: list[Any], work: Path) -> Iterator[Fault]:
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
        (sentence,) = (line for line in err.splitlines() if line.startswith("Stopped"))
        same = int(same_after_resume(tiny_config(out), reference))
        code = process.returncode
        yield Fault(
            f"{number.name} in the search",
            "signal",
            code,
            without_folders(sentence),
            same_bits_afterwards=f"{same} of 1",
        )


@contextlib.contextmanager
def small_disk(work: Path, kilobytes: int) -> Iterator[Path]:
    """A small disk of its own, in memory."""
    place = work / "disk"
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def try_disks(reference: list[Any], work: Path) -> Iterator[Fault]:
    """Full and read-only disks, and a folder that is removed."""
    for kilobytes in (300, 1200):
        with small_disk(work, kilobytes) as place:
            code, sentence = run_jpq(["optimize", *FLAGS, "--out", str(place)])
            subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
            same = int(same_after_resume(tiny_config(place), reference))
        how = f"a disk of {kilobytes} KB; more room, then --resume"
        yield Fault("disk full", how, code, sentence, same_bits_afterwards=f"{same} of 1")
    with small_disk(work, 64000) as place:
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        command = ["optimize", *FLAGS, "--out", str(place)]
        yield Fault("read-only disk", "remounted before the run", *run_jpq(command))
    process = kills.context().Process(target=kills.run_and_remove_folder, args=(tiny_config(work / "gone"),))
    process.start()
    process.join()
    message = work / "said"
    sentence = without_folders(message.read_text(encoding="utf-8")) if message.is_file() else ""
    yield Fault("folder removed", "in the second epoch of the search", process.exitcode, sentence)


class Evil:
    """An object that runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def write_truncated(path: Path) -> None:
    """A weights file without its end."""
    torch.save({"0.weight": torch.zeros(10**5)}, path)
    path.write_bytes(path.read_bytes()[:-9000])


def write_bomb(path: Path) -> None:
    """A weights file that is far larger once it is unpacked."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", b"\x80\x02}.")
        archive.writestr("w/data/0", bytes(2**28))


def write_nan(path: Path) -> None:
    """A weights file with NaN in one filter."""
    state = build_model("convnet", 10, 1).state_dict()
    state["0.weight"][0] = float("nan")
    torch.save(state, path)


def try_files(run: Path, work: Path) -> Iterator[Fault]:
    """Damaged and hostile files; nothing in them may run."""
    yield from try_weights(work)
    yield from try_plans(run, work)
    (work / "c.toml").write_text('[task]\nmodel = "os:abort"\n[budget]\ntarget_bops = "5%"\n', encoding="utf-8")
    outcome = run_jpq(["optimize", "--config", str(work / "c.toml")])
    yield Fault("settings that name code to run", "--config FILE", *outcome)
    shutil.copytree(run, work / "r" / run.name)
    (work / "r" / run.name / CHECKPOINT).write_bytes(b"PK\x03\x04" + bytes(1000))
    outcome = run_jpq(["optimize", *FLAGS, "--out", str(work / "r"), "--resume"])
    yield Fault("a damaged checkpoint", "--resume", *outcome)


def try_weights(work: Path) -> Iterator[Fault]:
    """Damaged and hostile weights."""
    weights, mark, out = work / "w.pth", work / "ran", str(work / "never")
    writers: dict[str, tuple[str, Callable[[], object]]] = {
        "a .pth that runs a command": ("pickle of os.system", partial(torch.save, Evil(mark), weights)),
        "a .pth from before torch 1.6 that does": (
            "the same",
            partial(torch.save, [Evil(mark)], weights, _use_new_zipfile_serialization=False),
        ),
        "a zip bomb": ("256 MB of zeros, deflated into a .pth", partial(write_bomb, weights)),
        "a truncated .pth": ("its last 9,000 bytes are missing", partial(write_truncated, weights)),
        "NaN in weights": ("one filter", partial(write_nan, weights)),
    }
    for fault, (how, write) in writers.items():
        write()
        yield Fault(fault, how, *run_jpq(["optimize", *FLAGS, "--weights", str(weights), "--out", out]))
        assert not mark.exists()
    weights = work / "w.safetensors"
    weights.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    outcome = run_jpq(["optimize", *FLAGS, "--weights", str(weights), "--out", out])
    yield Fault("a header of 2^62 bytes", ".safetensors", *outcome)


def try_plans(run: Path, work: Path) -> Iterator[Fault]:
    """Plans whose model entry was changed."""
    changes: dict[str, dict[str, object]] = {
        "a plan that names code to run": {"name": "os:abort"},
        "a plan of 10 million classes": {"classes": 10**7},
        "a plan with a path as its model": {"name": "../../etc/passwd"},
    }
    for fault, change in changes.items():
        copy = work / "plan"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        plan = json.loads((copy / "plan.json").read_text(encoding="utf-8"))
        (copy / "plan.json").write_text(json.dumps({**plan, "model": {**plan["model"], **change}}), encoding="utf-8")
        yield Fault(fault, json.dumps(change), *run_jpq(["evaluate", str(copy)]))


def try_trainings(work: Path) -> Iterator[Fault]:
    """Trainings that go wrong."""
    flags = {
        "a learning rate of 1e30": ["--lr", "1e30"],
        "gates and bits at a rate of 10": ["--gate-lr", "10", "--bit-lr", "10"],
        "a target that nothing can meet": ["--target-bops", "0.0001%"],
    }
    for fault, more in flags.items():
        code, sentence = run_jpq(["optimize", *FLAGS, *more, "--out", str(work / "badly")])
        yield Fault(fault, " ".join(more), code, sentence or "(a model within its budget)")


def faults_table() -> str:
    """README's table: each fault, exit code, error message, and whether the resumed run gave the same bits."""
    with PATH.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = ["| what happens | exit code | what jpq says | after `--resume`, the same bits |", "|---|---|---|---|"]
    killed = [row for row in rows if row["fault"].startswith("kill -9")]
    same = sum(int(row["same_bits_afterwards"].split()[0]) for row in killed)
    moments = ", ".join(row["fault"].removeprefix("kill -9: ") for row in killed)
    count = sum(int(row["n"]) for row in killed)
    lines.append(f"| kill -9, {count} times: {moments} | -9 | | {same} of {count} |")
    for row in rows:
        if row not in killed:
            sentence = row["sentence"].replace("|", "/").replace(" ".join(FLAGS), "...")
            code, after = row["exit_code"], row["same_bits_afterwards"]
            lines.append(f"| {row['fault']} ({row['how']}) | {code} | {sentence} | {after} |".replace("|  |", "| |"))
    lines += ["", f"{rows[0]['hardware']} (`python studies/faults.py`).", ""]
    return "\n".join(lines)


def write_rows(rows: list[dict[str, Any]]) -> None:
    """Write the CSV anew."""
    with PATH.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def main() -> None:
    """Try the parts that are named, or all of them; their rows replace the old ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parts = parser.parse_args().parts or list(PARTS)
    if not set(parts) <= set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}")
    start, rows = time.perf_counter(), []
    if set(parts) != set(PARTS) and PATH.is_file():
        with PATH.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["part"] not in parts]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        config = tiny_config(work / "whole")
        assert kills.run_in_child(config).exitcode == 0
        reference = comparable_bits(run_folder(config))
        trials: dict[str, Callable[[], Iterator[Fault]]] = {
            "files": partial(try_files, run_folder(config), work),
            "trainings": partial(try_trainings, work),
            "system": partial(try_disks, reference, work),
            "signals": partial(try_signals, reference, work),
            "kills": partial(try_kills, reference, work),
        }
        for part in parts:
            for fault in trials[part]():
                about = provenance(f"python studies/faults.py {part}", fault.n, threads=1)
                rows.append({"part": part, **about, **asdict(fault)})
                print(*asdict(fault).values(), f"{time.perf_counter() - start:.0f} s", sep=" | ", flush=True)
                write_rows(rows)


if __name__ == "__main__":
    main()
