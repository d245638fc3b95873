"""`jpq pareto` and `jpq export`: what they say, draw and write, on made-up runs and on a few real ones."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import runs
from commands import refused
from made_runs import SPREAD, folder, spread
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

import jpq
from jpq.cli.main import main
from jpq.cli.pareto import front_table
from jpq.config import Config, Task
from jpq.results.front import plots
from jpq.results.front.front import build_front
from jpq.results.front.points import LayerDecision, read_points
from jpq.results.front.select import parse_limits, pick_point
from jpq.results.plots import save_picture
from jpq.tasks.data import load

Captured = pytest.CaptureFixture[str]
LIMIT = 200  # digits that the real runs see
pytestmark = pytest.mark.usefixtures("empty_folder")


def drawn(figure: Figure) -> Counter[str]:
    """How many things of each kind are in the plane; of points each is counted."""
    found: Counter[str] = Counter()
    for artist in figure.axes[0].get_children():
        if artist.get_gid():
            found[artist.get_gid()] += len(artist.get_offsets()) if hasattr(artist, "get_offsets") else 1
    return found


def test_the_plane_shows_every_run_and_what_it_is_compared_with(tmp_path: Path) -> None:
    spread(tmp_path)
    for bits in (2, 4):
        made = folder(tmp_path, 0.5, bits * bits / 1024, method="uniform")
        table = pd.read_csv(made / "layers.csv")
        table.assign(w_bits=bits, a_bits=[8] + [bits] * (len(table) - 1), macs_all=table.macs).to_csv(
            made / "layers.csv"
        )
    front = build_front(read_points(tmp_path).points)
    choice = pick_point(front, parse_limits({"max_bops": "1%"}, front.points[0].full_costs))
    figure = plots.draw_front(front, choice)
    once = {"dominated": 1, "knee": 1, "chosen": 1, "staircase": 1, "fp32": 1}
    assert drawn(figure) == {**once, "front": 4, "uniform": 2, "tick": 4, "float": 2}
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    ticks = sorted(line.get_xdata()[0] for line in axes.lines if line.get_gid() == "tick")
    assert ticks == pytest.approx([100 * b * b / 1024 for b in (2, 3, 4, 8)])
    (chosen,) = (c for c in axes.collections if c.get_gid() == "chosen")
    assert chosen.get_offsets().tolist() == [[pytest.approx(1.0), pytest.approx(96.0)]]
    words = [text.get_text() for text in axes.texts]
    assert {"W2A2", "W8A8", "1 djpq", "4 djpq"} <= {*words}


def test_the_legend_hides_no_point(tmp_path: Path) -> None:
    spread(tmp_path)
    front = build_front(read_points(tmp_path).points)
    figure = plots.draw_front(front, pick_point(front, parse_limits({"max_bops": "1%"}, front.points[0].full_costs)))
    save_picture(figure, tmp_path / "front.png")  # lays it out
    (legend,) = figure.legends
    box, axes = legend.get_window_extent(), figure.axes[0]
    assert {text.get_text() for text in legend.get_texts()} >= {"float model", "front", "dominated", "knee"}
    assert not box.overlaps(axes.get_window_extent())
    assert figure.bbox.y0 <= box.y0, "it lies outside the picture"
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert axes.get_legend() is None


def test_uniform_bits_that_cost_the_same_share_a_line(tmp_path: Path) -> None:
    points = spread(tmp_path).points
    timed = [
        replace(
            p,
            costs={**p.costs, "latency": 2e6 + i},
            full_costs={**p.full_costs, "latency": 4e6},
            uniform={"W2A2": {"latency": 3e6}, "W3A3": {"latency": 3e6}, "W8A8": {"latency": 5e6}},
        )
        for i, p in enumerate(points)
    ]
    figure = plots.draw_front(build_front(timed, ["latency"]))
    assert drawn(figure)["tick"] == 2
    assert {"W2A2 to W3A3", "W8A8"} <= {text.get_text() for text in figure.axes[0].texts}


def test_two_costs_have_no_staircase(tmp_path: Path) -> None:
    front = build_front(spread(tmp_path).points, ["size", "bops"])
    figure = plots.draw_front(front)
    assert "staircase" not in drawn(figure)
    assert figure.axes[0].get_xlabel() == "size, % of the fp32 model"


def test_the_heat_map_has_a_cell_for_every_layer_and_point(tmp_path: Path) -> None:
    front = spread(tmp_path)
    figure = plots.draw_decisions(front)
    assert figure is not None
    assert [axes.images[0].get_gid() for axes in figure.axes] == ["w_bits", "a_bits", "density"]
    for axes, what in zip(figure.axes, ("w_bits", "a_bits", "density"), strict=True):
        cells = np.array([[getattr(layer, what) for layer in p.layers] for p in front.front_points]).T
        assert np.allclose(axes.images[0].get_array(), cells)
        assert len(axes.texts) == cells.size


def test_long_fronts_are_thinned_and_runs_without_layers_have_no_heat_map(tmp_path: Path) -> None:
    point = spread(tmp_path).points[0]
    layers = tuple(LayerDecision(f"layer{i}.conv", 2 + i % 7, 8, 0.5) for i in range(60))
    layers = (*layers[:-1], replace(layers[-1], name="odd $\\frac{$"))
    many = [
        replace(point, accuracy=0.5 + i / 100, costs={**point.costs, "bops": 1e5 * 1.1**i}, layers=layers)
        for i in range(40)
    ]
    figure = plots.draw_decisions(build_front(many))
    assert figure is not None
    rows, columns = figure.axes[0].images[0].get_array().shape
    assert (rows, columns) == (60, plots.COLUMNS)
    assert not figure.axes[0].texts
    assert figure.get_size_inches()[0] < 30
    save_picture(figure, tmp_path / "wide.png")
    assert imread(tmp_path / "wide.png").std() > 0
    assert plots.draw_decisions(build_front([replace(point, layers=())])) is None
    written = plots.write_front_files(build_front([replace(point, layers=())]), tmp_path)
    assert [path.name for path in written] == ["pareto.csv", "pareto.png"]


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_the_table_fits(width: int, tmp_path: Path) -> None:
    front = spread(tmp_path)
    console = Console(file=io.StringIO(), width=width)
    console.print(front_table(front, None, True))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "..." not in text
    assert ("djpq" in text) == (width >= 80)  # left out where there is no room
    shown = [row for row in text.splitlines() if re.search(r"[0-9a-f]{12} ", row)]
    assert len(shown) == len(SPREAD)
    assert all(re.search(r"[0-9a-f]{12} ", row) for row in shown)
    assert "float model" in text


def test_pareto_tells_draws_and_writes(tmp_path: Path, capsys: Captured) -> None:
    spread(tmp_path / "study")
    (tmp_path / "study" / "begun").mkdir()
    (tmp_path / "study" / "begun" / "config.toml").write_text("")
    assert main(["pareto", "study", "--min-accuracy", "95.5%"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "skipped study/begun: the run has not ended",
        "5 runs, 4 on the front",
        "1 dominated",
        "Hypervolume",
        "Knee: 2,",
        "Chosen:",
        "96.00 % held-out",
        "--min-accuracy 95.5%: 3 of 5 runs.",
        "least BOPs of these 3",
        "The next cheaper one",
        "98.00 %",
        "study: pareto.csv, pareto.png, layers.png",
    ):
        assert words in out, words
    assert "95.50 %" not in out  # the dominated one
    assert main(["pareto", "study", "--all", "--out", "elsewhere"]) == 0
    out = capsys.readouterr().out
    assert "95.50 %" in out
    assert "Chosen" not in out
    for place in ("study", "elsewhere"):
        assert len(pd.read_csv(tmp_path / place / "pareto.csv")) == 5
        for name in ("pareto.png", "layers.png"):
            pixels = imread(tmp_path / place / name)
            assert min(pixels.shape[:2]) > 200
            assert len(np.unique(pixels.reshape(-1, pixels.shape[2])[::7], axis=0)) > 20


def test_several_sources_are_merged_into_the_current_folder(tmp_path: Path, capsys: Captured) -> None:
    one, two = folder(tmp_path / "a", 0.9, 0.01), folder(tmp_path / "b", 0.8, 0.005)
    assert main(["pareto", str(one), str(two), "b"]) == 0
    assert "2 runs, 2 on the front" in capsys.readouterr().out
    assert len(pd.read_csv("pareto.csv")) == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["pareto"], "Name the runs"),
        (["pareto", "nowhere"], "nowhere is not there"),
        (["pareto", "runs", "--costs", "bobs"], "Did you mean bops"),
        (["pareto", "runs", "--min-accuracy", "99%"], "No run meets --min-accuracy 99%: the most accurate is"),
        (["pareto", "runs", "--max-size", "lots"], "--max-size 'lots' is not an amount"),
        (["pareto", "runs", "--max-bops", "0.2%", "--knee"], "no knee"),
        (["pareto", "runs", "--out", "file"], "file"),
        (["pareto", "runs", "other"], "has model convnet, "),
        (["export", "runs"], "5 runs were found. Say which"),
        (["export", "runs", "--max-bops", "100k"], "plan.json"),
        (["export", "empty"], "No finished run was found in empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(args: list[str], words: str, tmp_path: Path, capsys: Captured) -> None:
    spread(tmp_path / "runs")
    folder(tmp_path / "other", 0.9, 0.01, model="resnet20")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert words in refused(args, capsys)
    assert not (tmp_path / "runs" / "pareto.csv").exists() or "--out" in args


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trials and a final run on the digits, all from one float model."""
    place = tmp_path_factory.mktemp("trained")
    asked = runs.shortened(runs.config(place / "runs"), LIMIT, epochs=4, float_epochs=3)
    jpq.optimize(asked, final=False)
    (weights,) = place.glob("runs/*/float.safetensors")
    task = Task(limit=LIMIT, weights=Path(shutil.copyfile(weights, place / "float.safetensors")))
    jpq.optimize(replace(runs.config(place / "runs", target_bops="0.5%"), task=task), final=False)
    jpq.optimize(replace(runs.config(place / "runs", method="uniform", target_bops="1.6%"), task=task))
    return place


def test_real_runs_say_what_uniform_bits_cost(trained: Path) -> None:
    found = read_points(trained / "runs").points
    assert len(found) == 3
    assert {json.dumps(p.uniform) for p in found} == {json.dumps(found[0].uniform)}
    first = found[0].uniform
    (even,) = (p for p in found if p.decisions["method"] == "uniform")
    assert even.costs["bops"] == first["W4A4"]["bops"]  # image at 8 bits in both
    assert even.costs["size"] == first["W4A4"]["size"]
    assert all(layer.density == 1 for layer in even.layers)
    assert {p.chance for p in found} == {0.1}
    (csv,) = (pd.read_csv(p.folder / "layers.csv") for p in found if "0.5%" in p.decisions["target"] and p.folder)
    assert (csv.macs_all == pd.read_csv(even.folder / "layers.csv").macs).all()  # type: ignore[operator]


def by_target(place: Path, target: str) -> Path:
    (found,) = (p.folder for p in read_points(place).points if target in p.decisions["target"])
    assert found is not None
    return found


def split_of(config: Config) -> jpq.tasks.data.Data:
    return load("digits", limit=LIMIT, seed=config.run.seed)


def test_export_makes_the_picked_trial_final(trained: Path, tmp_path: Path, capsys: Captured) -> None:
    shutil.copytree(trained / "runs", "runs")
    least = by_target(Path("runs"), "0.5%")
    before = json.loads((least / "result.json").read_text())
    assert main(["export", "runs", "--max-bops", "0.6%"]) == 0
    out = capsys.readouterr().out
    assert "--max-bops 0.6%: 1 of 3 runs." in out
    assert "images" in out
    now = json.loads((least / "result.json").read_text())
    small, _ = jpq.load(least)
    data = split_of(Config())
    right = data.task.evaluate(small, data.test)
    assert (before["final"], now["final"]) == (False, True)
    assert now["compressed"] == {**before["compressed"], "accuracy": pytest.approx(right)}
    dense = jpq.tasks.models.build("convnet", 10, 1)
    jpq.tasks.models.load_weights(dense, trained / "float.safetensors")
    assert now["float"]["accuracy"] == pytest.approx(data.task.evaluate(dense.eval(), data.test))
    for key in ("held_out", "targets", "seed", "command", "uniform", "data"):
        assert now[key] == before[key]
    assert now["packed"]["total"] == (least / "model.packed").stat().st_size
    assert now["verified"]["rebuilt_vs_onnxruntime"]["images"] == data.test.size
    assert {p.name for p in least.iterdir()} >= {
        "model.onnx",
        "model.packed",
        "curves.png",
        "layers.png",
        "history.csv",
    }
    assert main(["export", str(least)]) == 0
    assert "is final already" in capsys.readouterr().out
    assert main(["pareto", "runs"]) == 0


def test_export_equals_a_run_that_was_final_from_the_start(trained: Path, capsys: Captured) -> None:
    whole = by_target(trained / "runs", "1.6%")
    assert main(["export", str(whole), "--out", "again"]) == 0
    assert "exported once more" in capsys.readouterr().out
    for name in ("plan.json", "layers.csv", "history.csv", "model.safetensors"):
        assert (Path("again") / name).read_bytes() == (whole / name).read_bytes(), name
    one, two = (json.loads((place / "result.json").read_text()) for place in (whole, Path("again")))
    assert one == two
    assert len(read_points([whole, "again"]).points) == 1


def test_a_trial_is_left_as_it_was_where_the_final_run_goes_elsewhere(trained: Path, capsys: Captured) -> None:
    least = by_target(trained / "runs", "0.5%")
    before = {p.name: p.read_bytes() for p in least.iterdir()}
    assert main(["export", str(least), "--out", "final"]) == 0
    assert {p.name: p.read_bytes() for p in least.iterdir()} == before
    assert json.loads(Path("final/result.json").read_text())["final"] is True
    assert main(["evaluate", "final"]) == 0
    accuracy = json.loads(Path("final/result.json").read_text())["compressed"]["accuracy"]
    assert f"{100 * accuracy:.2f} %" in capsys.readouterr().out
    assert "holds a run already" in refused(["export", str(least), "--out", "final"], capsys)


def test_without_the_float_weights_only_their_accuracy_is_missing(trained: Path, capsys: Captured) -> None:
    made = Path(shutil.copytree(by_target(trained / "runs", "0.5%"), "moved"))
    text = (made / "config.toml").read_text()
    (made / "config.toml").write_text(re.sub(r'(?m)^weights = ".*"', 'weights = "gone.safetensors"', text))
    assert main(["export", "moved"]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "weights are no longer at gone.safetensors" in out
    tree = json.loads((made / "result.json").read_text())
    assert tree["float"]["accuracy"] is None
    assert tree["compressed"]["accuracy"] > 0.2


@pytest.mark.parametrize("how", ["another model", "no model", "other weights"])
def test_export_refuses_a_folder_whose_files_do_not_belong_together(how: str, trained: Path, capsys: Captured) -> None:
    made = Path(shutil.copytree(by_target(trained / "runs", "0.5%"), "mixed"))
    other = by_target(trained / "runs", "1.6%")
    if how == "no model":
        (made / "model.safetensors").unlink()
    elif how == "another model":
        for name in ("plan.json", "model.safetensors"):
            shutil.copyfile(other / name, made / name)
    else:
        tree = json.loads((made / "result.json").read_text())
        tree["held_out"]["compressed"] = 0.1
        (made / "result.json").write_text(json.dumps(tree))
    words = {"another model": "not of the same run", "no model": "Cannot read", "other weights": "not those of the run"}
    assert words[how] in refused(["export", "mixed"], capsys)
    assert not (made / "model.onnx").exists()


def test_the_split_is_read_by_export_alone(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def closed(*_: object, **__: object) -> None:
        raise AssertionError("data were read")

    monkeypatch.setattr("jpq.results.finalize.read_data", closed)
    monkeypatch.setattr("jpq.tasks.load.read_data", closed)
    assert main(["pareto", str(trained / "runs"), "--out", "."]) == 0
    with pytest.raises(AssertionError, match="data were read"):
        main(["export", str(by_target(trained / "runs", "0.5%")), "--out", "final"])
