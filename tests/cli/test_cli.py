"""The command line: help that is complete, errors of one sentence and exit code 2, and what the screen shows."""

import io
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from commands import refused
from made_runs import result
from rich.console import Console, RenderableType

from jpq import recipe
from jpq.cli.flags import COMMANDS, parse_optimize_flags
from jpq.cli.main import main
from jpq.cli.progress import ProgressDisplay
from jpq.cli.summary import layer_table, summary
from jpq.config import Config
from jpq.methods.table import METHODS
from jpq.results.formatting import format_duration
from jpq.training.history import EpochRecord
from jpq.types import JpqError

Captured = pytest.CaptureFixture[str]


pytestmark = pytest.mark.usefixtures("empty_folder")


def flags() -> list[str]:
    parts = (getattr(Config(), part.name) for part in fields(Config))
    return ["--" + field.name.replace("_", "-") for part in parts for field in fields(part)]


def shown(renderable: RenderableType, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_names_every_command(args: list[str], capsys: Captured) -> None:
    assert main(args) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert "jpq optimize --target-bops 1%" in out


@pytest.mark.parametrize("width", [80, 120])
def test_optimize_help_has_every_flag_and_fits(width: int, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["optimize", "--help"]) == 0
    out = capsys.readouterr().out
    named = re.findall(r"--[a-z-]+", out)
    assert [flag for flag in [*flags(), "--config"] if flag not in named] == []
    assert max(map(len, out.splitlines())) <= width
    assert not re.search(r"default: (None)?\)|\{None", out)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert COMMANDS[command] in out
    assert max(map(len, out.splitlines())) <= 80
    assert not re.search(r"│ {3,}\w+ +│\n│ {3,}[a-z]", out), "a line breaks where its source does"


def test_help_does_not_import_torch() -> None:
    lines = ["import sys, jpq.cli.main"]
    for args in (["--help"], *([command, "--help"] for command in sorted(COMMANDS))):
        lines += [f"jpq.cli.main.main({args})", f"assert 'torch' not in sys.modules, {args}"]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, stdout=subprocess.DEVNULL)


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert re.match(r"jpq \d+\.\d+\.\d+ \(torch \d", capsys.readouterr().out)


def test_methods_lists_the_table(capsys: Captured) -> None:
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in METHODS)


def test_flags_are_flat_and_typed() -> None:
    config = parse_optimize_flags(
        ["--target-bops", "1%", "--w-bits", "3", "5", "--lr", "0.1", "--no-augment", "--skip", "a", "b"]
    )
    assert (config.budget.target_bops, config.decide.w_bits, config.train.lr) == ("1%", (3, 5), 0.1)
    assert (config.train.augment, config.decide.skip) == (False, ("a", "b"))
    assert parse_optimize_flags([]) == Config()


@pytest.mark.parametrize("how", [["--config", "c.toml"], ["--config=c.toml"]])
def test_flags_override_the_config_file(how: list[str]) -> None:
    Path("c.toml").write_text('[budget]\ntarget_bops = "5%"\n[train]\nlr = 0.25\nepochs = 7\naugment = false\n')
    config = parse_optimize_flags([*how, "--lr", "0.5"])
    assert (config.budget.target_bops, config.train.lr, config.train.epochs) == ("5%", 0.5, 7)
    assert config.train.augment is False
    assert config.hash() == parse_optimize_flags(["--lr", "0.5", *how]).hash()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--target-bops", "1%", "--method", "djqp"], "Unknown method 'djqp'. Did you mean djpq"),
        (["--target-bops", "1%", "--width", "learnt"], "Unknown width 'learnt'. Did you mean learned"),
        (["--target-bops", "1%", "--structure", "elementwize"], "Did you mean elementwise"),
        (["--target-bops", "1%", "--structure", "2:4"], "exactly 2 of each row must stay"),
        (["--target-bops", "1%", "--structure", "serch"], "Did you mean search"),
        (["--target-bops", "1%", "--structure", "conv1=pattern"], "exactly 1 of each row must stay"),
        (["--target-bops", "1%", "--method", "dpf", "--structure", "conv9=pattern"], "Unknown layer 'conv9'"),
        (["--target-bops", "1%", "--proxy", "train"], "Unknown proxy 'train'. Did you mean trained"),
        (["--target-bops", "1%", "--method", "dpf", "--width", "fixed"], "Choose --method djpq"),
        (["--target-bops", "1%", "--model", "lenet"], "Did you mean lenet5"),
        (["--target-bops", "1%", "--model", "no.such.module:f"], "no.such.module"),
        (["--target-bops", "1%", "--data", "digit"], "Did you mean digits"),
        (["--target-bops", "1%", "--data", "folder:nowhere"], "nowhere"),
        (["--target-bops", "1%", "--weights", "nowhere.pth"], "nowhere.pth"),
        (["--target-bops", "0"], "--target-bops 0"),
        (["--target-bops", "0%"], "--target-bops 0%"),
        (["--target-bops", "101%"], "--target-bops 101%"),
        (["--target-bops", "a lot"], "--target-bops 'a lot'"),
        (["--target-bops", "0.000001%"], "smallest"),
        (["--target-bops", "1%", "--device", "abacus"], "--device abacus"),
        (["--target-bops", "1%", "--skip", "nothing"], "Unknown layer 'nothing'"),
        (["--target-bops", "1%", "--lr", "nan"], "--lr nan"),
        ([], "--target-bops 1%"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--config", "broken.toml"], "not valid TOML"),
        (["--config", "foreign.toml"], "Did you mean epochs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_exit_code_2(args: list[str], words: str, capsys: Captured) -> None:
    Path("broken.toml").write_text("[train\n")
    Path("foreign.toml").write_text("[train]\nepoch = 3\n")
    assert words in refused(["optimize", *args], capsys)


def test_an_unwritable_folder(capsys: Captured) -> None:
    Path("file").write_text("")
    assert "file" in refused(["optimize", "--target-bops", "1%", "--out", "file"], capsys)


def test_unknown_command_names_the_closest(capsys: Captured) -> None:
    assert "Did you mean optimize" in refused(["optimise"], capsys)
    assert "Choose from optimize" in refused(["xyz"], capsys)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["optimize", "--lrr", "1"], "Unknown flag --lrr. Did you mean --lr"),
        (["optimize", "--target", "1%"], "Unknown flag --target. Did you mean --target-column or --target-bops or"),
        (["optimize", "--xyzzy"], "Unknown flag --xyzzy. See jpq optimize --help."),
        (["optimize", "--no-lr"], "Unknown flag --no-lr."),
        (["optimize", "-x"], "Unknown flag -x."),
        (["optimize", "--lr", "fast"], "--lr fast: 'fast' is not a number."),
        (["optimize", "--lr=fast"], "--lr fast: 'fast' is not a number."),
        (["optimize", "--lr", "-1e-3", "--limit", "1.5"], "--limit 1.5: '1.5' is not a whole number."),
        (["optimize", "--w-bits", "2"], "--w-bits needs 2 values, each a whole number, not one."),
        (["optimize", "--w-bits", "2", "x"], "--w-bits 2 x: 'x' is not a whole number."),
        (["optimize", "--config"], "--config needs a path."),
        (["optimize", "--target-bops", "--epochs", "3"], "--target-bops needs a value."),
        (["optimize", "--augment=3"], "--augment takes no value: give --augment alone, or --no-augment."),
        (["optimize", "--no-augment", "3"], "'3' belongs to no flag."),
        (["optimize", "resnet20"], "'resnet20' belongs to no flag. See jpq optimize --help."),
        (["study", "--trials", "many"], "--trials many: 'many' is not a whole number."),
        (["bench", "runs", "--threads", "1", "two"], "--threads 1 two: 'two' is not a whole number."),
        (["pareto", "runs", "--kne"], "Unknown flag --kne. Did you mean --knee?"),
        (["evaluate"], "Name RUN_FOLDER|FILE.onnx. See jpq evaluate --help."),
        (["methods", "djpq"], "'djpq' belongs to no flag."),
    ],
)
def test_bad_flags_are_one_sentence(args: list[str], words: str, capsys: Captured) -> None:
    assert words in refused(args, capsys)


def test_evaluate_wants_the_folder_of_a_run(capsys: Captured) -> None:
    assert "There is no file or folder nowhere." in refused(["evaluate", "nowhere"], capsys)
    assert "not the folder of a run" in refused(["evaluate", "."], capsys)
    assert main(["evaluate"]) == 2


@pytest.mark.parametrize("command", ["evaluate", "bench"])
def test_flags_on_data_need_data(command: str, capsys: Captured) -> None:
    said = refused([command, "nowhere", "--target-column", "x"], capsys)
    assert "--target-column says how --data are read, and there are none. Leave it out." in said


def test_evaluate_says_that_pytorch_is_measured_anyway(tmp_path: Path, capsys: Captured) -> None:
    for name in ("config.toml", "model.onnx"):
        (tmp_path / name).touch()
    for runtimes in ("torch", "onnxruntime,PyTorch"):
        said = refused(["evaluate", str(tmp_path), "--runtime", runtimes], capsys)
        assert "the model of a folder is always measured in it. Leave the flag away, or name" in said
    said = refused(["evaluate", str(tmp_path / "model.onnx"), "--runtime", "torch"], capsys)
    assert "PyTorch does not run an exported file. Give the run's folder" in said


def test_inspect_shows_layers_sites_and_why_parts_stay(capsys: Captured) -> None:
    assert main(["inspect", "--model", "lenet5", "--input-shape", "1", "28", "28", "--classes", "10"]) == 0
    out = capsys.readouterr().out
    assert "reaches the model's output" in out
    assert re.search(r"total .* M", out)
    words = " ".join(out.replace("│", " ").split())
    assert re.search(r"\d+ units \(channels, heads or groups\) in \d+ sites; layers with \d+\.\d % of the MACs", words)


def test_interrupt_says_how_to_go_on(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "optimize", interrupted)
    assert main(["optimize", "--target-bops", "1%", "--resume"]) == 130
    assert "jpq optimize --target-bops 1% --resume" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(recipe, "optimize", broken)
    with pytest.raises(ZeroDivisionError):
        main(["optimize", "--target-bops", "1%"])


def test_python_m_jpq_into_a_closed_pipe_is_quiet() -> None:
    command = [sys.executable, "-m", "jpq", "optimize", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def row(phase: str, epoch: int) -> EpochRecord:
    nan = float("nan")
    return EpochRecord(
        phase, epoch, 4, 0.5, 0.9, 1e6, 0.02, 0.01 if phase == "search" else nan, 0.1, 4, 4, 0.5, 1e-3, 1.0
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_tells_what_happens(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal)
    with ProgressDisplay(console, {"search": 4, "fine-tune": 2}) as watch:
        watch.phase("search", 4, 10)
        assert watch.seconds_left() is None
        for _ in range(10):
            watch.step(0.5, 0.021, 0.01)
        left = watch.seconds_left()
        watch.epoch(row("search", 1))
        if watch.live:
            watch.live.refresh()
        watch.phase("verify", 0, 0)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    assert left is not None
    assert left >= 0
    assert "held-out 90.00 %" in text
    assert "BOPs 2.00 %" in text
    if not terminal:
        assert [line.split()[0] for line in text.splitlines()] == ["search", "verify"]
        assert "(aim 1.00 %)" in text


def test_time_left_covers_the_phases_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("jpq.cli.progress.time.monotonic", lambda: now[0])
    watch = ProgressDisplay(Console(file=io.StringIO()), {"search": 4, "fine-tune": 2})
    watch.phase("search", 4, 10)
    for _ in range(10):
        watch.step(0.5, 0.02, 0.01)
    now[0] = 5.0
    assert watch.seconds_left() == pytest.approx(0.5 * (30 + 20))
    watch.phase("fine-tune", 2, 10)
    watch.epoch(row("fine-tune", 1))
    watch.step(0.5, 0.02, 0.01)
    now[0] = 6.0
    assert watch.seconds_left() == pytest.approx(9.0)


@pytest.mark.parametrize("width", [80, 120])
def test_final_screen(tmp_path: Path, width: int) -> None:
    outside = {"images": 449, "argmax_differs": 1, "at_a_rounding_boundary": 2}
    made = result(tmp_path, 5, verified={"masked_vs_rebuilt_float64": 1e-12, "rebuilt_vs_onnxruntime": outside})
    table, panel = shown(layer_table(made), width), shown(summary(made), width)
    for line in (table + panel).splitlines():
        assert len(line) <= width
    assert re.search(r"layer1\.0\.conv1 +3/16 +16/16 +2 +3 +10.0 K", table)
    assert "total" in table
    for words in (
        "98.33 %",
        "97.78 %",
        "-0.55 points",
        "980 K",
        "0.98 % of fp32, 102x less",
        "12.3 KB",
        "met, 98.0 %",
        "448 of 449 test images",
        "a note",
        "model.onnx",
    ):
        assert words in " ".join(panel.replace("│", " ").split()), words


def test_durations() -> None:
    assert [format_duration(s) for s in (2.44, 42.3, 200, 7500)] == ["2.4 s", "42 s", "3 min 20 s", "2 h 05 min"]


def test_library_errors_are_jpq_errors() -> None:
    with pytest.raises(JpqError):
        recipe.optimize(Config())
