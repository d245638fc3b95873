"""Several workers of one study: killed, taken over, sharing trials; and what optuna-dashboard makes of it."""

from __future__ import annotations

import json
from wsgiref.util import setup_testing_defaults

import optuna
import pandas as pd
import pytest
from optuna.artifacts import get_all_artifact_meta
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from study_workers import kill, said, training, until, worker

from jpq.trials.attributes import is_counted


def loaded(out, storage=""):
    """The study as anybody opens it, without jpq."""
    place = RDBStorage(storage) if storage else JournalStorage(JournalFileBackend(str(out / "study" / "journal.log")))
    return optuna.load_study(study_name="study", storage=place)


def taken_over(trials):
    """(the trial whose worker was killed, the one that was run in its place)."""
    again = next(t for t in trials if "retry_history" in t.system_attrs)
    return trials[again.system_attrs["retry_history"][-1]], again


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_a_killed_workers_trial_is_run_again(tmp_path, kind):
    storage = f"sqlite:///{tmp_path}/study.db" if kind == "sqlite" else ""
    flags = ["--trials", "6", *(["--storage", storage] if storage else [])]
    first = worker(tmp_path, *flags)
    until(lambda: training(tmp_path, 2), "a trial after the second")
    kill(first)
    finished = {t.number: t.values for t in loaded(tmp_path, storage).trials if t.state == TrialState.COMPLETE}
    assert finished
    second = worker(tmp_path, *flags)
    assert second.wait(timeout=240) == 0, said(tmp_path)
    trials = loaded(tmp_path, storage).trials
    assert sum(map(is_counted, trials)) == 6
    assert not [t for t in trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]
    for number, values in finished.items():
        assert trials[number].values == values, "nothing finished is lost"
    dead, again = taken_over(trials)
    assert (dead.state, again.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert again.params == dead.params
    history = pd.read_csv(tmp_path / "study" / again.user_attrs["run_folder"] / "history.csv")
    assert list(history.epoch) == [1, 2, 3, 4], "it went on from its checkpoint, or began anew"
    assert len(again.user_attrs["held_out_by_epoch"]) == 4
    assert len({t.user_attrs["run_folder"] for t in trials if is_counted(t)}) == 6, "each has a run of its own"


@pytest.mark.slow
def test_two_workers_share_the_trials_and_train_the_float_model_once(tmp_path):
    pair = [worker(tmp_path, "--trials", "8") for _ in range(2)]
    assert [p.wait(timeout=300) for p in pair] == [0, 0], said(tmp_path)
    trials = loaded(tmp_path).trials
    assert sum(map(is_counted, trials)) == 8
    times = [(t.datetime_start, t.datetime_complete) for t in trials if is_counted(t)]
    overlaps = sum(a[0] < b[1] and b[0] < a[1] for i, a in enumerate(times) for b in times[:i])
    assert overlaps >= 2, "they work at the same time"
    trained = [file.read_text().count("The float model that all trials start from") for file in tmp_path.glob("*.txt")]
    assert sorted(trained) == [0, 1]
    names = [t.user_attrs["decisions"] for t in trials if is_counted(t)]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_optuna_dashboard_opens_a_study_as_it_is(tmp_path):
    dashboard = pytest.importorskip("optuna_dashboard")
    assert worker(tmp_path, "--trials", "3", "--per", "block", "--epochs", "2").wait(timeout=240) == 0, said(tmp_path)
    study = loaded(tmp_path)
    store = optuna.artifacts.FileSystemArtifactStore(str(tmp_path / "study" / "artifacts"))
    app = dashboard.wsgi(study._storage, artifact_store=store)

    def got(path):
        status = []
        asked = {"REQUEST_METHOD": "GET", "PATH_INFO": path}
        setup_testing_defaults(asked)
        body = b"".join(app(asked, lambda code, headers, *more: status.append(code)))
        assert status[0].startswith("200"), (path, status, body[:300])
        return body

    summaries = json.loads(got("/api/studies"))["study_summaries"]
    assert [s["study_name"] for s in summaries] == ["study"]
    detail = json.loads(got(f"/api/studies/{study._study_id}"))
    assert detail["objective_names"] == ["held-out accuracy (%)", "BOPs (% of fp32)"]
    trial = detail["trials"][0]
    assert {p["name"] for p in trial["params"]} >= {"3 weight bits", "3 activation bits", "density of 3"}
    attrs = {a["key"]: a["value"] for a in trial["user_attrs"]}
    assert "W8 A8" in attrs["layers"]
    assert attrs["run_folder"].strip('"').startswith("trials/")
    kept = get_all_artifact_meta(study.trials[0], storage=study._storage)
    assert {a.filename for a in kept} == {"curves.png", "layers.png"}
    with store.open_reader(kept[0].artifact_id) as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
