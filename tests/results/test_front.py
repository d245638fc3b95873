"""Folders and studies become a front: every run once, foreign ones named, and one point picked with its reasons."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from made_runs import FULL, SPREAD, folder, spread

import jpq
from jpq.results.front.front import (
    build_front,
    float_accuracy,
    hypervolume_by_method,
    missing_cost_messages,
    write_table,
)
from jpq.results.front.pareto import hypervolume_of
from jpq.results.front.plots import draw_decisions
from jpq.results.front.points import LayerDecision, from_attributes, read_point, read_points
from jpq.results.front.select import parse_limits, pick_point
from jpq.tasks import TASKS
from jpq.types import JpqError


def test_a_row_per_run_with_every_decision(tmp_path: Path) -> None:
    made = folder(tmp_path, 0.9, 0.01, final=True, packed={"total": 777}, seed=3)
    (row,) = jpq.front(tmp_path).to_dict("records")
    assert row["name"] == made.name
    assert row["folder"] == str(made)
    assert (row["accuracy"], row["test_accuracy"], row["float_accuracy"]) == (0.9, pytest.approx(0.89), 0.98)
    assert (row["bops"], row["bops_share"], row["macs"]) == (FULL // 100, 0.01, 40_000)
    assert (row["size_bytes"], row["packed_bytes"]) == (7500, 777)
    assert (row["method"], row["structure"], row["target"]) == ("djpq", "channels", "bops 1%")
    assert (row["lr"], row["seed"], row["epochs"]) == (2e-3, 3, 40)
    layers = pd.read_csv(made / "layers.csv")
    for _, layer in layers.iterrows():
        assert row[f"{layer['name']}: w_bits"] == layer.w_bits
        assert row[f"{layer['name']}: a_bits"] == layer.a_bits
        share = layer.inputs / layer.inputs_all * layer.outputs / layer.outputs_all
        assert row[f"{layer['name']}: density"] == pytest.approx(share)


def test_runs_of_one_name_are_called_by_their_paths(tmp_path: Path) -> None:
    """As runs of two accuracy targets of one name are."""
    for place, model in (("a", "convnet"), ("b", "resnet20"), ("c", "convnet")):
        made = folder(tmp_path / place, 0.9 if place == "a" else 0.8, 0.01, model=model)
        made.rename(tmp_path / place / "bops-1pct")
    a, b, c = (tmp_path / place for place in "abc")
    with pytest.raises(JpqError) as error:
        read_points([a, b])
    assert str(error.value) == (
        f"Runs of one front share model and data: {a}/bops-1pct has model convnet, {b}/bops-1pct has resnet20. Name "
        "the folders of one task."
    )
    assert [point.name for point in read_points([a, c]).points] == [f"{place}/bops-1pct" for place in (a, c)]
    assert [point.name for point in read_points([a, a]).points] == ["bops-1pct"]


def test_the_front_comes_first_from_the_cheapest_on(tmp_path: Path) -> None:
    made = spread(tmp_path)
    table = jpq.front(tmp_path)
    assert list(table.front) == [True] * 4 + [False]
    assert list(table.number[:4]) == [1, 2, 3, 4]
    assert pd.isna(table.number[4])
    assert list(table.accuracy) == [0.80, 0.95, 0.96, 0.97, 0.955]
    assert table.attrs["knee"] == table.name[1]
    assert table.attrs["float"]["bops"] == FULL
    assert table.attrs["hypervolume"] == hypervolume_of(*zip(*SPREAD, strict=True)) == made.hypervolume
    write_table(made, tmp_path)
    again = pd.read_csv(tmp_path / "pareto.csv", dtype={"name": str})
    assert list(again.name) == list(table.name)
    assert list(again.front) == list(table.front)


def test_chance_is_that_of_the_plans_classes(tmp_path: Path) -> None:
    made = folder(tmp_path, 0.9, 0.01)
    (made / "plan.json").write_text(json.dumps({"model": {"classes": 10}}))
    assert jpq.front(made).attrs["hypervolume"] == pytest.approx(0.8 * 2)


def test_another_cost_and_two_of_them(tmp_path: Path) -> None:
    points = spread(tmp_path).points
    cheap = min(points, key=lambda p: p.accuracy)
    odd = replace(cheap, name="odd", accuracy=0.81, costs={**cheap.costs, "size": 10.0, "bops": 9e7})
    assert odd not in build_front([*points, odd]).front_points
    assert odd in build_front([*points, odd], ["size"]).front_points
    assert odd in build_front([*points, odd], ["bops", "size"]).front_points
    with pytest.raises(JpqError, match="Did you mean bops"):
        build_front(points, ["bop"])
    with pytest.raises(JpqError, match="one or two costs"):
        build_front(points, ["bops", "size", "macs"])
    with pytest.raises(JpqError, match="latency_table"):
        build_front(points, ["latency"])


def test_bops_are_counted_alike_whatever_cost_a_run_was_steered_by(tmp_path: Path) -> None:
    made = folder(tmp_path, 0.9, 0.05, cost="bops-structured")
    layers = pd.read_csv(made / "layers.csv")
    assert read_point(made).costs["bops"] == int((layers.macs * layers.w_bits * layers.a_bits).sum())
    assert read_point(made).costs["bops-structured"] == 0.05 * FULL


def test_runs_count_once_wherever_they_are_found(tmp_path: Path) -> None:
    first, other = folder(tmp_path / "a", 0.9, 0.01), folder(tmp_path / "b" / "trials", 0.8, 0.005)
    shutil.copytree(first, tmp_path / "copy")
    found = read_points([tmp_path, first, tmp_path / "a", tmp_path / "b"])
    assert sorted(p.accuracy for p in found.points) == [0.8, 0.9]
    tree = json.loads((other / "result.json").read_text())
    tree["compressed"]["accuracy"], tree["final"] = 0.79, True
    exported = shutil.copytree(other, tmp_path / "c" / "final")
    (exported / "result.json").write_text(json.dumps(tree))
    (kept,) = (p for p in read_points(tmp_path).points if p.accuracy == 0.8)
    assert kept.test_accuracy == 0.79  # of a trial and its export the export counts


def test_runs_of_several_budgets_have_names_that_tell_them_apart(tmp_path: Path) -> None:
    top = tmp_path / "0123456789ab"
    for accuracy, share in ((0.9, 0.01), (0.8, 0.005)):
        folder(top, accuracy, share).rename(top / f"bops-{100 * share:g}pct")
    shutil.copyfile(top / "bops-1pct" / "config.toml", top / "config.toml")
    found = read_points(tmp_path)
    assert {p.name for p in found.points} == {"0123456789ab/bops-1pct", "0123456789ab/bops-0.5pct"}
    assert found.skipped == ()


def test_hypervolumes_of_each_method_alone(tmp_path: Path) -> None:
    made = spread(tmp_path)
    folder(tmp_path, 0.9, 0.01, method="uniform")
    both = build_front(read_points(tmp_path).points)
    alone = hypervolume_by_method(both)
    assert list(alone.items()) == [("djpq", (made.hypervolume, 5)), ("uniform", (pytest.approx(1.8), 1))]
    assert both.hypervolume == made.hypervolume  # it is dominated


def test_the_knee_is_on_the_front_of_two_costs(tmp_path: Path) -> None:
    points = spread(tmp_path).points
    bend = next(p for p in points if p.accuracy == 0.95)
    twin = replace(bend, name="larger", costs={**bend.costs, "size": 2 * bend.costs["size"]})
    made = build_front([twin, *points], ["bops", "size"])
    assert made.knee is not None
    assert made.number(made.knee) == 2
    assert made.points[made.knee] is bend


def test_latencies_of_several_tables_are_not_compared(tmp_path: Path) -> None:
    one, two, *_ = spread(tmp_path).points
    timed = [
        replace(p, costs={**p.costs, "latency": 1e6}, full_costs={**p.full_costs, "latency": ms})
        for p, ms in ((one, 3e6), (two, 4e6))
    ]
    with pytest.raises(JpqError, match=r"different tables of latencies .* 3.00 and 4.00 ms"):
        build_front(timed, ["latency"])
    with pytest.raises(JpqError, match="different tables"):
        pick_point(build_front(timed), parse_limits({"max_latency": "2ms"}, timed[0].full_costs))
    assert len(build_front([timed[0], two], ["latency"]).points) == 1
    assert missing_cost_messages([timed[0], two], ["latency"]) == [
        f"{two.name}: it does not say what it costs in latency."
    ]


def damage(made: Path, how: str) -> None:
    if how == "unfinished":
        (made / "result.json").unlink()
    elif how == "half a file":
        (made / "result.json").write_text((made / "result.json").read_text()[:200])
    elif how == "binary":
        (made / "result.json").write_bytes(b"\xff\xfe\x00")
    elif how == "nested":
        (made / "result.json").write_text("[" * 100_000)
    elif how == "no settings":
        (made / "config.toml").unlink()
    elif how == "no layers":
        (made / "layers.csv").unlink()
    elif how == "no MACs":
        text = (made / "layers.csv").read_text().splitlines()
        (made / "layers.csv").write_text("\n".join([text[0], text[1] + "0"]))
    elif how == "foreign":
        (made / "result.json").write_text('{"score": 3}')
    else:
        tree = json.loads((made / "result.json").read_text())
        side, key, value = {
            "text": ("compressed", "bops", "many"),
            "nan": ("held_out", "compressed", float("nan")),
            "nothing": ("compressed", "bops", 0),
            "above 1": ("held_out", "compressed", 93.5),
        }[how]
        tree[side][key] = value
        (made / "result.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("unfinished", "not ended"),
        ("half a file", "not JSON that jpq wrote"),
        ("binary", "is no text"),
        ("nested", "nests deeper"),
        ("no settings", "config.toml"),
        ("no layers", "layers.csv"),
        ("no MACs", "ZeroDivisionError"),
        ("foreign", "'compressed'"),
        ("text", "many"),
        ("nan", "NaN is not a finite number"),
        ("nothing", "BOPs of 0"),
        ("above 1", "93.5"),
    ],
)
def test_damaged_folders_are_named_and_left_out(how: str, words: str, tmp_path: Path) -> None:
    folder(tmp_path, 0.9, 0.01)
    broken = folder(tmp_path / "broken", 0.8, 0.005)
    damage(broken, how)
    with pytest.warns(UserWarning, match="Left out") as warned:
        table = jpq.front(tmp_path)
    assert len(table) == 1
    assert str(broken) in str(warned[0].message)
    assert words in str(warned[0].message)
    with pytest.raises(JpqError, match="No finished run") as error:
        read_points(tmp_path / "broken")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere", "nowhere is not there"),
        ("file", "file is a file"),
        ([], "nothing"),
        (3, "not of a int"),
        ("empty", "No finished run was found in empty"),
    ],
)
def test_sources_that_hold_no_runs(source: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(JpqError, match=words):
        jpq.front(source)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "resnet20"}, "model convnet.* resnet20"),
        ({"data": {"name": "mnist"}}, "digits.* mnist"),
        ({"full": FULL // 2}, "100,000,000 BOPs.* 50,000,000"),
    ],
)
def test_runs_of_other_tasks_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder(tmp_path / "a", 0.9, 0.01)
    folder(tmp_path / "b", 0.8, 0.005, **changes)
    with pytest.raises(JpqError, match=words):
        jpq.front(tmp_path)


NOTES = {
    "held_out": 0.9,
    "bops": 1_000_000,
    "bops_share": 0.01,
    "macs": 40_000,
    "size_bytes": 7500,
    "method": "djpq",
    "layers": {"conv1": "W4 A3, 24/32 channels", "fc": "W2 A8, density 0.50 (2:4)"},
}


def study(tmp_path: Path) -> optuna.Study:
    """Three finished trials, of which one has a folder and one repeats another, and two that count for nothing."""
    made = optuna.create_study(directions=["maximize", "minimize"], study_name="digits")
    made.set_user_attr("accuracy of guessing", 0.1)
    made.set_user_attr("settings", {"task": {"model": "convnet", "data": "digits"}})
    real = folder(tmp_path / "trials", 0.8, 0.005)
    width = optuna.distributions.IntDistribution(2, 8)
    notes = [
        {**NOTES, "run_folder": "trials/gone"},
        {"run_folder": f"trials/{real.name}"},
        {**NOTES, "run_folder": "trials/gone"},
        {"held_out": 0.5},
    ]
    for attributes in notes:
        made.add_trial(
            optuna.create_trial(
                values=[90.0, 1.0], params={"bits": 4}, distributions={"bits": width}, user_attrs=attributes
            )
        )
    made.add_trial(optuna.create_trial(state=optuna.trial.TrialState.PRUNED, user_attrs=NOTES))
    return made


def test_an_optuna_study_by_what_its_trials_noted(tmp_path: Path) -> None:
    made = study(tmp_path)
    with pytest.warns(UserWarning, match="trial 3 of digits: neither its folder nor its attribute"):
        table = jpq.front(made, folder=tmp_path).set_index("name")
    assert list(table.index) == ["trial 1", "trial 0"]
    assert list(table.params_bits) == [4, 4]
    assert list(table.bops_share) == [0.005, 0.01]
    assert table.loc["trial 0", ["conv1: w_bits", "conv1: a_bits", "conv1: density"]].tolist() == [4, 3, 0.75]
    assert table.loc["trial 0", ["fc: w_bits", "fc: a_bits", "fc: density"]].tolist() == [2, 8, 0.5]
    assert table.front.all()
    with pytest.warns(UserWarning, match="trial 1"):
        alone = jpq.front(made)
    assert list(alone.name) == ["trial 0"]
    assert (alone.model[0], alone.data[0]) == ("convnet", "digits")
    assert alone.attrs["hypervolume"] == pytest.approx(1.6)


def test_what_a_trial_noted_of_a_layer_keeps_both_its_channels_and_its_mask() -> None:
    point = from_attributes("t", {}, {**NOTES, "layers": {"a": "W4 A3, 24/32 channels, density 0.50 (2:4)"}}, {})
    assert point.layers == (LayerDecision("a", 4, 3, 0.375),)
    assert point.full_costs == {"bops": 100_000_000.0}
    assert point.share("bops") == 0.01


def test_the_float_models_metric_is_the_mean_of_those_that_are_known(tmp_path: Path) -> None:
    front = spread(tmp_path)
    points = [replace(p, float_accuracy=a) for p, a in zip(front.points, (0.9, None, 0.8, None, 0.94), strict=True)]
    assert float_accuracy(build_front(points)) == pytest.approx(0.88)
    assert float_accuracy(build_front([replace(p, float_accuracy=None) for p in points])) is None


def test_a_front_counts_from_the_highest_level_of_guessing_and_methods_come_by_size(tmp_path: Path) -> None:
    front = spread(tmp_path)
    points = [
        replace(p, chance=c, decisions={"method": m})
        for p, c, m in zip(front.points, (0.0, 0.1, 0.0, 0.0, 0.0), "abcba", strict=True)
    ]
    alone = hypervolume_by_method(build_front(points))
    volumes = [volume for volume, _ in alone.values()]
    assert volumes == sorted(volumes, reverse=True)
    assert {method: n for method, (_, n) in alone.items()} == {"a": 2, "b": 2, "c": 1}
    assert build_front(points).hypervolume == hypervolume_of(
        [p.accuracy for p in points], [p.share("bops") for p in points], chance=0.1
    )


def test_costs_that_trials_did_not_note_need_their_folders(tmp_path: Path) -> None:
    made = study(tmp_path)
    with pytest.raises(JpqError, match="No run says what it costs in size"):
        jpq.front(made, ["size"])
    with pytest.warns(UserWarning, match="trial 3"):
        assert len(jpq.front(made, ["size"], folder=tmp_path)) == 2


@pytest.mark.parametrize(
    ("asked", "accuracy", "words"),
    [
        ({"min_accuracy": "94%"}, 0.95, ["4 of 5 runs", "least BOPs of these 4", "dearer"]),
        ({"min_accuracy": "0.965"}, 0.97, ["1 of 5 runs", "only one", "misses --min-accuracy 0.965"]),
        ({"max_bops": "1%"}, 0.96, ["3 of 5 runs", "highest held-out accuracy of these 3", "misses --max-bops 1%"]),
        ({"max_bops": "1.5M"}, 0.96, ["3 of 5"]),
        ({"max_size": "4KB"}, 0.95, ["2 of 5"]),
        ({"max_macs": "50%"}, 0.97, ["5 of 5"]),
        ({"min_accuracy": "94%", "max_bops": "3M"}, 0.95, ["all together: 3"]),
    ],
)
def test_picking_by_limits(asked: dict[str, str], accuracy: float, words: list[str], tmp_path: Path) -> None:
    front = spread(tmp_path)
    choice = pick_point(front, parse_limits(asked, front.points[0].full_costs))
    assert choice.point.accuracy == accuracy
    assert front.points[choice.index] is choice.point
    for word in words:
        assert word in " ".join(choice.why)


def test_of_equally_cheap_points_the_best_and_of_equally_good_ones_the_cheapest_is_picked(tmp_path: Path) -> None:
    first = read_point(folder(tmp_path, 0.9, 0.01))
    points = [
        replace(first, name=name, accuracy=accuracy, costs={**first.costs, "bops": share * FULL})
        for name, accuracy, share in (("a", 0.9, 0.01), ("b", 0.95, 0.01), ("c", 0.95, 0.02))
    ]
    for given in (points, points[::-1]):
        for asked in ({"min_accuracy": "80%"}, {"max_bops": "50%"}):
            assert pick_point(build_front(given), parse_limits(asked, first.full_costs)).point.name == "b"


def test_neighbours_of_the_picked_point_are_the_next_ones_of_the_front(tmp_path: Path) -> None:
    front = spread(tmp_path)
    why = " ".join(pick_point(front, parse_limits({"max_bops": "3%"}, front.points[0].full_costs)).why)
    assert "at 0.20 times the BOPs" in why  # 0.002 beside 0.01, not 0.001
    assert "at 4.00 times the BOPs; it misses" in why  # 0.04: the run at 0.02 is dominated
    why = " ".join(pick_point(front, parse_limits({"min_accuracy": "94%"}, front.points[0].full_costs)).why)
    assert "at 0.50 times the BOPs; it misses" in why
    assert "at 5.00 times the BOPs." in why


@pytest.mark.parametrize(
    ("layers", "uniform"),
    [
        ([(4, 8, 1.0), (4, 4, 1.0), (4, 4, 1.0)], True),  # the image keeps its own bits
        ([(4, 8, 1.0), (4, 4, 0.5), (4, 4, 1.0)], False),
        ([(8, 8, 1.0), (4, 4, 1.0), (4, 4, 1.0)], False),
        ([(4, 8, 1.0), (4, 4, 1.0), (4, 3, 1.0)], False),
        ([(4, 8, 0.5), (4, 4, 1.0), (4, 4, 1.0)], False),
    ],
)
def test_uniform_bits_are_those_of_all_layers_with_nothing_dropped(
    layers: list[tuple[int, int, float]], uniform: bool, tmp_path: Path
) -> None:
    decided = tuple(LayerDecision(f"layer{i}", *layer) for i, layer in enumerate(layers))
    assert replace(read_point(folder(tmp_path, 0.9, 0.01)), layers=decided).is_uniform == uniform


def test_picking_the_knee(tmp_path: Path) -> None:
    front = spread(tmp_path)
    assert pick_point(front, (), knee=True).point.accuracy == 0.95
    with pytest.raises(JpqError, match="no knee"):
        pick_point(front, parse_limits({"max_bops": "0.2%"}, front.points[0].full_costs), knee=True)
    lone = [replace(p, task="restoration", metric=TASKS["restoration"]) for p in front.points[:1]]
    for points, flag in ((front.points[:1], "min_accuracy"), (lone, "min_metric")):
        with pytest.raises(JpqError, match=f"to the best. Choose by {flag} or max_bops.$"):
            pick_point(build_front(points), (), knee=True)


def test_the_float_model_costs_what_any_run_knows(tmp_path: Path) -> None:
    first, *others = spread(tmp_path).points
    timed = [replace(p, full_costs={**p.full_costs, "latency": 8e6}, costs={**p.costs, "latency": 1e6}) for p in others]
    front = build_front([first, *timed])
    assert "latency" not in front.points[0].full_costs
    assert front.full_costs == {**first.full_costs, "latency": 8e6}
    assert parse_limits({"max_latency": "50%"}, front.full_costs)[0].value == 4e6


def test_picking_latency_where_runs_know_it(tmp_path: Path) -> None:
    front = spread(tmp_path)
    timed = build_front([replace(p, costs={**p.costs, "latency": 1e6 * (i + 1)}) for i, p in enumerate(front.points)])
    choice = pick_point(timed, parse_limits({"max_latency": "2ms"}, {}))
    assert choice.point.costs["latency"] <= 2e6
    assert all(p.accuracy <= choice.point.accuracy for p in timed.points if p.costs["latency"] <= 2e6)
    with pytest.raises(JpqError, match="Give an amount, such as 3ms"):
        parse_limits({"max_latency": "50%"}, {})


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"min_accuracy": "99%"}, "the most accurate is .* with 97.00 %"),
        ({"max_bops": "10k"}, r"the least is .* with 100 K BOPs \(0.10 % of fp32\)"),
        (
            {"min_accuracy": "97%", "max_bops": "1%"},
            "with max_bops='1%' the most accurate is .* with 96.00 %; with "
            "min_accuracy='97%' the least is .* with 4.00 M BOPs",
        ),
        ({"min_accuracy": "99%", "max_size": "1KB"}, "the most accurate of all is .* the least of all is"),
        ({"max_latency": "3ms"}, "no run knows its predicted latency"),
        ({"min_accuracy": "91"}, "Write it like 91% or 0.91"),
        ({"min_accuracy": "good"}, "Write it like 91% or 0.91"),
        ({"max_size": "60%B"}, "max_size '60%B' is not an amount. Write it like 50KB"),
        ({"max_bops": "0"}, "max_bops=0 allows nothing"),
    ],
)
def test_what_nothing_meets_is_one_sentence_with_the_nearest(asked: dict[str, str], words: str, tmp_path: Path) -> None:
    front = spread(tmp_path)
    with pytest.raises(JpqError, match=words):
        pick_point(front, parse_limits(asked, front.points[0].full_costs))


def test_decisions_are_drawn_where_a_run_knows_other_layers(tmp_path: Path) -> None:
    made = spread(tmp_path)
    points, dearest = list(made.points), made.front_indices[-1]
    points[dearest] = replace(points[dearest], layers=points[dearest].layers[1:])
    assert draw_decisions(replace(made, points=tuple(points))) is not None
