"""`jpq study`: its space, what counts as a trial, seeds, duplicates, limits, and what it refuses.

Most tests put a formula in the place of training: what is tested here is what a study makes of its runs.
"""

from __future__ import annotations

import errno
import io
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_runs import folder
from optuna.study import StudyDirection
from optuna.trial import TrialState
from rich.console import Console

import jpq
from jpq.allocation.measured.table import SensitivityTable, write_table
from jpq.cli.main import main
from jpq.cli.study import StudyScreen
from jpq.config import Config, Decide, Run, Task, Train
from jpq.tasks import CLASSIFICATION, task_record
from jpq.tasks.classification import Classification
from jpq.tasks.load import load_dense_model, read_data
from jpq.tracing.trace import trace
from jpq.training.history import EpochRecord
from jpq.trials import early_stopping, samplers, status
from jpq.trials import settings as study_settings
from jpq.trials import study as trials_study
from jpq.trials import trial as one_trial
from jpq.trials.early_stopping import MetricCurve
from jpq.trials.objectives import objective_direction
from jpq.trials.preview import Preview, prepare_float_weights
from jpq.trials.settings import PARTS, SAMPLERS, Study, check_directions
from jpq.trials.space import Space, block_of, group_names
from jpq.trials.storage import open_storage, record_worker, requeue, stored_url, without_password
from jpq.trials.study import TrialCounts, _write_front
from jpq.types import JpqError

QUICK = Train(epochs=2, float_epochs=1, lr=3e-3)
NAN = float("nan")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Float weights, trained once for all tests here."""
    file = tmp_path_factory.mktemp("weights") / "float.safetensors"
    prepare_float_weights(task(file.parent), file, one_trial.NullStudyObserver())
    return file


def task(out, weights=None, **decide):
    return Config(
        task=Task(limit=300, weights=weights),
        train=QUICK,
        run=Run(out=out, device="cpu"),
        decide=jpq.config.Decide(**decide),
    )


@pytest.fixture
def formula(monkeypatch):
    """Trains nothing: the accuracy of a run follows from its widths, the same for equal decisions. Lists the runs."""
    runs = []

    def trained(config, watch, final):
        assert not final, "a trial must not read the test split"
        runs.append(config)
        known = previews[-1].preview_costs(config) if config.decide.method == "by-hand" else None
        share = known.costs["bops"] if known else float(config.budget.target_bops[:-1]) / 100
        size = int(known.costs["size"]) if known else 1000
        accuracy = 1 - 0.02 / (share * 100 + 0.05)
        for epoch in (1, 2):
            values = dict(loss=0.0, accuracy=accuracy * epoch / 2, bops=NAN, bops_share=share, aim_share=NAN)
            rest = dict(pressure=NAN, w_bits=NAN, a_bits=NAN, kept=NAN, lr=NAN, seconds=0.0)
            watch.epoch(EpochRecord("fine-tune", epoch, 2, **values, **rest))
        now = SimpleNamespace(bops=0, bops_share=share, size_bytes=size, macs=1, latency_ms=None)
        folder = config.run.out / config.hash()
        folder.mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(
            compressed=now,
            float=SimpleNamespace(macs=1),
            held_out={"compressed": accuracy},
            folder=folder,
            method=config.decide.method,
            layers=(),
            seconds={"total": 0.0},
            task=CLASSIFICATION,
        )

    previews = []

    def remembered(self):
        previews.append(self.preview)
        original(self)

    original = one_trial.TrialRunner.__post_init__
    monkeypatch.setattr(one_trial.TrialRunner, "__post_init__", remembered)
    monkeypatch.setattr(one_trial, "optimize", trained)
    monkeypatch.setattr(one_trial.run_folder, "draw_run", lambda result, config: None)
    return runs


def told(study):
    return [(t.state, t.params, t.values) for t in study.trials]


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("layer1.0.conv1", "layer1.0"),
        ("conv1", "conv1"),
        ("features.0", "features.0"),
        ("0", "0"),
        ("features.3.0.block.1.0", "features.3"),
        ("layer2.0.conv1->fc", "layer2.0"),
    ],
)
def test_blocks_are_the_shortest_numbered_beginning(name, own):
    assert block_of(name) == own
    assert group_names([name], "block") == {own: [name]}


@pytest.mark.parametrize("per", PARTS)
@pytest.mark.parametrize("model", ["convnet", "resnet8"])
def test_every_suggestion_is_a_plan_within_the_space(tmp_path, model, per):
    config = replace(task(tmp_path, w_bits=(3, 7)), task=Task(model=model, limit=300))
    preview = Preview(config)
    space = Space.of(Study(per=per), config, preview.network, preview.prepared.sites)
    low, high = (
        preview.preview_costs(space.smallest_config()),
        preview.preview_costs(replace(config, decide=replace(config.decide, bits="7/8"))),
    )
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=1))
    names = set()
    for _ in range(12):
        trial = study.ask()
        decided = space.suggest(trial).check()
        known = preview.preview_costs(decided)
        assert all(low.costs[cost] <= known.costs[cost] <= high.costs[cost] for cost in low.costs)
        for label, bits in ((k, v) for k, v in trial.params.items() if k.endswith(" bits")):
            assert (3 if "weight" in label else 2) <= bits <= (7 if "weight" in label else 8)
        names.add(known.name)
    assert len(names) > 6
    groups = len(group_names(space.layers, per)), len(group_names(space.sites, per))
    image = sum(space.layers[names[0]] for names in group_names(space.layers, per).values() if len(names) == 1)
    assert len(trial.params) == 2 * groups[0] - image + groups[1]


def test_anchors_are_uniform_bits_with_every_channel(tmp_path, weights, formula):
    study = jpq.study(task(tmp_path, weights), Study(trials=4))
    macs = 9 * (64 * 1 * 32 + 16 * 32 * 64 + 16 * 64 * 64) + 640
    image = 9 * 64 * 32
    shares = [(image * b * 8 + (macs - image) * b * b) / macs / 1024 for b in (8, 4, 3, 2)]
    assert [t.values[1] for t in study.trials] == pytest.approx([100 * s for s in shares])
    assert all(t.params["density of 3"] == 1.0 for t in study.trials)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n != "tpe" else []) for n in SAMPLERS])
def test_the_same_seed_gives_the_same_trials(tmp_path, weights, formula, name):
    asked = Study(trials=12, sampler=name, early_stop=False, per="network")
    once = jpq.study(task(tmp_path / "once", weights), asked)
    part = jpq.study(task(tmp_path / "parts", weights), replace(asked, trials=7))
    assert told(part)[:7] == told(once)[:7]
    other = replace(task(tmp_path / "other", weights), run=Run(out=tmp_path / "other", device="cpu", seed=1))
    assert told(jpq.study(other, asked)) != told(once)


def test_an_interrupted_study_goes_on_as_if_it_had_not_been(tmp_path, weights, formula):
    asked = Study(trials=9, sampler="random", per="block")
    once = jpq.study(task(tmp_path / "once", weights), asked)
    jpq.study(task(tmp_path / "parts", weights), replace(asked, trials=5))
    assert len(formula) == 9 + 5
    again = jpq.study(task(tmp_path / "parts", weights), asked)
    assert told(again) == told(once)
    assert len(formula) == 9 + 9, "nothing is trained twice"


@pytest.mark.parametrize(  # trials 0 to 3 are queued at first, later ones drawn
    ("sampler", "interrupted"), [("random", 2), ("random", 6), ("tpe", 6)]
)
def test_a_study_whose_trial_was_interrupted_draws_the_trials_that_it_would_have_drawn(
    sampler, interrupted, tmp_path, weights, formula, monkeypatch
):
    asked = Study(trials=12, sampler=sampler, per="block")
    once = jpq.study(task(tmp_path / "once", weights), asked)
    real = one_trial.optimize

    def stop(config, watch, final):
        if len(list((tmp_path / "parts" / "study" / "trials").glob("*"))) == interrupted:
            raise KeyboardInterrupt
        return real(config, watch, final)

    with monkeypatch.context() as patch:
        patch.setattr(one_trial, "optimize", stop)
        with pytest.raises(KeyboardInterrupt):
            jpq.study(task(tmp_path / "parts", weights), asked)
    parts = jpq.study(task(tmp_path / "parts", weights), asked)
    done = [[t.params for t in study.trials if t.state == TrialState.COMPLETE] for study in (once, parts)]
    assert len(parts.trials) == len(once.trials) + 1
    assert sorted(map(str, done[0])) == sorted(map(str, done[1]))
    if interrupted == 6:
        assert done[0] == done[1]


def test_a_trial_that_takes_up_another_draws_as_that_one_would_have():
    def drawn(interrupted):
        study = optuna.create_study(sampler=samplers.build_sampler(Study(sampler="random"), 0))
        values = {}

        def draw(trial):
            if trial.number in interrupted:
                one_trial.queue_again(trial)
                raise one_trial.TrialFailed("interrupted")
            first = trial.number
            while "again" in study.trials[first].user_attrs:
                first = study.trials[first].user_attrs["again"]
            values[first] = [trial.suggest_float(name, 0, 1) for name in "ab"]
            return 0.0

        study.optimize(draw, n_trials=6 + len(interrupted), catch=(one_trial.TrialFailed,))
        return list(values.values())

    assert drawn(()) == drawn((2,)) == drawn((2, 3, 6))


def test_a_repeat_of_a_trial_that_took_up_another_takes_up_none():
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.add_trial(optuna.create_trial(values=[90.0, 1.0], user_attrs={"again": 0, "held_out": 0.9}))
    repeat = study.ask()
    assert one_trial.TrialRunner._repeat_values(None, repeat, study.trials[0]) == [90.0, 1.0]
    assert repeat.user_attrs == {"limits": {}, "held_out": 0.9, "same_as": 0}


def test_equal_decisions_are_trained_once(tmp_path, weights, formula):
    config = task(tmp_path, weights, w_bits=(2, 3), a_bits=(2, 3))
    study = jpq.study(config, Study(trials=10, sampler="random", vary="bits", per="network", early_stop=False))
    assert len(formula) == 4, "there are four"
    assert TrialCounts.of(study).done == 4
    copies = [t for t in study.trials if "same_as" in t.user_attrs]
    assert copies
    for copy in copies:
        assert copy.values == study.trials[copy.user_attrs["same_as"]].values
        assert copy.params == study.trials[copy.user_attrs["same_as"]].params


def test_repeats_hold_the_limits_of_what_they_repeat(tmp_path, weights, formula, monkeypatch):
    monkeypatch.setattr("jpq.trials.study.MAX_REPEATS", 4)
    config = task(tmp_path, weights, w_bits=(2, 4), a_bits=(2, 4))
    asked = Study(trials=9, sampler="gp", vary="bits", per="network", max_bops="0.9%", early_stop=False)
    study = jpq.study(config, asked)
    copies = [t for t in study.trials if "same_as" in t.user_attrs]
    assert copies
    assert len(study.trials) > max(samplers.STARTUP_TRIALS, copies[0].number) + 1, (
        "the process was fitted to repeats too"
    )
    for copy in copies:
        twin = study.trials[copy.user_attrs["same_as"]]
        over = pytest.approx(twin.values[1] / 0.9 - 1, abs=1e-6)
        assert copy.user_attrs["limits"] == twin.user_attrs["limits"] == {"bops": over}
        if hasattr(copy, "constraints"):
            assert copy.constraints == twin.constraints != {}


@pytest.mark.parametrize("name", SAMPLERS)
def test_limits_hold_and_the_sampler_is_told(tmp_path, weights, formula, name):
    asked = Study(trials=8, sampler=name, objectives="accuracy,size", max_size="40KB", early_stop=False)
    study = jpq.study(task(tmp_path, weights), asked)
    kept = [t for t in study.trials if t.state == TrialState.COMPLETE and t.values[1] <= 40]
    over = [t for t in study.trials if t.user_attrs["limits"]["size"] > 0]
    assert over, "uniform 8 bits take 57 KB"
    for t in study.trials:
        assert (t.user_attrs["limits"]["size"] > 0) == (t in over)
        if hasattr(t, "constraints"):
            assert list(t.constraints.values()) == [t.user_attrs["limits"]["size"]]
    if name == "gp":  # it learns from trained trials alone
        assert len(formula) == 8
        assert all(t.state == TrialState.COMPLETE for t in over)
    else:
        assert len(kept) == len(formula) == 8
        assert all(t.state == TrialState.PRUNED and "KB" in t.user_attrs["infeasible"] for t in over)
    assert not [t for t in status.StudyStatus.of(study, asked).front if t.values[1] > 40]


def test_a_trial_that_fails_says_why_and_the_study_goes_on(tmp_path, weights, formula):
    vary = {"vary": "target,method,structure", "methods": "djpq,uniform", "structures": "2:4,channels"}
    study = jpq.study(task(tmp_path, weights), Study(trials=8, sampler="random", early_stop=False, **vary))
    failed = [t for t in study.trials if t.state == TrialState.FAIL]
    assert 0 < len(failed) < 8
    assert len(formula) == 8 - len(failed)
    for t in failed:
        where = f"{t.params['method']}, --structure {t.params['structure']}"
        assert "prunes nothing" in t.user_attrs["reason"] or where in t.user_attrs["reason"]


def test_a_study_where_every_trial_fails_ends_with_the_reason(tmp_path, weights, monkeypatch):
    def fails(config, watch, final):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(one_trial, "optimize", fails)
    with pytest.raises(JpqError, match=r"Every trial of study 'study' failed \(3\). The last one: out of memory"):
        jpq.study(task(tmp_path, weights), Study(trials=3))


def test_hopeless_trials_are_stopped_and_count(tmp_path, weights, formula, monkeypatch):
    real = one_trial.optimize

    def worse(config, watch, final):
        return real(config, Dimmed(watch) if "0=3/" in config.decide.bits else watch, final)

    monkeypatch.setattr(one_trial, "optimize", worse)
    config = task(tmp_path, weights, w_bits=(2, 5), a_bits=(2, 4))
    study = jpq.study(config, Study(trials=12, sampler="random", per="network", patience=1, warm_up=3))
    stopped = [t for t in study.trials if t.state == TrialState.PRUNED]
    assert stopped
    assert TrialCounts.of(study).done == 12
    for t in stopped:
        assert t.params["all layers weight bits"] == 3
        assert len(t.user_attrs["held_out_by_epoch"]) == 1
        assert t.user_attrs["stopped_early"].startswith("after 1 of 2 epochs, at ")
    off = replace(config, run=Run(out=tmp_path / "off", device="cpu"))
    study = jpq.study(off, Study(trials=12, sampler="random", per="network", early_stop=False))
    assert not [t for t in study.trials if t.state == TrialState.PRUNED]


class Dimmed:
    """A watch that hears of half the accuracy."""

    def __init__(self, watch):
        self.watch = watch

    def epoch(self, row):
        self.watch.epoch(replace(row, accuracy=row.accuracy / 2))


curves = st.tuples(
    st.lists(st.integers(0, 10), min_size=4, max_size=4), st.tuples(st.integers(0, 3), st.integers(0, 3))
)


@given(curves, st.lists(curves, max_size=6), st.integers(1, 4), st.integers(0, 4), st.integers(1, 3), st.integers(1, 5))
def test_the_rule_against_brute_force(mine, others, done, margin, patience, warm_up):
    tenth = [MetricCurve(tuple(a / 10 for a in accuracy), 4, cost) for accuracy, cost in others]
    trial = MetricCurve(tuple(a / 10 for a in mine[0][:done]), 4, mine[1])
    run = 0  # epochs in a row that it was behind
    for epoch in range(done):
        behind = False
        for accuracy, cost in others:
            cheap = cost[0] <= mine[1][0] and cost[1] <= mine[1][1]
            behind |= cheap and accuracy[epoch] - mine[0][epoch] > margin
        run = run + 1 if behind else 0
    expected = len(others) >= warm_up and run >= patience
    assert early_stopping.should_stop(trial, tenth, margin / 10 + 1e-6, patience, warm_up) == expected


def test_trials_of_other_lengths_are_compared_at_the_same_share():
    short, long = MetricCurve((0.9, 0.91), 2, (1.0,)), MetricCurve((0.5, 0.6, 0.7), 10, (1.0,))
    assert short.metric_at(0.3) is None
    assert short.metric_at(0.5) == 0.9
    assert not early_stopping.should_stop(long, [short], 0.02, 1, 1), "at 3 of 10 epochs the short one had none"
    assert early_stopping.should_stop(MetricCurve((0.5,) * 5, 10, (1.0,)), [short], 0.02, 1, 1)


@pytest.mark.parametrize(("volume", "text"), [(None, ""), (0.0, ""), (1.25, "hypervolume 1.250")])
def test_a_hypervolume_of_nothing_is_not_shown(volume, text):
    assert status.StudyStatus((), (), 0, 0, 0, 0, 0, 0, {}, (), volume).hypervolume_text() == text


def test_hypervolume_against_optunas():
    from optuna._hypervolume import compute_hypervolume

    draw = np.random.default_rng(0)
    accuracy, bops, size = draw.uniform(0, 1, 20), 10 ** draw.uniform(-4, 0, 20), draw.uniform(1, 50, 20)
    trials = [SimpleNamespace(values=[100 * a, s, 100 * b]) for a, b, s in zip(accuracy, bops, size, strict=True)]
    found = status.study_hypervolume(trials, ["accuracy", "size", "bops"], {"size": 40_000.0}, 0.1)
    above = (accuracy > 0.1) & (size < 40)
    points = np.stack([-accuracy, np.log10(size / 40), np.log10(bops)], 1)[above]
    assert found == pytest.approx(compute_hypervolume(points, np.array([-0.1, 0.0, 0.0])))


def test_a_heartbeat_file_keeps_a_trial_alive(tmp_path):
    import os

    storage = open_storage("", tmp_path, dead_after=4)
    study = optuna.create_study(storage=storage, directions=["maximize", "minimize"])
    alive, dead = study.ask(), study.ask()
    for trial in (alive, dead):
        trial.suggest_int("bits", 2, 8)
        storage.record_heartbeat(trial._trial_id)
    assert storage._get_stale_trial_ids(study._study_id) == []
    past = os.stat(tmp_path / "heartbeats" / str(dead._trial_id)).st_mtime - 5
    os.utime(tmp_path / "heartbeats" / str(dead._trial_id), (past, past))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optuna.storages.fail_stale_trials(study)
    states = [t.state for t in study.trials]
    assert states == [TrialState.RUNNING, TrialState.FAIL, TrialState.WAITING]
    assert study.trials[2].params == study.trials[1].params


@pytest.mark.parametrize("url", ["", pytest.param("sqlite:///{}/study.db", marks=pytest.mark.slow)])
def test_a_worker_that_died_before_its_first_heartbeat_is_found(tmp_path, url):
    storage = open_storage(url.format(tmp_path), tmp_path, dead_after=2)
    study = optuna.create_study(storage=storage, directions=["maximize", "minimize"])
    died, begun = study.ask(), study.ask()
    record_worker(begun)
    storage = study._storage
    assert storage._get_stale_trial_ids(study._study_id) == []
    time.sleep(2.1)
    storage.record_heartbeat(begun._trial_id)
    assert storage._get_stale_trial_ids(study._study_id) == [died._trial_id]


def test_a_trial_that_costs_its_workers_again_and_again_is_given_up(tmp_path):
    storage = open_storage("", tmp_path, dead_after=2)
    study = optuna.create_study(storage=storage, directions=["maximize", "minimize"])
    study.enqueue_trial({"bits": 3})
    for number in range(4):
        trial = study.ask()
        assert (trial.number, trial.suggest_int("bits", 2, 8)) == (number, 3)
        record_worker(trial)
        assert study.trials[number].user_attrs["worker"]
        study.tell(trial, state=TrialState.FAIL)
        requeue(study, study.trials[number])
    assert [t.state for t in study.trials] == [TrialState.FAIL] * 4, "three times more, then no more"
    assert optuna.storages.RetryFailedTrialCallback.retry_history(study.trials[3]) == [0, 1, 2]


def test_a_storage_that_goes_away_ends_in_a_sentence(tmp_path, weights, monkeypatch):
    def gone(shared):
        raise optuna.exceptions.StorageInternalError("server closed the connection")

    monkeypatch.setattr("jpq.trials.study.TrialCounts.of", gone)
    with pytest.raises(JpqError, match=r"does not answer any more \(server closed the connection\)"):
        jpq.study(task(tmp_path, weights), Study(trials=1))


@pytest.mark.parametrize("directions", [["maximize"], ["minimize", "minimize"], ["maximize", "minimize"]])
def test_a_study_of_somebody_else_is_left_alone(tmp_path, weights, formula, directions):
    url = f"sqlite:///{tmp_path}/study.db"
    theirs = optuna.create_study(storage=url, study_name="study", directions=directions)
    theirs.add_trial(optuna.create_trial(values=[1.0] * len(directions)))
    with pytest.raises(JpqError, match=r"holds a study 'study' that is not of jpq study. Choose another name"):
        jpq.study(task(tmp_path, weights), Study(trials=1, storage=url))
    assert not formula
    assert len(theirs.trials) == 1
    assert not theirs.user_attrs


def test_a_worker_killed_while_it_makes_the_study_leaves_nothing_out(tmp_path, weights, formula, monkeypatch):
    real = trials_study.record_settings

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trials_study, "record_settings", killed)
    with pytest.raises(KeyboardInterrupt):
        jpq.study(task(tmp_path, weights), Study(trials=1))
    monkeypatch.setattr(trials_study, "record_settings", real)
    study = jpq.study(task(tmp_path, weights), Study(trials=1))
    anchors = [t.system_attrs["fixed_params"]["0 weight bits"] for t in study.trials]
    assert anchors == [8, 4, 3, 2], "each once, and none of them is used up as surplus"
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] + 3 * [TrialState.WAITING]
    assert {"float weights", "accuracy of guessing", "fp32 costs", "settings"} <= study.user_attrs.keys()


def full_disk(hidden):
    """What a full disk ends a run with: the system's own error, or a sentence about it."""
    error = OSError(errno.ENOSPC, "No space left on device", "checkpoint")
    if not hidden:
        raise error
    raise JpqError("Cannot write checkpoint: No space left on device.") from error


@pytest.mark.parametrize("how", ["Ctrl-C", "full disk", "full disk, said"])
def test_an_interrupted_trial_is_queued_with_its_decisions_and_its_curve(tmp_path, weights, formula, monkeypatch, how):
    real = one_trial.optimize

    class Interrupted:
        def __init__(self, watch):
            self.watch = watch

        def epoch(self, row):
            self.watch.epoch(row)
            if how == "Ctrl-C":
                raise KeyboardInterrupt
            full_disk(how.endswith("said"))

    monkeypatch.setattr(one_trial, "optimize", lambda c, w, final: real(c, Interrupted(w), final))
    asked = Study(trials=1, sampler="random", per="network", anchors=False)
    with pytest.raises((KeyboardInterrupt, OSError, JpqError)):
        jpq.study(task(tmp_path, weights), asked)
    monkeypatch.setattr(one_trial, "optimize", real)
    study = optuna.load_study(study_name="study", storage=open_storage("", tmp_path / "study", 120))
    first, second = study.trials
    assert (first.state, second.state) == (TrialState.FAIL, TrialState.WAITING)
    assert TrialCounts.of(study).done == 0
    assert status.StudyStatus.of(study, asked).counts_text(1) == "0/1 done, 1 interrupted"
    assert len(first.params) == 3
    assert second.system_attrs["fixed_params"] == first.params
    assert second.user_attrs == {"held_out_by_epoch": first.user_attrs["held_out_by_epoch"], "again": 0}
    done = jpq.study(task(tmp_path, weights), asked).trials
    assert done[1].params == first.params
    assert len(done[1].user_attrs["held_out_by_epoch"]) == done[1].user_attrs["fine_tuning_epochs"] == 2


def test_a_queued_trial_without_a_place_is_queued_again(tmp_path, weights, formula, monkeypatch):
    work = []
    monkeypatch.setattr("jpq.trials.study._run_trials", lambda shared, one, *_: work.append(one))
    study = jpq.study(task(tmp_path, weights), Study(trials=1))
    study.optimize(work[0], n_trials=2)
    states = [t.state for t in study.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, *3 * [TrialState.WAITING]]
    assert study.trials[4].system_attrs["fixed_params"] == study.trials[1].system_attrs["fixed_params"]
    assert study.trials[1].user_attrs["surplus"]


def test_curves_without_their_beginning_judge_nobody(tmp_path):
    study = optuna.create_study(directions=["maximize", "minimize"])
    for curve, epochs in (([0.5, 0.9], 2), ([0.9], 2), ([], 2)):
        attrs = {"held_out_by_epoch": curve, "fine_tuning_epochs": epochs}
        study.add_trial(optuna.create_trial(values=[90.0, 1.0], user_attrs=attrs))
    stopper = early_stopping.EarlyStoppingObserver(study.ask(), Study(), one_trial.NullStudyObserver(), None)
    assert stopper._finished() == [MetricCurve((0.5, 0.9), 2, (1.0,))]


def test_the_screen_shows_reasons_as_they_are():
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.add_trial(optuna.create_trial(state=TrialState.FAIL, user_attrs={"reason": "no [/x] in [bold]here"}))
    console = Console(file=io.StringIO(), width=200)
    screen = StudyScreen(console, Study())
    screen.number = 0
    screen.tally(study)
    assert "reason no [/x] in [bold]here" in console.file.getvalue()


def test_the_screen_tells_the_outcome_of_its_own_trial_once():
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.add_trial(optuna.create_trial(values=[90.0, 1.0]))
    console = Console(file=io.StringIO(), width=200)
    screen = StudyScreen(console, Study(trials=2))
    screen.number = 0
    screen.tally(study)
    study.add_trial(optuna.create_trial(values=[80.0, 0.5]))
    screen.tally(study)
    first, second = console.file.getvalue().splitlines()
    assert first.startswith("trial 0: held-out accuracy (%) 90, BOPs (% of fp32) 1  1/2 done")
    assert second.startswith("another worker's trial  2/2 done")


def test_pictures_show_what_keeps_to_the_limits(tmp_path):
    study = optuna.create_study(directions=["maximize", "minimize"])
    for accuracy, share, over in ((0.9, 0.01, -0.1), (0.95, 0.02, 0.1), (0.8, 0.005, -0.5)):
        made = folder(tmp_path / "trials", accuracy, share)
        attrs = {"run_folder": f"trials/{made.name}", "limits": {"bops": over}}
        study.add_trial(optuna.create_trial(values=[100 * accuracy, 100 * share], user_attrs=attrs))
    _write_front(study, Study(), tmp_path)
    assert sorted(pd.read_csv(tmp_path / "pareto.csv")["accuracy"]) == [0.8, 0.9]


def test_a_limit_of_another_form_is_refused_before_the_first_trial(tmp_path, weights, formula):
    config = task(tmp_path, weights)
    with pytest.raises(JpqError, match="Write it like 1%, one point of accuracy"):
        jpq.study(replace(config, budget=jpq.config.Budget(max_drop="0.2dB")), Study(trials=2))
    assert formula == []


class Error(Classification):
    """The share of wrong classes, which is better where it is lower."""

    name, metric_name, higher_is_better = "errors", "error", False


def test_a_metric_that_is_better_where_it_is_lower_is_minimized():
    """Values and screen hold the metric itself: the largest is the worst, and the front is that of the scores."""
    directions = [StudyDirection.MINIMIZE, StudyDirection.MINIMIZE]
    assert [objective_direction(name, Error()) for name in ("accuracy", "bops")] == directions
    assert objective_direction("accuracy", CLASSIFICATION) == StudyDirection.MAXIMIZE
    study = optuna.create_study(directions=directions, study_name="errors")
    for key, value in task_record(Error(), 10).items():
        study.set_user_attr(key, value)
    for values in ([40.0, 1.0], [50.0, 2.0], [20.0, 3.0]):
        study.add_trial(optuna.create_trial(values=values))
    now = status.StudyStatus.of(study, Study(trials=3))
    assert [trial.number for trial in now.front] == [0, 2]
    assert now.best == {"held-out error (%)": 20.0, "BOPs (% of fp32)": 1.0}
    assert sorted(trial.number for trial in study.best_trials) == [0, 2]
    check_directions(study, directions)
    with pytest.raises(JpqError, match="Study 'errors' was begun by an earlier version of jpq, which searched for a"):
        check_directions(study, [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE])


def test_a_sensitivity_table_that_is_not_there_is_refused_before_the_study_has_a_folder(tmp_path):
    decide = Decide(method="measured", sensitivity=tmp_path / "gone.csv")
    with pytest.raises(JpqError, match="sensitivity table"):
        jpq.study(Config(decide=decide, run=Run(out=tmp_path / "out")), Study(vary="target"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("refused", ["table", "limit", "layer", "storage"])
def test_what_cannot_work_is_refused_before_the_study_has_a_folder(refused, tmp_path):
    config, settings = task(tmp_path / "out"), Study(trials=1)
    if refused == "table":
        (tmp_path / "table.csv").write_text("kind,ms\nconv,1\n")
        config = replace(config, budget=jpq.config.Budget(latency_table=tmp_path / "table.csv"))
        says = "no table of latencies"
    elif refused == "limit":
        settings, says = replace(settings, max_bops="0.0001%"), "cannot be met"
    elif refused == "layer":
        config, says = task(tmp_path / "out", keep_float=("nowhere",)), "Unknown layer"
    else:
        settings, says = replace(settings, storage=f"sqlite:///{tmp_path}/no/such/folder.db"), "does not answer"
    with pytest.raises(JpqError, match=says):
        jpq.study(config, settings)
    assert not (tmp_path / "out" / "study").exists()


def test_a_study_that_is_refused_after_its_float_model_was_trained_says_where_it_is(tmp_path):
    url = f"sqlite:///{tmp_path}/theirs.db"
    optuna.create_study(storage=url, study_name="study", directions=["maximize", "minimize"])
    theirs = optuna.load_study(storage=url, study_name="study")
    theirs.add_trial(optuna.create_trial(values=[1.0, 1.0]))
    with pytest.raises(JpqError, match=r"The float model that was trained is kept, for weights: .*float\.safetensors"):
        jpq.study(task(tmp_path / "out"), Study(trials=1, storage=url))
    assert (tmp_path / "out" / "study" / "float.safetensors").is_file()


def test_a_sensitivity_table_of_other_weights_is_refused_once_before_the_trials(tmp_path, weights, formula):
    config = task(tmp_path / "out", weights, method="measured", sensitivity=tmp_path / "table.csv")
    data = read_data(config, torch.device("cpu"))
    table = SensitivityTable({}, {}, {}, "single", "0" * 16, "0" * 16, 16)
    network = trace(load_dense_model(config, data, torch.device("cpu")), data.example)
    write_table(tmp_path / "table.csv", table, network)
    with pytest.raises(JpqError, match="with other weights"):
        jpq.study(config, Study(vary="target", trials=3))
    assert formula == []


def test_other_settings_under_the_same_name_are_refused(tmp_path, weights, formula):
    config = task(tmp_path, weights)
    jpq.study(config, Study(trials=1))
    with pytest.raises(JpqError, match="Study 'study' was begun with epochs=2, and here it is 3"):
        jpq.study(replace(config, train=replace(QUICK, epochs=3)), Study(trials=2))
    with pytest.raises(JpqError, match="was begun with sampler tpe, and here it is gp"):
        jpq.study(config, Study(trials=2, sampler="gp"))
    other = tmp_path / "other.safetensors"
    prepare_float_weights(
        replace(config, task=Task(limit=300), train=replace(QUICK, float_epochs=2)),
        other,
        one_trial.NullStudyObserver(),
    )
    with pytest.raises(JpqError, match="was begun with other float weights"):
        jpq.study(task(tmp_path, other), Study(trials=2))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--sampler nsga", "Unknown sampler 'nsga'. Did you mean nsga2"),
        ("--objectives accuracy", "--objectives accuracy: give accuracy and at least one cost"),
        ("--objectives accuracy,bobs", "Did you mean bops"),
        ("--vary density,bit", "Unknown name in --vary 'bit'. Did you mean bits"),
        ("--per bloc", "Did you mean block"),
        ("--max-bops lots", "--max-bops 'lots' is not an amount"),
        ("--max-bops 1", "--max-bops 1 cannot be met"),
        ("--target-bops 1%", "Give --max-bops 1%, or --vary target,method"),
        ("--method l0", "Leave --method out, or --vary target"),
        ("--bits 4/4", "Leave one of them out"),
        ("--vary method", "No target: give --target-bops"),
        ("--vary target,method --methods djqp", "Unknown method 'djqp'. Did you mean djpq"),
        ("--vary target --bops-range 4% 1%", "give a smaller and a larger share"),
        ("--methods djpq", "trials do not vary it. Add method to --vary, or leave --methods out"),
        ("--bops-range 1% 2%", "Add target to --vary, or leave --bops-range out"),
        ("--vary bits --density-range 0.5 1", "Add density to --vary, or leave --density-range out"),
        ("--lr-range 1 inf", "give two factors"),
        ("--density-range 0.3 0.33", "multiples of 0.05"),
        ("--objectives accuracy,latency", "needs measured layers"),
        ("--name a/b", "cannot be a folder's name"),
        ("--target-bops 4%,2% --vary bits", "Give --max-bops 4%, or"),
        ("--target-bops 4%,2% --vary target", "targets vary (--vary target). Leave one out"),
        ("--target-bops 4%,2% --vary method", "Give one, such as --target-bops 4%, or --vary target"),
        ("--target-size 60KB,30KB --vary method", "Give one, such as --target-size 60KB, or"),
        ("--vary target,method --methods ,", "--methods names nothing. Give djpq,l0"),
        ("--vary target,structure --structures channels,elementwize", "Did you mean elementwise"),
        ("--resume", "A study goes on by itself: leave --resume out."),
        ("--trials 0", "--trials 0: at least 1 is needed"),
        ("--storage nowhere", "is not the address of a database"),
        ("--storage sqlite:////nowhere/at/all.db", "does not answer: unable to open database file"),
        ("--storage postgresql+psycopg2://me:secret@host/db", "python -m pip install 'jpq[postgres]'"),
        pytest.param(
            "--storage postgresql+psycopg://me:secret@127.0.0.1:1/db", "does not answer", marks=pytest.mark.slow
        ),
    ],
)
def test_bad_input_ends_in_one_sentence(tmp_path, weights, capsys, flags, sentence):
    given = f"study --limit 300 --epochs 2 --weights {weights} --out {tmp_path} --trials 1 {flags}"
    assert main(given.split()) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "secret" not in said


def test_a_study_goes_on_from_its_file(tmp_path, weights, formula, capsys):
    flags = f"study --limit 300 --epochs 2 --weights {weights} --out {tmp_path} --per network --density-range 0.5 1"
    assert main([*flags.split(), "--trials", "3"]) == 0
    assert main(["study", "--config", str(tmp_path / "study" / "study.toml"), "--trials", "5"]) == 0
    assert len(formula) == 5
    said = capsys.readouterr().out
    assert "5/5 done" in said
    assert "held-out accuracy (%)" in said
    assert main(["optimize", "--config", str(tmp_path / "study" / "study.toml")]) == 2
    assert "is the file of a study. Go on with it by jpq study --config" in capsys.readouterr().err
    (tmp_path / "study" / "study.toml").write_text("[study]\nsamplr = 'tpe'\n")
    assert main(["study", "--config", str(tmp_path / "study" / "study.toml")]) == 2
    assert "Did you mean sampler" in capsys.readouterr().err


@pytest.mark.parametrize("storage", [pytest.param("", marks=pytest.mark.slow), "sqlite:///study.db"])
def test_a_study_goes_on_from_another_folder(tmp_path, weights, formula, monkeypatch, storage):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    (here / "w.safetensors").write_bytes(weights.read_bytes())
    flags = f"study --limit 300 --epochs 2 --weights {Path('w.safetensors')} --out runs --per network --trials 2"
    assert main([*flags.split(), *(["--storage", storage] if storage else [])]) == 0
    monkeypatch.chdir(there)
    assert main(["study", "--config", str(here / "runs" / "study" / "study.toml"), "--trials", "3"]) == 0
    assert len(formula) == 3
    assert not [*there.iterdir()]
    assert len({config.task.weights for config in formula}) == 1, "the run's folder depends on it"


def test_files_of_a_study_are_found_and_compared_from_every_folder(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "photos").mkdir(parents=True)
    there.mkdir()
    monkeypatch.chdir(here)
    for name in ("table.csv", "mask.json"):
        Path(name).write_text(name, encoding="utf-8")
    decide = jpq.config.Decide(method="measured", sensitivity=Path("table.csv"), mask=Path("mask.json"))
    config = Config(task=Task(data="folder:photos"), decide=decide)
    shared = optuna.create_study()
    shared.set_user_attr(study_settings.WEIGHTS, "w")
    study_settings.record_settings(config, Study(), shared)
    study_settings.write_study(config, Study(), here / "study.toml")
    monkeypatch.chdir(there)
    again, _ = study_settings.read_study(here / "study.toml")
    assert again.task.data == f"folder:{here / 'photos'}"
    assert (again.decide.sensitivity, again.decide.mask) == (here / "table.csv", here / "mask.json")
    study_settings.check_agreement(again, Study(), "w", shared)
    Path("table.csv").write_text("another", encoding="utf-8")
    other_table = replace(again, decide=replace(again.decide, sensitivity=Path("table.csv")))
    other_data = replace(again, task=replace(again.task, data="folder:elsewhere"))
    for other, flag in ((other_table, "sensitivity"), (other_data, "data folder:photos")):
        with pytest.raises(JpqError, match=flag):
            study_settings.check_agreement(other, Study(), "w", shared)
    recorded = shared.user_attrs[study_settings.SETTINGS]  # as earlier versions did: paths as they were spelled
    del recorded["task"]["data_path"]
    recorded["decide"] |= {"sensitivity": "table.csv", "mask": "mask.json"}
    shared.set_user_attr(study_settings.SETTINGS, recorded)
    monkeypatch.chdir(here)
    study_settings.check_agreement(config, Study(), "w", shared)


def test_names_to_choose_from_are_read_once_and_without_spaces():
    study = Study(methods=" djpq, l0,,djpq ", structures="2:4,")
    assert study.choices("methods") == ("djpq", "l0")
    assert study.choices("structures") == ("2:4",)


def test_passwords_are_not_kept():
    url = "postgresql+psycopg://me:se/cr:et@host:5432/db"
    assert "cr" not in without_password(url)
    assert "secret" not in without_password("postgresql+psycopg://host/db?user=me&password=secret")
    saved = stored_url("postgresql+psycopg://me:secret@host:5432/db?password=secret&sslmode=require")
    assert saved == "postgresql+psycopg://me@host:5432/db?sslmode=require"
    assert stored_url("") == ""
    assert without_password("sqlite:///a.db") == "sqlite:///a.db"
