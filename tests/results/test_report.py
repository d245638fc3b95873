"""A Result becomes files that other programs can read, and pictures that show something."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from jpq.config import Config
from jpq.results import plots, run_folder
from jpq.results.formatting import format_number, format_percent
from jpq.results.record import LayerRecord, ModelMetrics, Result
from jpq.training.history import EpochRecord, write_history
from jpq.types import JpqError


def history(search: int = 8, tune: int = 6) -> tuple[EpochRecord, ...]:
    rows = [
        EpochRecord("float", 1, 1, 0.4, 0.95, math.nan, math.nan, math.nan, 0.0, math.nan, math.nan, 1.0, 1e-3, 2.0)
    ]
    for i in range(search):
        share, aim = 0.0625 * 0.15 ** (i / search), 0.0625 * 0.155 ** (i / search)
        wave = share * (1 + 0.05 * math.sin(i))
        rows.append(
            EpochRecord(
                "search",
                i + 1,
                search,
                1.2 / (i + 1),
                0.9 + 0.05 * i / search,
                wave * 1e8,
                wave,
                aim,
                0.1 * i,
                8 - 4 * i / search,
                8 - 3 * i / search,
                0.9,
                2e-3,
                3.0 + i,
            )
        )
    for i in range(tune):
        rows.append(
            EpochRecord(
                "fine-tune",
                i + 1,
                tune,
                0.2 / (i + 1),
                0.96 + 0.02 * i / tune,
                0.98e6,
                0.0098,
                0.01,
                0.0,
                3.5,
                4.2,
                0.45,
                1e-3,
                12.0 + i,
            )
        )
    return tuple(rows)


def result(folder: Path, n: int = 4, **changes: object) -> Result:
    spent = np.random.default_rng(0).uniform(0.5, 2.0, n)
    spent = spent / max(spent.sum(), 1)
    layers = tuple(
        LayerRecord(
            f"layer{i // 6 + 1}.{i % 6 // 2}.conv{i % 2 + 1}",
            "conv2d",
            3 + i,
            16,
            16 - i % 13,
            16,
            2 + i % 5,
            3 + i % 4,
            10_000 * (i + 1),
            int(980_000 * spent[i]),
            float(spent[i]),
        )
        for i in range(n)
    )
    values = {
        "folder": folder,
        "method": "djpq",
        "float": ModelMetrics(0.9833, 100_000_000, 97_656, 150_400, 1.0),
        "compressed": ModelMetrics(0.9778, 980_000, 40_120, 12_345, 0.0098),
        "held_out": {"float": 0.985, "compressed": 0.979},
        "targets": {"bops": {"asked": "1%", "limit": 1_000_000, "reached": 980_000, "used": 0.98}},
        "verified": {"rebuilt": {"difference": 0.0}},
        "layers": layers,
        "history": history(),
        "seconds": {"search": 9.0, "total": 20.0},
        "command": "jpq optimize --target-bops 1%",
        "versions": {"torch": "2.9"},
        "seed": 3,
        "notes": ("a note",),
        "data": {"name": "digits"},
    }
    return Result(**{**values, **changes})  # type: ignore[arg-type]


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


@pytest.mark.parametrize("n", [0, 1, 60])
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
    cost, quality = plots.draw_curves(result(tmp_path), Config()).axes
    now = next(line for line in cost.lines if line.get_label() == "BOPs now")
    assert list(now.get_xdata()) == list(range(1, 15))
    assert {line.get_label() for line in cost.lines} >= {"budget 1.00 %", "aim of the controller"}
    assert {line.get_label() for line in quality.lines} >= {"held-out", "float model 98.50 %"}
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
