"""The header of a run and the warning before compression: printed once, before anything else."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import refused
from rich.console import Console

from jpq.cli.header import describe_targets, header
from jpq.cli.main import main
from jpq.cli.progress import ProgressDisplay
from jpq.results.description import RunDescription, TargetDescription
from jpq.tasks import models

Captured = pytest.CaptureFixture[str]

ABOUT = RunDescription(
    model="resnet20",
    parameters=272_474,
    layers=20,
    macs=40_812_544,
    data="cifar10",
    sizes={"train": 45_000, "held-out": 5000, "test": 10_000},
    shape=(3, 32, 32),
    classes=10,
    device="cuda:0",
    threads=4,
    processes=2,
    method="djpq",
    targets=(
        TargetDescription("bops", "0.9%", 376_000_000, 41_792_045_056.0),
        TargetDescription("size", "50KB", 50_000, 1_089_896.0),
        TargetDescription("latency", "50%", 1_500_000, 3_000_000.0),
    ),
    phases={"float": 40, "search": 20, "fine-tune": 0},
    folder=Path("runs/r20"),
    resumed=True,
)


def shown(width: int, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal)
    with ProgressDisplay(console, {}) as display:
        display.describe(ABOUT)
        display.warn("The float model is near chance.")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_names_with_colons_are_no_pictures(capsys: Captured) -> None:
    """Rich shows :notes: as a picture."""
    assert "':notes:' is not there" in refused(["inspect", "--data", "folder::notes:"], capsys)


def test_one_output_is_no_outputs() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(header(replace(ABOUT, classes=1)))
    assert ", 1 output\n" in re.sub(" +\n", "\n", console.file.getvalue())  # type: ignore[attr-defined]


def test_the_header_says_what_the_data_were_taken_for() -> None:
    console = Console(file=io.StringIO(), width=100)
    notes = ("Read as images with masks [0].",)
    console.print(header(replace(ABOUT, task="segmentation, judged by mIoU", notes=notes)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [line.rstrip() for line in text.splitlines()]
    assert "task    segmentation, judged by mIoU" in lines
    assert lines[-1] == "note    Read as images with masks [0]."
    assert not any(line.startswith(("task", "note")) for line in shown(100).splitlines())


@pytest.mark.parametrize("terminal", [False, True])
def test_the_header_says_what_the_run_works_on(terminal: bool) -> None:
    text = " ".join(shown(120, terminal).split())
    for words in (
        "model resnet20: 272 K parameters, 20 layers, 40.8 M MACs a sample",
        "data cifar10: 45,000 train, 5,000 held-out, 10,000 test; samples of 3 x 32 x 32, 10 outputs",
        "method djpq",
        "target BOPs 0.9% = 376 M of 41.8 G; size 50KB = 50.0 KB of 1.09 MB; latency 50% = 1.50 ms of 3.00 ms",
        "epochs 40 float, 20 search device",
        "device cuda:0, 4 CPU threads, 2 processes",
        "folder runs/r20 (goes on from its checkpoint)",
        "warning The float model is near chance.",
    ):
        assert words in text, words


def test_the_header_fits() -> None:
    from rich.console import Group

    console = Console(file=io.StringIO(), width=80)
    console.print(Group(header(ABOUT)))
    assert max(map(len, console.file.getvalue().splitlines())) <= 80  # type: ignore[attr-defined]


def test_many_targets_are_counted() -> None:
    many = tuple(TargetDescription("bops", f"{i}%", i * 1000, 1e5) for i in range(12, 0, -1))
    text = describe_targets(many)
    assert text.startswith("BOPs 12% = 12.0 K of 100 K; ")
    assert text.endswith("; and 4 more")
    assert describe_targets(()) == ""


TINY = ["--limit", "100", "--epochs", "2", "--float-epochs", "1"]


def test_a_run_begins_with_its_header(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["optimize", "--target-bops", "2%,1%", *TINY, "--epochs", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    labels = ["model", "data", "method", "target", "epochs", "device", "folder"]
    assert [line.split()[0] for line in lines[:7]] == labels
    assert sum(line.startswith("model ") for line in lines) == 1
    assert "digits: 90 train, 10 held-out, 449 test" in lines[1]
    assert "BOPs 2% = 18.5 M of 925 M; BOPs 1% = 9.25 M of 925 M" in lines[3]


def test_a_float_model_near_chance_is_named_before_the_search(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    torch.manual_seed(0)
    torch.save(models.build("convnet", 10, 1).state_dict(), "random.pth")
    assert main(["optimize", "--target-bops", "1%", "--weights", "random.pth", *TINY]) == 0
    out = capsys.readouterr().out
    warning = re.search(
        r"warning The float model is near chance: its held-out accuracy is \d+\.\d\d % on 10 samples", out
    )
    assert warning is not None
    assert "guessing gives 10.00 %. Check --weights and --data." in out
    assert warning.start() < out.index("search ")
    assert "note" in out[out.index("search ") :], "the summary repeats it"
