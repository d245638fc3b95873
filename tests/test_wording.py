"""Errors name settings as their reader does: parameters in Python, flags on the command line."""

from __future__ import annotations

import ast
import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused

import jpq
from jpq.config import Budget, Config, Decide, Run, Task, Train
from jpq.data_free import DataFreeSettings
from jpq.trials import Study
from jpq.types import JpqError, name_parameters

ROOT = Path(__file__).parents[1]
FLAG = re.compile(r"(?<![\w/-])--[a-z]")

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("--lr nan must be a positive number.", "lr=nan must be a positive number."),
        ("--lr 1e-05 is small, --lr -1.0 is not.", "lr=1e-05 is small, lr=-1.0 is not."),
        ("--w-bits 9 3: give two.", "w_bits=(9, 3): give two."),
        ("--input-shape 3 224 224.", "input_shape=(3, 224, 224)."),
        (
            "Give --target-bops 1% (or 12M) or --target-size 50KB.",
            "Give target_bops='1%' (or 12M) or target_size='50KB'.",
        ),
        ("--target-bops 4%,2%,: a value is missing.", "target_bops='4%,2%',: a value is missing."),
        ("--bits 4/4,conv=8/8: no.", "bits='4/4,conv=8/8': no."),
        ("Raise --density, or leave --mask out.", "Raise density, or leave mask out."),
        ("--no-synthetic: never.", "synthetic=False: never."),
        ("Run `jpq bench --table FILE.csv --model NAME`, then.", "Run `jpq bench`, then."),
        ("The file a/--b, c--d and -- stay.", "The file a/--b, c--d and -- stay."),
    ],
)
def test_flags_become_parameters(text: str, python: str) -> None:
    error = JpqError(text)
    assert (str(error), error.command_line) == (python, text)
    copied = pickle.loads(pickle.dumps(error))  # between processes of torchrun
    assert (str(copied), copied.command_line) == (python, text)


def test_parameters_may_have_other_names() -> None:
    assert name_parameters("--target-bops 0 is too small.", {"target_bops": "bops"}) == "bops=0 is too small."


SENSELESS: dict[str, dict[str, Any]] = {
    "no target": {},
    "amount": {"bops": "0"},
    "no amount": {"size": "a lot"},
    "more than all": {"macs": "101%"},
    "too small": {"bops": "0.00001%"},
    "no table": {"latency": "3ms"},
    "widths": {"bops": "1%", "w_bits": (5, 3)},
    "image": {"bops": "1%", "image_bits": 40},
    "results": {"bops": "1%", "output_bits": 9},
    "density": {"bops": "1%", "density": 2.0},
    "multiple": {"bops": "1%", "channel_multiple": 0},
    "method": {"bops": "1%", "method": "djqp"},
    "structure": {"bops": "1%", "structure": "2:4"},
    "width": {"bops": "1%", "method": "dpf", "width": "fixed"},
    "score": {"bops": "1%", "score": "l2"},
    "schedule": {"bops": "1%", "method": "two-stage", "schedule": "cubic"},
    "classes": {"bops": "1%", "method": "taylor", "classes": "0,1"},
    "allocator": {"bops": "1%", "allocator": "greedy"},
    "by hand": {"bits": "4/4", "structure": "2:4"},
    "by hand, without": {"method": "by-hand"},
    "by hand, too dear": {"bits": "8/8", "bops": "1%"},
    "mask": {"bops": "1%", "method": "masked"},
    "mask that is not there": {"bops": "1%", "mask": "nowhere.json"},
    "norms": {"bops": "1%", "open_norms": True},
    "search": {"bops": "1%", "method": "dpf", "structure": "search"},
    "skip": {"bops": "1%", "skip": ["nothing"]},
    "all dense": {"bops": "1%", "method": "dpf", "structure": "0=dense,3=dense,6=dense,11=dense"},
    "gate weight": {"bops": "1%", "gate_weight": -1.0},
    "unknown": {"bobs": "1%"},
}


@pytest.mark.parametrize("name", SENSELESS)
def test_errors_of_compress_name_parameters(name: str) -> None:
    model = jpq.tasks.models.build("convnet", 10, 1)
    with pytest.raises(JpqError) as caught:
        jpq.compress(model, torch.rand(4, 1, 8, 8), **SENSELESS[name])
    said = str(caught.value)
    assert not FLAG.search(said), said
    assert not re.search(r"\btarget_\w+", said), f"compress has no such parameter: {said}"


WRONG_CONFIGS = [
    {"train": Train(lr=0.0)},
    {"train": Train(distill=-1.0)},
    {"train": Train(epochs=1)},
    {"train": Train(batch_size=1)},
    {"train": Train(float_epochs=0)},
    {"train": Train(tune_epochs=0)},
    {"train": Train(search=1.0)},
    {"task": Task(limit=3)},
    {"task": Task(held_out=0.0)},
    {"task": Task(weights=Path("nowhere.pth"))},
    {"task": Task(data="cifar10", data_root=Path("nowhere"))},
    {"task": Task(model="lenet")},
    {"budget": Budget(target_latency="3ms")},
    {"budget": Budget(target_bops="2%,1%,2%")},
    {"budget": Budget(target_bops="1%,2%")},
    {"budget": Budget(target_bops="2%,1%", target_size="30KB,20KB,10KB")},
    {"decide": Decide(mask=Path("."), structure="2:4")},
    {"run": Run(device="abacus")},
    {"run": Run(threads=-1)},
    {"run": Run(checkpoint_every=-1)},
    {"run": Run(formats="onnxx")},
]


@pytest.mark.parametrize("parts", WRONG_CONFIGS, ids=str)
def test_errors_of_optimize_name_parameters(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # torchvision makes the folder of a data set before it asks for it
    config = Config(budget=Budget(target_bops="1%"), run=Run(out=tmp_path))
    run = dataclasses.replace(parts.get("run", config.run), out=tmp_path)
    config = dataclasses.replace(config, **{**parts, "run": run})
    with pytest.raises(JpqError) as caught:
        jpq.optimize(config)
    assert not FLAG.search(str(caught.value)), caught.value


@pytest.mark.usefixtures("empty_folder")
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["optimize", "--target-bops", "0"], "--target-bops 0 "),
        (["optimize", "--target-bops", "1%", "--w-bits", "5", "3"], "--w-bits 5 3: "),
        (
            ["optimize", "--target-latency", "3ms"],
            "`jpq bench --table FILE.csv --model convnet`, then add --latency-table",
        ),
        (["optimize", "--target-bops", "1%", "--method", "dpf", "--structure", "0=2:4"], "--structure 0=2:4"),
        (["study", "--name", "s", "--max-bops", "0"], "--max-bops 0 "),
        (["prune-private", "--weights", "W", "--density", "0"], "--density 0.0 "),
    ],
)
def test_the_command_line_names_flags(args: list[str], words: str, capsys: Captured) -> None:
    assert words in refused(args, capsys)


def flags_of_errors() -> list[tuple[str, str]]:
    """(place, flag) of every flag in a text of the library, outside docstrings and command-line modules."""
    found = []
    for path in sorted((ROOT / "jpq").rglob("*.py")):
        if "cli" in path.relative_to(ROOT).parts:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                text = re.sub(r"`jpq [^`]*`?", "", node.value)
                found += [(path.name, flag) for flag in re.findall(r"(?<![\w/-])--[a-z][a-z-]*[a-z](?![\w-])", text)]
    return found


def test_commands_in_texts_stand_between_backticks() -> None:
    """Otherwise their flags would become parameters in Python."""
    for path in sorted((ROOT / "jpq").rglob("*.py")):
        if "cli" in path.relative_to(ROOT).parts:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docs]
        bare = [t for t in texts if isinstance(t, str) and re.search(r"(?<!`)jpq [a-z-]+ --", t)]
        assert bare == [], path.name


def test_flags_in_texts_are_settings() -> None:
    sections = [type(section) for section in vars(Config()).values()]
    from jpq.cli.bench import Bench
    from jpq.cli.parse_errors import ALIASES
    from jpq.cli.run_selection import RunSelection
    from jpq.cli.sensitivity import Sensitivity

    parts = (*sections, DataFreeSettings, Study, Bench, RunSelection, Sensitivity)
    known = {f"--{f.name.replace('_', '-')}" for part in parts for f in dataclasses.fields(part)}
    known |= {"--no-synthetic", "--run-code", "--config", *(f"--{name}" for name in ALIASES.values())}
    flags = flags_of_errors()
    assert len(flags) > 100, "the texts were not found"
    assert {(place, flag) for place, flag in flags if flag not in known} == set()
