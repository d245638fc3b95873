"""A Result becomes files that other programs can read, and pictures that show something."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_runs import history, result
from matplotlib.image import imread
from thinned import thinned

from jpq.config import Config
from jpq.results import plots, run_folder
from jpq.results.formatting import format_number, format_percent
from jpq.training.history import write_history
from jpq.types import JpqError


def test_result_json_holds_what_it_promises(tmp_path: Path) -> None:
    odd = {"worst": math.nan, "most": np.float32(0.5), "far": math.inf, "same": np.bool_(True), "at": (1, Path("x"))}
    run_folder.write_run(result(tmp_path, verified=odd), Config())
    tree = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert set(tree) == {
        "float",
        "compressed",
        "held_out",
        "targets",
        "verified",
        "seconds",
        "command",
        "versions",
        "seed",
        "method",
        "data",
        "notes",
        "metrics",
        "packed",
        "export",
        "latency",
        "schemes",
        "uniform",
        "final",
        "machine",
        "intervals",
        "float_work",
        "pruning",
        "contest",
    }
    assert tree["compressed"] == {
        "accuracy": 0.9778,
        "bops": 980_000,
        "macs": 40_120,
        "size_bytes": 12_345,
        "bops_share": 0.0098,
        "bops_structured": 0,
        "latency_ms": None,
    }
    assert tree["targets"]["bops"]["asked"] == "1%"
    assert tree["verified"] == {"worst": None, "most": 0.5, "far": None, "same": True, "at": [1, "x"]}
    assert tree["notes"] == ["a note"]


def test_results_come_back_from_their_files(tmp_path: Path) -> None:
    made = result(tmp_path)
    made = replace(made, history=tuple(replace(row, budget="1%") for row in made.history[1:]))
    run_folder.write_run(made, Config())
    assert run_folder.read_run(tmp_path) == made
    run_folder.write_run(replace(result(tmp_path), final=False), Config())
    again = run_folder.read_run(tmp_path)
    assert not again.final
    assert again.history[0].phase == "float"
    assert math.isnan(again.history[0].bops_share)
    assert again.history[1:] == result(tmp_path).history[1:]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("result.json", "{"),
        ("result.json", "[]"),
        ("history.csv", "a,b\n1,2\n"),
        ("layers.csv", ""),
        ("layers.csv", None),
    ],
)
def test_results_that_cannot_be_read(name: str, text: str | None, tmp_path: Path) -> None:
    run_folder.write_run(result(tmp_path, final=False), Config())
    (tmp_path / name).unlink() if text is None else (tmp_path / name).write_text(text)
    with pytest.raises(JpqError, match="does not hold the result of a run"):
        run_folder.read_run(tmp_path)


def test_history_is_replaced_whole(tmp_path: Path) -> None:
    rows = history()
    write_history(rows[:3], tmp_path)
    write_history(rows[:4], tmp_path)
    assert len(pd.read_csv(tmp_path / "history.csv")) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]


@pytest.mark.parametrize("n", thinned([0, 1, 60], lambda _, n: n != 1))
def test_pictures_show_something_at_any_depth(tmp_path: Path, n: int) -> None:
    run_folder.write_run(result(tmp_path, n), Config())
    for name in ("curves.png", "layers.png"):
        pixels = imread(tmp_path / name)
        assert min(pixels.shape[:2]) > 200
        assert len(np.unique(pixels.reshape(-1, pixels.shape[2])[::7], axis=0)) > 20
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_pictures_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    few, many = (plots.draw_layers(result(tmp_path, n), Config()).get_size_inches()[1] for n in (4, 60))
    assert many > 2 * few


def test_curves_put_both_phases_on_one_axis_with_budget_and_float_model(tmp_path: Path) -> None:
    made = result(tmp_path)
    figure = plots.draw_curves(made, Config())
    assert f": {made.task.metric_name} " in figure.get_suptitle()
    cost, decisions, quality, kept = figure.axes
    now = next(line for line in cost.lines if line.get_label() == "BOPs now")
    assert list(now.get_xdata()) == list(range(1, 15))
    assert {line.get_label() for line in cost.lines} >= {"budget 1.00 %", "aim of the controller"}
    assert {line.get_label() for line in quality.lines} >= {"held-out", "float model 98.50 %"}
    lines = {line.get_label(): list(line.get_ydata()) for line in (*decisions.lines, *kept.lines)}
    rows = [row for row in made.history if row.phase != "float"]
    assert lines["bits of weights"] == [row.w_bits for row in rows]
    assert lines["bits of activations"] == [row.a_bits for row in rows]
    assert lines["channels kept"] == [100 * row.kept for row in rows]
    assert cost.get_yscale() == "log"
    assert [text.get_text() for text in cost.texts] == ["search", "fine-tune"]


def test_a_run_that_only_fine_tunes_still_has_curves(tmp_path: Path) -> None:
    made = result(tmp_path)
    rows = tuple(replace(row, bops_share=math.nan, aim_share=math.nan) for row in made.history[-6:])
    run_folder.write_run(replace(made, history=rows, targets={}), Config())
    assert imread(tmp_path / "curves.png").std() > 0


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (12_300_000, "", "12.3 M"),
        (1.24e9, "", "1.24 G"),
        (50_100, "B", "50.1 KB"),
        (999, "B", "999 B"),
        (0, "", "0"),
        (999_600, "", "1.00 M"),
        (99_960, "", "100 K"),
        (math.nan, "", "-"),
    ],
)
def test_human_units(number: float, unit: str, text: str) -> None:
    assert format_number(number, unit) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.0098, "0.98 %"), (1.0, "100.00 %"), (0.000042, "0.0042 %"), (0, "0.00 %")]
)
def test_percent(share: float, text: str) -> None:
    assert format_percent(share) == text
