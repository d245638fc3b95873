"""Tables at the width of a screen: every line fits, no figure is cut, names keep what tells them apart."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import result
from rich.console import Console, RenderableType

from jpq.cli.bench import _timing_table
from jpq.cli.main import main
from jpq.cli.output import Column, name_column, table, text_column
from jpq.cli.summary import MAX_ROWS, layer_table, summary
from jpq.export.timing.compare import Timing
from jpq.results.formatting import format_number, shorten_middle, shorten_names
from jpq.results.record import LayerRecord


def render(thing: RenderableType, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def deep(n: int = 48) -> tuple[LayerRecord, ...]:
    """Layers with long names and wide numbers, each with a cost of its own."""
    share = 1 / n
    return tuple(
        LayerRecord(
            f"model.backbone.stages.{i // 12}.blocks.{i % 12}.attention.projection_{i % 2}",
            "linear",
            *(1024, 2048, 1024, 4096),
            *(4, 8),
            12_345_678 * (1 + i * 7 % n),
            987_654_321 * (1 + i * 7 % n),
            share,
            0.1234,
        )
        for i in range(n)
    )


@pytest.mark.parametrize("width", [60, 80, 100, 140])
@pytest.mark.parametrize("all_rows", [False, True])
def test_layer_tables_fit_and_cut_no_figure(width: int, all_rows: bool, tmp_path: Path) -> None:
    layers = deep()
    text = render(layer_table(replace(result(tmp_path, 3), layers=layers), all_rows), width)
    assert max(map(len, text.splitlines())) <= width
    dearest = sorted(layers, key=lambda row: row.bops)[-MAX_ROWS:]
    for row in layers if all_rows else dearest:
        assert re.search(rf"(?<!\S){re.escape(format_number(row.bops))}(?!\S)", text), row.bops
    assert ("28 more layers with 58.33 % of the BOPs: --all" in " ".join(text.split())) == (not all_rows)
    if width >= 80:
        assert "..." not in text
        assert "12.34 %" in text


def test_the_dearest_layers_stand_in_the_order_of_the_model(tmp_path: Path) -> None:
    layers = tuple(replace(row, name=f"layer{i:02}") for i, row in enumerate(deep()))
    text = render(layer_table(replace(result(tmp_path, 3), layers=layers)), 80)
    shown = re.findall(r"layer\d\d", text)
    dearest = sorted(layers, key=lambda row: row.bops)[-MAX_ROWS:]
    assert shown == sorted(row.name for row in dearest)
    assert "more" not in render(layer_table(replace(result(tmp_path, 3), layers=layers[:MAX_ROWS])), 80)


@pytest.mark.parametrize("width", [80, 120])
def test_summaries_fit(width: int, tmp_path: Path) -> None:
    text = render(summary(replace(result(tmp_path, 3), layers=deep())), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


NAMES = [f"features.denseblock{i}.denselayer{j}.conv{k}" for i in range(1, 5) for j in range(1, 24) for k in (1, 2)]


@pytest.mark.parametrize("length", [14, 20, 26, 32, 40])
def test_short_names_stay_apart(length: int) -> None:
    short = shorten_names(NAMES, length)
    assert len(set(short)) == len(NAMES)
    assert all(len(text) <= length or text == name for text, name in zip(short, NAMES, strict=True))
    assert shorten_names(["conv1", "a.b.conv2"], length) == ["conv1", "a.b.conv2"]


@pytest.mark.parametrize(
    ("name", "length", "text"),
    [
        ("layer1.0.conv2", 14, "layer1.0.conv2"),
        ("layer1.0.downsample.conv2", 14, "layer1…conv2"),
        ("features.denseblock3.denselayer24.conv2", 28, "features…denselayer24.conv2"),
        ("a" * 30 + "b" * 30, 11, "aaaaa…bbbbb"),
    ],
)
def test_names_lose_their_middle(name: str, length: int, text: str) -> None:
    assert shorten_middle(name, length) == text


def test_columns_are_left_out_by_priority() -> None:
    columns = (
        name_column("layer"),
        Column("first", optional=1),
        Column("last", optional=2),
        "kept",
        text_column("about"),
    )
    made = table(columns, [("a.very.long.name.of.a.layer", "111 K", "222 K", "333 K", "words that fold where needed")])
    seen = {width: render(made, width) for width in (36, 52, 60, 120)}
    assert all(max(map(len, text.splitlines())) <= width for width, text in seen.items())
    assert ["222 K" in seen[width] for width in (36, 52, 60, 120)] == [False, False, True, True]
    assert ["111 K" in seen[width] for width in (36, 52, 60, 120)] == [False, True, True, True]
    assert all("333 K" in text for text in seen.values())
    assert "a.very.long.name.of.a.layer" in seen[120]


@pytest.mark.parametrize("width", ["60", "80", "100"])
@pytest.mark.parametrize(
    "command", [["inspect", "--model", "resnet20"], ["inspect", "--model", "resnet20", "--all"], ["methods"], []]
)
def test_screens_fit(
    command: list[str], width: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    assert main(command) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= int(width)
    assert not re.search(r"\d(…|\.\.\.)", out), "a figure is cut"


def test_inspection_of_a_deep_model_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect", "--model", "torchvision:mobilenet_v2", "--all"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    layers = out[: out.index("can go together")]
    assert len(re.findall(r" \d\S* [KMG]  +\d+\.\d % *$", layers, re.M)) == 53, "whole figures for each layer"


def test_times_with_a_long_metric_fit_the_screen() -> None:
    timing = Timing("fp32, pruned", "onnxruntime", 1, 1, 0.00911, 0.0181, 0.009, 1.22, 3, 3, 5110, 5)
    shown = render(_timing_table([timing], "angle error", {("fp32, pruned", "onnxruntime"): "3.735 deg"}), 70)
    assert all(cell in shown for cell in ("0.00911 ms", "1.22x", "3.735 deg", "3 of 3", "5.11 KB"))
    assert "p95" not in shown


def test_a_model_at_32_bits_is_not_said_to_have_integers(tmp_path: Path) -> None:
    part = {"name": "2", "part": "layer", "macs": 9, "share": 1.0, "reason": "a layer that --keep-float keeps"}
    work = {"macs": 9, "share": 1.0, "bops_share": 1.0, "parts": [part]}
    export = {"opset": 17, "weights": "int8", "integer_layers": 0, "float_layers": {"2": "-"}, "forms": {}}
    run = replace(result(tmp_path), float_work=work, export=export)
    shown = " ".join(render(summary(run), 200).split())
    assert "all of it: nothing is quantized" in shown
    assert "weights in float32; onnxruntime computes 0 of 1 layers in integers" in shown
    assert "--output-bits" not in shown
    some = replace(run, float_work={**work, "share": 0.5, "bops_share": 0.9})
    shown = " ".join(render(summary(some), 200).split())
    assert "1 layer, 50.0 % of the MACs: 2" in shown
    assert "weights in int8" in shown
    assert "--output-bits" not in shown, "the one layer in floating point is so by choice"
    other = replace(some, export={**export, "float_layers": {"2": "-", "3": "-"}})
    assert "--output-bits 8 is for those before sums" in " ".join(render(summary(other), 200).split())
