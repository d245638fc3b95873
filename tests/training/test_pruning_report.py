"""The note on what more pruning would cost: in the record of a run, the same after a resumption."""

import pytest
from runs import config, resumed, shortened

import jpq
from jpq.results import run_folder
from jpq.training.history import NullObserver


class Phases(NullObserver):
    """Keeps the names of the phases."""

    def __init__(self, names: list[str]):
        self.names = names

    def phase(self, name: str, epochs: int, steps: int) -> None:
        self.names.append(name)


@pytest.mark.slow
def test_a_resumed_run_keeps_the_figures_of_its_search(tmp_path):
    asked = shortened(config(tmp_path / "whole"), epochs=4)
    phases: list[str] = []
    whole = jpq.optimize(asked, Phases(phases))
    assert phases == ["float", "search", "price of pruning", "fine-tune", "verify"]
    assert whole.pruning["sentence"] in whole.notes
    assert whole.pruning["closed"] == round(0.1 * whole.pruning["open"])
    assert run_folder.read_run(whole.folder).pruning == whole.pruning
    again = resumed(asked, tmp_path / "parts", "fine-tune")
    assert again.pruning["sentence"] in again.notes
    assert again.notes.count(again.pruning["sentence"]) == 1
    same = {name: value for name, value in whole.pruning.items() if name != "seconds"}
    assert {name: value for name, value in again.pruning.items() if name != "seconds"} == same


@pytest.mark.slow
def test_methods_that_search_no_channels_have_none(tmp_path):
    for method in ("uniform", "pdp"):
        assert jpq.optimize(shortened(config(tmp_path / method, method))).pruning == {}
