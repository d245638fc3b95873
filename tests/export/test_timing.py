"""Measuring: what is measured, the files that come of it, and exported models that run integer kernels."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from commands import refused
from runs import QUICK, Stop, shortened
from torch import nn

import jpq
from jpq.cli.main import main
from jpq.cli.summary import export_lines
from jpq.config import Budget, Config, Decide, Run, Task, Train
from jpq.costs import latency_table
from jpq.costs.latency_table import Shape
from jpq.export.onnx.export import export_float
from jpq.export.timing import layer_table
from jpq.export.timing.compare import FULL, INT8, PRUNED, model_files, reference_models
from jpq.export.timing.kernels import count_kernels, find_float_layers
from jpq.export.timing.layer_model import layer_model
from jpq.export.timing.runner import Runner, describe_hardware, take_turns
from jpq.recipe import optimize
from jpq.results.predicted_latency import predicted_ms
from jpq.tasks.models import build
from jpq.tracing.network import latency_shape, with_layer_times
from jpq.tracing.trace import trace
from jpq.types import JpqError

EXAMPLE = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def convnet():
    """A traced convnet."""
    return trace(build("convnet", 10, 1), EXAMPLE)


@pytest.fixture(scope="module")
def entries(convnet):
    """Its measured layers."""
    return layer_table.measure_layers(convnet, "convnet", repeats=5)


def test_every_distinct_layer_is_measured_in_float_and_as_int8(convnet, entries):
    bits = {(e.shape, e.bits) for e in entries}
    assert bits == {(latency_shape(x), b) for x in convnet.layers for b in (8, 32)}
    assert all(0 < e.ms < 100 for e in entries)
    first = {e.inputs for e in entries if e.shape == latency_shape(convnet.layers[0])}
    last = {e.outputs for e in entries if e.shape == latency_shape(convnet.layers[-1])}
    assert (first, last) == ({1}, {10})  # no channel of the image or of the classes can go
    inner = {(e.inputs, e.outputs) for e in entries if e.shape == latency_shape(convnet.layers[1])}
    assert inner == {(i, o) for i in (1, 9, 17, 25, 32) for o in (1, 17, 33, 49, 64)}
    with_layer_times(convnet, latency_table.LatencyTable("t", tuple(entries)))  # every layer finds its lines


@pytest.mark.parametrize(
    ("form", "integer"),
    [(None, False), ("float>int8", True), ("int8>int8", True), ("int8>float", False), ("float>float", False)],
)
def test_integers_on_both_sides_make_an_integer_kernel(form, integer):
    conv = Shape("conv", 1, (3, 3), (1, 1), (8, 8))
    assert count_kernels(layer_model(conv, 16, 32, 2, form))["QLinearConv"] == (2 if integer else 0)
    linear = Shape("linear", 1, (), (), ())
    assert count_kernels(layer_model(linear, 16, 32, 2, form))["QGemm"] == (2 if integer else 0)


@pytest.mark.parametrize(
    ("key", "inputs", "outputs"),
    [
        (Shape("conv", 1, (3, 3), (2, 2), (7, 7)), 5, 9),
        (Shape("conv", 4, (1, 1), (1, 1), (4, 4)), 8, 12),
        (Shape("conv", 1, (5,), (2,), (9,)), 3, 4),
        (Shape("conv", 1, (3, 3, 3), (1, 2, 2), (4, 4, 4)), 3, 4),
        (Shape("conv", 1, (2, 2), (2, 2), (4, 4)), 3, 4),
        (Shape("depthwise", 1, (3, 3), (1, 1), (6, 6)), 7, 7),
        (Shape("conv_transpose", 1, (2, 2), (2, 2), (5, 5)), 6, 4),
        (Shape("linear", 1, (), (), (12,)), 6, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", [None, "float>int8", "int8>float"])
def test_the_layer_alone_does_the_work_of_the_layer(key, inputs, outputs, form):
    model = layer_model(key, inputs, outputs, 2, form)
    session = Runner(model)
    out = session._session.run(
        None, {"x": np.zeros(session.samples["x"].shape, np.uint8 if form and form[0] == "i" else np.float32)}
    )
    places = (
        key.size if key.kind != "conv_transpose" else tuple(n * s for n, s in zip(key.size, key.stride, strict=True))
    )
    assert len(out) == 2
    assert out[0].shape == ((12, outputs) if key.kind == "linear" else (1, outputs, *places))


def test_layers_of_a_depthwise_network_are_known_by_their_own_names():
    network = trace(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 3, 2)), torch.randn(2, 3, 9, 9)
    )
    assert [str(latency_shape(x)) for x in network.layers] == [
        "conv 1x1 stride 1x1 at 9x9",
        "depthwise 3x3 stride 1x1 at 7x7",
        "conv 3x3 stride 2x2 at 3x3",
    ]
    entries = layer_table.measure_layers(network, "own", repeats=2)
    assert {(e.inputs, e.outputs) for e in entries if e.shape.kind == "depthwise"} == {(n, n) for n in (1, 3, 5, 7, 8)}
    with_layer_times(network, latency_table.LatencyTable("t", tuple(entries)))


def test_a_file_for_a_table_s_rows_is_evaluated(tmp_path, capsys, monkeypatch):
    """The flags that say how data are read hold for `jpq evaluate` too, and a file that is not there is named."""
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("price,kind,size\n" + "".join(f"{i},{'ab'[i % 2]},{i % 2}\n" for i in range(40)))
    model = nn.Linear(2, 2).eval()  # the inputs are price and size, standardised; `kind` goes by the size alone
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, -1.0], [0.0, 1.0]]))
        model.bias.zero_()
    export_float(model, torch.zeros(2, 2), Path("m.onnx"))
    assert main(["evaluate", "m.onnx", "--data", "table:t.csv", "--target-column", "kind"]) == 0
    assert "100.00 % of 10 test rows of table:t.csv are right (m.onnx in onnxruntime)." in " ".join(
        capsys.readouterr().out.replace("\u00a0", " ").split()
    )
    why = "There is no file or folder gone/model.onnx. Give the folder of a run, or its model.onnx."
    assert why in refused(["evaluate", "gone/model.onnx"], capsys)


def test_turns_are_taken_in_order_and_the_timed_call_is_warm():
    seen = []
    seconds = take_turns([lambda: seen.append("a"), lambda: seen.append("b")], 3)
    assert seen == list("abab") + list("aabb") * 3
    assert seconds.shape == (2, 3)
    assert (seconds > 0).all()


def test_a_latency_table_of_a_model_for_a_table_s_rows(tmp_path, capsys, monkeypatch):
    """The flags that say how data are read hold for `jpq bench` too, and stand in the command that it advises."""
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("a,b,price\n" + "".join(f"{i},{i % 7},{i * 1.5}\n" for i in range(40)))
    Path("benchnet.py").write_text(
        "from torch import nn\ndef net(classes, channels):\n"
        "    return nn.Sequential(nn.Linear(channels, 8), nn.ReLU(), nn.Linear(8, classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    args = ["bench", "--table", "l.csv", "--model", "benchnet:net", "--data", "table:t.csv", "--repeats", "5"]
    assert main([*args, "--target-column", "price"]) == 0
    advice = "jpq optimize --model benchnet:net --data table:t.csv --target-column price --latency-table l.csv --target"
    assert advice in " ".join(capsys.readouterr().out.split())


def test_a_run_from_the_table_to_the_measured_model(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--table", "t.csv", "--model", "convnet", "--repeats", "5"]) == 0
    assert "120 measurements of 4 kinds of layers" in capsys.readouterr().out
    table = pd.read_csv("t.csv")
    assert {"hardware", "onnxruntime", "threads", "n", "kernels"} <= set(table)
    train = Train(epochs=2, float_epochs=1)
    budget = Budget(target_latency="90%", target_bops="5%", latency_table=Path("t.csv"))
    result = optimize(Config(Task(limit=200), budget, train=train, run=Run(out=Path("runs"))))
    assert all(t["used"] <= 1 for t in result.targets.values())
    assert max(t["used"] for t in result.targets.values()) >= 0.97 or result.notes
    assert sum(x.latency_ms for x in result.layers) == pytest.approx(result.compressed.latency_ms)
    assert result.compressed.latency_ms <= 0.9 * result.float.latency_ms
    stored = json.loads((result.folder / "result.json").read_text())
    assert stored["latency"]["predicted_ms"] == pytest.approx(result.compressed.latency_ms)
    assert stored["latency"]["measured_ms"] > 0
    assert "latency_ms" in pd.read_csv(result.folder / "layers.csv")
    assert predicted_ms(result.folder, layer_table.read_table(Path("t.csv"))) == pytest.approx(
        result.compressed.latency_ms
    )
    capsys.readouterr()
    assert main(["bench", str(result.folder), str(result.folder / "model.onnx"), "--repeats", "5"]) == 0
    out = capsys.readouterr().out
    assert "times as long" in out
    assert out.count(" ms in onnxruntime") == 2
    assert "% of 449 test images of digits are right" in out


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["bench"], "Nothing to measure"),
        (["bench", "--model", "convnet"], "Say where the table goes"),
        (["bench", "--model", "convnet", "--table", "no/folder/t.csv"], "a file in a folder that is there"),
        (["bench", "--model", "convnett", "--table", "t.csv", "--data", "digits"], "Did you mean convnet"),
        (["bench", "--model", "convnet", "--table", "t.csv", "--threads", "0"], "at least one"),
        (["bench", "--model", "convnet", "--table", "t.csv", "--threads", "100000"], "this machine runs"),
        (["bench", "nothing.onnx"], "nothing.onnx is not there"),
        (["bench", "trial"], "it is a trial, which is not exported, or the file was removed. jpq export trial writes"),
        (["bench", "study"], "study is not the folder of one run but holds several: name one or more, such as study/a"),
        (["bench", "text.onnx"], "onnxruntime cannot load text.onnx"),
        (["bench", "empty", "--table", "text.onnx"], "text.onnx is no table of latencies"),
        (["optimize", "--target-latency", "3ms"], "run `jpq bench --table"),
        (
            ["optimize", "--target-latency", "3ms", "--latency-table", "none.csv"],
            "Cannot read the latency table none.csv",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_one_sentence(args, why, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.onnx").write_text("no model")
    Path("empty").mkdir()
    for file in ("trial/result.json", "study/a/model.onnx"):
        Path(file).parent.mkdir(parents=True)
        Path(file).write_text("")
    assert why in refused(args, capsys)


def test_impossible_latency_is_named_before_anything_is_trained(entries, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer_table.write_table(entries, Path("t.csv"))
    args = ["optimize", "--target-latency", "50ns", "--latency-table", "t.csv", "--out", "runs"]
    line = refused(args, capsys)
    assert "smallest possible is" in line
    assert " ms" in line
    assert not list(Path("runs").rglob("float.safetensors"))


def test_a_table_that_changed_is_not_resumed(entries, tmp_path):
    """What was promised under one table is not kept under another."""
    path = tmp_path / "t.csv"
    layer_table.write_table(entries, path)
    budget = Budget(target_latency="90%", latency_table=path)
    asked = Config(budget=budget, train=QUICK, run=Run(out=tmp_path / "runs"))
    with pytest.raises(KeyboardInterrupt):
        optimize(asked, Stop("search", 1))
    layer_table.write_table([replace(e, ms=1.3 * e.ms) for e in entries], path)
    with pytest.raises(JpqError, match="no longer the table"):
        optimize(replace(asked, run=replace(asked.run, resume=True)))


def test_a_run_with_a_structure_for_each_layer_is_timed(entries, tmp_path):
    path = tmp_path / "t.csv"
    layer_table.write_table(entries, path)
    asked = Config(
        budget=Budget(target_bops="1%", latency_table=path),
        decide=Decide(method="dpf", structure="3=block:8x1"),
        run=Run(out=tmp_path / "runs"),
    )
    result = optimize(shortened(asked))
    assert predicted_ms(result.folder, layer_table.read_table(path)) == pytest.approx(result.compressed.latency_ms)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with every form, results rounded, and weights in 4 bits."""
    asked = Config(
        task=Task(limit=300),
        budget=Budget(target_bops="1%"),
        decide=Decide(output_bits=8),
        train=QUICK,
        run=Run(out=tmp_path_factory.mktemp("runs"), formats="onnx,qonnx,pt2", onnx_weights="int4"),
    )
    return optimize(asked)


def test_a_run_says_what_it_exported_and_how_large_it_is(run):
    stored = json.loads((run.folder / "result.json").read_text())["export"]
    assert (stored["opset"], stored["weights"]) == (21, "int4")
    assert (stored["integer_layers"], stored["float_layers"]) == (4, {})
    assert onnx.load(run.folder / "model.onnx").opset_import[0].version == 21
    sizes = pd.read_csv(run.folder / "sizes.csv").set_index("what")
    files = {"model.packed", "model.onnx", "model.qonnx.onnx", "model.pt2"}
    assert files == {name for name in sizes.index if name.startswith("model")}
    for name in files:
        assert sizes.loc[name, "bytes"] == (run.folder / name).stat().st_size
    unpruned = sum(p.numel() for p in build("convnet", 10, 1).parameters() if p.dim() > 1)
    assert sizes.loc["unpruned, fp32, as counted", "bytes"] >= 4 * unpruned
    assert 3.5 < sizes.loc["unpruned, int8, as counted", "share_of_fp32"] ** -1 < 4
    assert sizes.loc["model.packed", "share_of_int8"] < 1
    shown = dict(export_lines(run))
    assert "opset 21, weights in int4; onnxruntime computes 4 of 4 layers in integers" in shown["ONNX"]
    assert all(name in shown["on disk"] for name in files)


def test_a_file_is_right_as_often_as_its_model(run, capsys):
    assert main(["evaluate", str(run.folder)]) == 0
    right = capsys.readouterr().out.split(" %")[0]
    assert main(["evaluate", str(run.folder / "model.onnx")]) == 0
    here = capsys.readouterr().out
    assert here.startswith(right[:3])
    same = int(here.split("The same class for ")[1].split(" of ")[0])
    assert same >= 447
    assert main(["evaluate", str(run.folder / "model.onnx"), "--data", "digits", "--split", "held-out"]) == 0
    assert "held-out images of digits are right" in capsys.readouterr().out


def test_a_file_is_tried_in_two_runtimes(run, capsys):
    pytest.importorskip("openvino", reason="openvino is not installed")
    assert main(["evaluate", str(run.folder), "--runtime", "onnxruntime,openvino"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert int(lines[2].rsplit(", ", 1)[1].split(" of ")[0]) >= 445  # as onnxruntime


def test_a_run_is_raced_against_what_it_began_with(run, capsys):
    assert main(["bench", str(run.folder), "--repeats", "5", "--threads", "1", "--batch", "1", "4"]) == 0
    out = capsys.readouterr().out
    assert "in onnxruntime" in out
    assert "1 thread, batch 4, median of 5 turns" in out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith(("fp32", "int8", "compressed"))]
    assert len(rows) == 8
    assert [" ".join(row[-5:-2]) for row in rows if row[0] == "compressed"] == ["0 of 4"] * 2
    assert [" ".join(row[-5:-2]) for row in rows if row[0] == "fp32"] == ["4 of 4"] * 2
    shares = {row[0]: float(row[-7]) for row in rows if row[-6] == "%"}  # the pruned float model has none
    assert set(shares) == {"fp32", "int8", "compressed"}
    assert "accuracy on 449 test images of digits" in " ".join(out.split())
    assert shares["fp32"] == pytest.approx(100 * run.float.accuracy, abs=0.01)
    assert abs(shares["int8"] - shares["fp32"]) < 1  # 8 bits lose next to nothing where ranges fit
    assert main(["evaluate", str(run.folder / "model.onnx")]) == 0
    assert float(capsys.readouterr().out.split(" %")[0]) == shares["compressed"]
    assert main(["bench", str(run.folder), "--repeats", "2", "--threads", "1", "--no-metric"]) == 0
    assert "accuracy" not in capsys.readouterr().out


def test_a_run_whose_data_or_float_weights_are_gone_is_timed_and_says_so(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy)
    (copy / "float.safetensors").unlink()
    assert main(["bench", str(copy), "--repeats", "2", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "the float model's weights are no longer there" in " ".join(out.split())
    rows = [line.split() for line in out.splitlines() if line.strip().startswith(("fp32", "int8", "compressed"))]
    assert [row[0] for row in rows if row[-6] == "%"] == ["compressed"]
    config = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(config.replace('data = "digits"', 'data = "folder:gone"'))
    assert main(["bench", str(copy), str(copy / "model.onnx"), "--repeats", "2", "--threads", "1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("note No metric is shown: The folder 'gone' is not there") == 2
    assert "1 thread, batch 1, median of 2 turns" in out


def one_node(sides):
    """An ONNX model of one Relu, whose input is of a fixed size."""
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sides) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "one", ends[:1], ends[1:])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)


def test_a_file_is_timed_in_every_setting(run, capsys):
    file = str(run.folder / "model.onnx")
    assert main(["bench", file, "--repeats", "3", "--threads", "1", "2", "--batch", "1", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    settings = [f"onnxruntime, {t}, batch {b}, median of 3 turns" for t in ("1 thread", "2 threads") for b in (1, 4)]
    assert [line.partition(" ms in ")[2] for line in lines[1:5]] == settings
    assert "% of 449 test images of digits are right" in lines[5]
    assert f"({file} in onnxruntime)" in " ".join(lines[5:])


def test_the_pruned_float_model_has_the_channels_of_the_plan(tmp_path):
    torch.manual_seed(0)
    dense = build("convnet", 10, 1).eval()
    joint = jpq.compress(dense, EXAMPLE, method="two-stage", bops="1%", density=0.3, output_bits=8)
    joint.discretize()
    small, plan = jpq.rebuild(joint.net, dense)
    paths = reference_models(dense, plan, (1, 8, 8), tmp_path)
    sizes = {
        name: sum(np.prod(t.dims) for t in onnx.load(p).graph.initializer if len(t.dims) > 1)
        for name, p in paths.items()
    }
    weights = lambda m: sum(p.numel() for p in m.parameters() if p.dim() > 1 and p.shape[1:].numel() > 1)  # noqa: E731
    assert sizes[FULL] == sizes[INT8] == weights(dense)
    assert sizes[PRUNED] == sum(layer.weight.numel() for n, layer in small.named_modules() if n in plan.layers)
    assert find_float_layers(paths[INT8])[1] == {}
    (tmp_path / "plan.json").write_text(plan.to_json())
    with pytest.raises(JpqError, match="does not say which model"):
        model_files(tmp_path, (1, 8, 8), tmp_path)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["evaluate", "text.onnx"], "Say which data text.onnx"),
        (["evaluate", "text.onnx", "--data", "digits"], "onnxruntime cannot load text.onnx"),
        (["evaluate", "text.onnx", "--data", "digits", "--runtime", "tvm"], "Unknown runtime 'tvm'"),
        (["evaluate", "wide.onnx", "--data", "digits"], "cannot take batches of 1x8x8 images"),
        (["evaluate", "few.onnx", "--data", "digits"], "not a row of 10 classes"),
        (["bench", "wide.onnx", "--runtime", "tvm"], "Unknown runtime 'tvm'"),
        (["bench", "wide.onnx", "--batch", "0"], "--batch 0: at least one"),
        (["bench", "fixed.onnx", "--batch", "4", "--repeats", "2"], "takes 1 samples at a time, not --batch 4"),
        (["bench", "huge.onnx"], "is of 4,294,967,296 numbers"),
        (["evaluate", "model.qonnx.onnx", "--data", "digits"], "Give the run's folder, or its model.onnx"),
        (["evaluate", "model.pt2", "--data", "digits"], "Give the run's folder, or its model.onnx"),
        (["bench", "\x1b[31mred"], "?[31mred is not there"),
        (["bench", "--model", "convnet", "--table", "t.csv", "--threads", "1", "2"], "one number of threads"),
        (["optimize", "--target-bops", "1%", "--formats", "onnx,pt3"], "Did you mean pt2"),
        (["optimize", "--target-bops", "1%", "--onnx-weights", "int3"], "Unknown type of weights 'int3'"),
        (["optimize", "--target-bops", "1%", "--output-bits", "9"], "--output-bits 9 is outside 2 to 8"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_files_and_names_are_one_sentence(args, why, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("text.onnx", "model.qonnx.onnx", "model.pt2"):
        Path(name).write_text("no model")
    onnx.save(one_node((1, 4)), "fixed.onnx")
    onnx.save(one_node((2**16, 2**16)), "huge.onnx")
    export_float(
        nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        torch.randn(2, 3, 8, 8),
        Path("wide.onnx"),
    )
    export_float(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), EXAMPLE, Path("few.onnx"))
    assert why in refused(args, capsys)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("flags : fma avx2 avx512bw avx512_vnni", ", AVX-512 VNNI)"),
        ("flags : fma avx avx2", ", AVX2 without VNNI)"),
        ("Features : fp asimd asimddp", ", dot products)"),
        ("flags : sse2", ")"),
    ],
)
def test_the_hardware_names_the_instructions_of_integer_kernels(tmp_path, line, shown):
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor : 0\nmodel name : Some CPU\n{line}\n")
    described = describe_hardware(path)
    assert described.startswith("Some CPU (")
    assert f"{shown}, {os.cpu_count()} cores" in described
