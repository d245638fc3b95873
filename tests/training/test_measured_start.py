"""A search's start by measurement: which samples it reads, which table it takes, and what it says where it has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from places import Unread, places
from small_net import Small, trained_small

from jpq.allocation.decision_data import calibration_batches
from jpq.allocation.measured.table import read_table
from jpq.allocation.prepare import Prepared, prepare
from jpq.config import Budget, Config, Decide
from jpq.costs.target import parse_targets
from jpq.tasks.data import Data
from jpq.training.history import NullObserver
from jpq.training.measured_decision import known_table
from jpq.training.measured_start import with_measured_start

DECIDE = Decide(method="djpq", start="measured", w_bits=(2, 4), a_bits=(2, 4))


@pytest.fixture(scope="module")
def data() -> Data:
    """Data of which the training split alone may be read."""
    found = places()
    return replace(found, held_out=Unread(found.held_out.images, found.held_out.labels, batch_size=24))


@pytest.fixture(scope="module")
def model(data: Data) -> Small:
    return trained_small([batch for epoch in range(12) for batch in data.train.epoch(epoch)])


def run_in(folder: Path, **run: Any) -> Any:
    config = Config(decide=DECIDE)
    config = replace(config, run=replace(config.run, **run))
    return SimpleNamespace(
        config=config, top=folder, budget=0, observer=NullObserver(), timed=lambda name, work: work(), notes=[]
    )


def started(model: Small, data: Data, bops: str, run: Any) -> Prepared:
    prepared = prepare(model, data.example, DECIDE, Budget(target_bops=bops))
    net = prepared.attach(model, calibration_batches(data))
    targets = parse_targets({"bops": bops}, net.exact_usage())
    return with_measured_start(prepared, net, model, data, targets, run)


def test_a_start_reads_training_samples_alone_and_keeps_its_table(model: Small, data: Data, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    found = started(model, data, "1%", run)
    table = read_table(tmp_path / "sensitivity.csv")
    assert set(found.starts or {}) == set(table.bits)
    assert run.notes == []


def test_a_start_that_no_bits_allow_is_uniform_and_says_so(model: Small, data: Data, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    assert started(model, data, "0.01%", run).starts == {}
    assert [note.partition(":")[0] for note in run.notes] == ["--start measured"]


def test_a_table_in_the_folder_is_known_to_the_run_that_measured_it_alone(
    model: Small, data: Data, tmp_path: Path
) -> None:
    started(model, data, "1%", run_in(tmp_path))
    fresh, resumed, later = run_in(tmp_path), run_in(tmp_path, resume=True), run_in(tmp_path)
    later.budget = 1
    assert known_table(fresh)[0] is None  # it may be left over from another run
    for table in (known_table(fresh, measured=True)[0], known_table(resumed)[0], known_table(later)[0]):
        assert table is not None
        assert table.bits == read_table(tmp_path / "sensitivity.csv").bits
