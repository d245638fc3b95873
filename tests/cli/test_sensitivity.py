"""`jpq sensitivity` as a user calls it: files, interruption and bad input; and `jpq.sensitivity`."""

import json

import pytest
import torch
from convnet import EXAMPLE, convnet

import jpq
from jpq.allocation import read_table
from jpq.allocation.measured.partial import partial_path
from jpq.cli.main import main
from jpq.files.tensors import save_tensors
from jpq.results.sensitivity import measure, probe_model
from jpq.tasks import CLASSIFICATION, TASKS
from jpq.types import JpqError


def test_the_frame_is_the_file(tmp_path):
    path = tmp_path / "table.csv"
    frame = jpq.sensitivity(convnet().model, EXAMPLE, w_bits=(2, 3), a_bits=(3, 4), out=path)
    table = read_table(path)
    weights = frame[frame.what == "weight"]
    assert set(weights.value) == {2, 3}
    assert {(row["name"], row.value): row.divergence for _, row in weights.iterrows()} == {
        (layer, b): s for (layer, side), by_width in table.bits.items() if side == "w" for b, s in by_width.items()
    }
    assert (frame[frame.what == "units"].of == [len(table.orders[n]) for n in frame[frame.what == "units"].name]).all()


def test_an_interrupted_file_goes_on_to_the_same_bits(tmp_path):
    def probed():
        return probe_model(convnet().model, [EXAMPLE], CLASSIFICATION.divergence, w_bits=(2, 3), a_bits=(2, 3))

    def stop(done, total):
        if done == 7:
            raise KeyboardInterrupt

    partial = partial_path(tmp_path / "table.csv")
    with pytest.raises(KeyboardInterrupt):
        measure(probed(), "single", partial, progress=stop)
    lines = partial.read_text().splitlines()
    assert len(lines) == 1 + 7
    partial.write_text("\n".join(lines)[:-5])  # cut within its last line
    again = []
    table = measure(probed(), "single", partial, resume=True, progress=lambda done, total: again.append(done))
    assert again[0] == 7
    assert table == measure(probed(), "single")
    assert not partial.exists()
    partial.write_text("\n".join(lines))
    with pytest.raises(JpqError, match="Run without"):
        measure(probe_model(convnet().model, [EXAMPLE[:3]], CLASSIFICATION.divergence), "single", partial, resume=True)


def test_file_and_entries_name_the_task(tmp_path):
    path = tmp_path / "table.csv"
    few = {"w_bits": (2, 3), "a_bits": (2, 3), "out": path}
    for estimator in ("single", "coarse", "fisher"):
        jpq.sensitivity(convnet().model, EXAMPLE, task=TASKS["regression"], estimator=estimator, **few)
        assert read_table(path).task == "regression"
    jpq.sensitivity(convnet().model, EXAMPLE, divergence=CLASSIFICATION.divergence, **few)
    assert read_table(path).task == ""  # whose distance it is only the caller knows

    def probed(task):
        return probe_model(
            convnet().model, [EXAMPLE], CLASSIFICATION.divergence, w_bits=(2, 3), a_bits=(2, 3), task=task
        )

    def stop(done, total):
        raise KeyboardInterrupt

    partial = partial_path(path)
    with pytest.raises(KeyboardInterrupt):
        measure(probed("classification"), "single", partial, progress=stop)
    with pytest.raises(JpqError, match="Run without"):
        measure(probed("regression"), "single", partial, resume=True)
    assert measure(probed("classification"), "single", partial, resume=True).task == "classification"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--samples", "1"], "--samples 1"),
        (["--w-bits", "8", "2"], "--w-bits 8 2"),
        (["--out", "nowhere/table.csv"], "no folder"),
        (["--out", "table.txt"], "table.csv"),
        (["--estimator", "hessian"], "hessian"),
    ],
)
def test_bad_input_is_one_sentence(flags, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sensitivity", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error


def test_a_task_without_a_divergence_is_refused():
    class Bare:
        name = "bare"

    with pytest.raises(JpqError, match="no divergence"):
        jpq.sensitivity(convnet().model, EXAMPLE, task=Bare())


@pytest.mark.parametrize(("example", "says"), [(EXAMPLE[:0], "no samples"), (EXAMPLE * torch.nan, "hold NaN")])
def test_examples_of_nothing_and_of_nan_are_refused(example, says):
    with pytest.raises(JpqError, match=says):
        jpq.compress(convnet().model, example, bops="10%", steps=2)


@pytest.mark.slow
def test_the_command_writes_table_and_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    flags = ["--float-epochs", "1", "--samples", "64", "--w-bits", "2", "3", "--a-bits", "2", "3", "--out", "t.csv"]
    assert main(["sensitivity", *flags]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "most sensitive" in said
    assert (tmp_path / "t.png").stat().st_size > 1000
    assert read_table(tmp_path / "t.csv").samples == 64
    assert (tmp_path / "t.float.safetensors").is_file()
    assert "--weights t.float.safetensors" in said
    head = read_table(tmp_path / "t.csv")
    notes = {"format": 3, "estimator": "coarse", "model": head.model, "calibration": head.calibration}
    (tmp_path / "t.csv.part").write_text(json.dumps({**notes, "w_bits": [2, 3], "a_bits": [2, 3]}) + "\n")
    assert main(["sensitivity", *flags, "--resume"]) == 0  # goes on as it began, whatever a pass takes now
    assert read_table(tmp_path / "t.csv").estimator == "coarse"


def test_a_measurement_that_goes_on_takes_the_float_model_that_was_trained_for_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--float-epochs", "1", "--samples", "8", "--w-bits", "2", "2", "--a-bits", "2", "2", "--out", "t.csv"]
    found = 0

    def stop(*_: object, **__: object) -> None:
        nonlocal found
        found += 1
        if found == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rich.progress.Progress.update", stop)
        assert main(["sensitivity", *flags]) == 130
    trained = (tmp_path / "t.float.safetensors").read_bytes()
    assert len((tmp_path / "t.csv.part").read_text().splitlines()) > 1
    capsys.readouterr()
    assert main(["sensitivity", *flags, "--resume"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the one that was trained before: t.float.safetensors" in said
    assert "trained first" not in said
    assert (tmp_path / "t.float.safetensors").read_bytes() == trained
    interrupted = read_table(tmp_path / "t.csv")
    assert main(["sensitivity", *flags]) == 0
    assert read_table(tmp_path / "t.csv").bits == interrupted.bits


def test_float_weights_that_were_trained_otherwise_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--float-epochs", "1", "--samples", "8", "--w-bits", "2", "2", "--a-bits", "2", "2", "--out", "t.csv"]
    assert main(["sensitivity", *flags, "--limit", "80"]) == 0
    for other in (["--limit", "81"], ["--limit", "80", "--float-epochs", "2"]):
        assert main(["sensitivity", *flags, *other, "--resume"]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "t.float.safetensors holds weights of another model, data or setting" in said
    save_tensors(torch.nn.Linear(2, 2), "t.float.safetensors")
    assert main(["sensitivity", *flags, "--limit", "80", "--resume"]) == 2
    assert "t.float.safetensors holds weights of another model" in " ".join(capsys.readouterr().err.split())


def test_a_task_without_a_divergence_is_refused_before_the_float_model_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    bare = (
        "from jpq.tasks.classification import Classification\n\n\nclass Bare(Classification):\n    divergence = None\n"
    )
    (tmp_path / "task_without_divergence.py").write_text(bare)
    assert main(["sensitivity", "--task", "task_without_divergence:Bare", "--out", "t.csv"]) == 2
    assert "no divergence" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("t.*"))
