"""Two processes under torchrun: the same gradients, plans and files as one, and one sentence where something fails."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from runs import QUICK, config
from together import METHODS, one_step

import jpq
from jpq.training import distributed
from jpq.types import JpqError

TESTS = Path(__file__).parents[1]
FLAGS = [
    "--target-bops",
    "1%",
    "--limit",
    "600",
    "--epochs",
    "4",
    "--float-epochs",
    "3",
    "--lr",
    "3e-3",
    "--device",
    "cpu",
]
LIMIT = 300  # seconds, after which something hangs


def environment():
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS / "support")])
    return {**kept, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def torchrun(*args, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return subprocess.Popen(
        [*command, *map(str, args)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(process):
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def test_one_process_alone_is_left_as_it_is():
    assert distributed.count() == 1
    assert distributed.is_first()
    split = distributed.Split(torch.nn.BatchNorm1d(2))
    x, y = torch.rand(5, 2), torch.zeros(5)
    assert split.take(x, y) == (x, y)
    assert split.weight == 1
    assert not split.norms
    distributed.check_same("a", "a plan")
    assert distributed.first_then_others(lambda: 3) == distributed.run_on_first(lambda: 3) == 3


def test_batches_smaller_than_the_processes_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 4)
    with pytest.raises(JpqError, match="batch_size=3 is shared by 4 processes"):
        distributed.check_rows(3)


@pytest.mark.slow
def test_gradients_and_statistics_are_those_of_one_process(tmp_path):
    """Of weights, gates and bits, in float64, with an uneven split: noise per sample and per batch included."""
    code, _, err = finished(torchrun("together", "steps", tmp_path, processes=3))
    assert code == 0, err[-2000:]
    parts = [torch.load(tmp_path / f"3-{rank}.pt") for rank in range(3)]
    for method in METHODS:
        alone = one_step(method)
        assert sum(name.startswith("gradient") for name in alone) > 10
        for part in parts:
            assert set(part[method]) == set(alone)
            for name, value in alone.items():
                error = (part[method][name] - value).abs().max() if value.numel() else torch.zeros(())
                assert error <= 1e-9 * max(1.0, float(value.abs().max()) if value.numel() else 0), (method, name)


@pytest.mark.slow
def test_processes_that_disagree_are_told_and_what_the_first_says_holds(tmp_path):
    code, _, err = finished(torchrun("together", "disagree", tmp_path))
    assert code == 0, err[-2000:]
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert first.splitlines()[:2] == [
        "Process 1 has a plan that differs from the first one's. All need the same code, versions, data and settings.",
        "there is no such file",
    ]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(folder of a run by two processes, their screen, the result of one process)."""
    out = tmp_path_factory.mktemp("ranks")
    code, screen, err = finished(torchrun("jpq", "optimize", *FLAGS, "--out", out / "two"))
    assert code == 0, err[-2000:]
    (folder,) = (out / "two").iterdir()
    return folder, screen, jpq.optimize(config(out / "one", train=QUICK))


@pytest.mark.slow
def test_two_processes_end_where_one_does(both):
    folder, screen, alone = both
    assert folder.name == alone.folder.name
    assert {p.name for p in folder.iterdir()} == {p.name for p in alone.folder.iterdir()}
    two, one = (pd.read_csv(f / "history.csv") for f in (folder, alone.folder))
    assert list(two.phase) == list(one.phase)
    # Gradients are the same to 1e-9 in float64 (above). In float32 rounding adds up, and Adam divides it by small
    # gradients: how fast depends on the processor's kernels (7e-5 in three epochs with AVX2, below 1e-5 elsewhere).
    assert two.loss[0] == pytest.approx(one.loss[0], rel=1e-4)
    assert two.loss[:3].to_numpy() == pytest.approx(one.loss[:3].to_numpy(), rel=1e-3)
    assert two.loss.to_numpy() == pytest.approx(one.loss.to_numpy(), rel=0.02)
    small, _ = jpq.load(folder)
    assert jpq.measure(small, torch.rand(2, 1, 8, 8))["bops"] <= alone.targets["bops"]["limit"]
    assert (
        abs(pd.read_json(folder / "result.json", typ="series").compressed["accuracy"] - alone.compressed.accuracy)
        < 0.03
    )
    assert screen.count("float       3/3") == 1  # the first process speaks


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers in Linux's /proc")
def test_where_one_process_is_killed_all_end_and_the_run_goes_on(both, tmp_path):
    folder, _, _ = both
    args = ("jpq", "optimize", *FLAGS, "--out", tmp_path)
    process = torchrun(*args)
    until = time.monotonic() + LIMIT
    while time.monotonic() < until and process.poll() is None and not list(tmp_path.glob("*/checkpoint.pt")):
        time.sleep(0.02)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    code, _, _ = finished(process)
    assert code != 0
    assert len(workers) == 2
    assert list(tmp_path.glob("*/checkpoint.pt"))
    code, _, err = finished(torchrun(*args, "--resume"))
    assert code == 0, err[-2000:]
    (again,) = tmp_path.iterdir()
    weights = [jpq.load(f)[0].state_dict() for f in (again, folder)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data", "together:unlike"], "Process 1 has a data set that differs"),
        (["--target-bops", "0.0001%"], "smallest possible"),
    ],
)
def test_errors_end_all_processes_with_one_sentence(flags, says, tmp_path):
    code, _, err = finished(torchrun("jpq", "optimize", *FLAGS, "--out", tmp_path, *flags))
    assert code != 0
    assert says in err
    assert err.count("error: ") == 1
    assert f'File "{TESTS.parent}' not in err  # no traceback of ours
