"""TensorBoard event files hold what history.csv holds."""

import builtins
import math
from dataclasses import asdict, replace

import pandas as pd
import pytest
from runs import Stop, config, shortened

import jpq
from jpq.cli.main import main
from jpq.training.history import LABEL_COLUMNS, EpochRecord, NullObserver, TensorBoardObserver
from jpq.types import JpqError


def row(phase="search", epoch=1, budget=""):
    return EpochRecord(phase, epoch, 2, 0.5, 0.9, math.nan, 0.01, 0.02, 1.5, 4.5, 5.5, 0.75, 1e-3, 7.0, budget)


def read(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_rows_and_steps_come_back_from_the_file(tmp_path):
    pytest.importorskip("tensorboard")
    seen = []

    class Heard(NullObserver):
        def epoch(self, row):
            seen.append(row)

    watch = TensorBoardObserver(Heard(), tmp_path)
    for budget in ("2%", "1%"):
        watch.phase(f"search {budget}", 2, 3)
        for epoch in (1, 2):
            for i in range(3):
                watch.step(1.0 / (1 + i), 0.03, math.nan)
            watch.epoch(row(epoch=epoch, budget=budget))
    found = read(tmp_path)
    for tag, value in asdict(row()).items():
        if tag in LABEL_COLUMNS or math.isnan(value):
            assert f"epoch/{tag}" not in found
        else:
            assert found[f"epoch/{tag}"] == [(i, pytest.approx(value)) for i in (1, 2, 3, 4)]
    assert [step for step, _ in found["step/search 1%/loss"]] == [1, 2, 3, 4, 5, 6]
    assert "step/search 1%/aim_share" not in found
    assert len(seen) == 4  # passed on


def test_a_resumed_run_counts_on(tmp_path):
    pytest.importorskip("tensorboard")
    watch = TensorBoardObserver(NullObserver(), tmp_path, [row("float"), row()])
    watch.phase("search", 2, 3)
    watch.step(1.0, 0.1, 0.1)
    watch.epoch(row(epoch=2))
    found = read(tmp_path)
    assert [step for step, _ in found["step/search/loss"]] == [4]
    assert [step for step, _ in found["epoch/loss"]] == [3]


def test_a_run_writes_what_its_history_holds(tmp_path):
    pytest.importorskip("tensorboard")
    asked = shortened(config(tmp_path), float_epochs=2)
    assert replace(asked, run=replace(asked.run, tensorboard=True)).hash() == asked.hash()  # it changes no result
    result = jpq.optimize(replace(asked, run=replace(asked.run, tensorboard=True)), final=False)
    history, found = pd.read_csv(result.folder / "history.csv"), read(result.folder)
    assert [value for _, value in found["epoch/accuracy"]] == pytest.approx(list(history.accuracy), rel=1e-6)
    assert [value for _, value in found["epoch/loss"]] == pytest.approx(list(history.loss), rel=1e-6)
    assert any(tag.startswith("step/search/") for tag in found)


def test_without_tensorboard_one_sentence_says_what_to_install(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    asked = config(tmp_path)
    watch = Stop("float", 1)
    with pytest.raises(JpqError, match=r'pip install "jpq\[tensorboard\]"'):
        jpq.optimize(replace(asked, run=replace(asked.run, tensorboard=True)), watch)
    assert not hasattr(watch, "next")  # no phase had begun
    assert main(["optimize", "--target-bops", "1%", "--tensorboard", "--out", str(tmp_path)]) == 2
    assert 'pip install "jpq[tensorboard]"' in capsys.readouterr().err.replace("\n", " ")
