"""Finished runs as points of a front, read from folders of runs and studies or from an Optuna study."""

from __future__ import annotations

import csv
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jpq.config import Config
from jpq.config import read_toml as read_config
from jpq.costs.latency import NS
from jpq.files import untrusted
from jpq.files.paths import find_run
from jpq.tasks import CLASSIFICATION, recorded_task
from jpq.tasks.base import Task
from jpq.types import JpqError

RESULT_FILE = "result.json"

MAX_BYTES = 2**26  # largest size of a result.json; usual ones have some thousand bytes


@dataclass(frozen=True)
class RunCollection:
    """Runs of one task, and messages about those that cannot be read."""

    points: tuple[RunPoint, ...]
    skipped: tuple[str, ...]  # messages about runs that cannot be read, a sentence each


def read_points(source: Any, folder: Path | str | None = None) -> RunCollection:
    """The runs in one or several folders (of a run, of a study, or of several), or in an Optuna study.

    Args:
        source: a folder, several folders, or an Optuna study.
        folder: of an Optuna study; without it the trials have what they recorded in the study.

    A run that is found twice, or was copied, is counted once. Raises JpqError where a folder is not there, nothing
    can be read, or runs are not of the same model and data.
    """
    points: list[RunPoint] = []
    skipped: list[str] = []
    for part in _as_list(source):
        for point in _read_trials(part, folder) if hasattr(part, "trials") else _read_folders(find_run(part)):
            if isinstance(point, RunPoint):
                points.append(point)
            else:
                skipped.append(point)
    if not points:
        reason = f" {skipped[0]}" if skipped else ""
        more = f" ({len(skipped) - 1} more were passed over.)" if len(skipped) > 1 else ""
        raise JpqError(f"No finished run was found in {_source_name(source)}.{reason}{more}")
    distinct = _with_distinct_names(_without_copies(points))
    check_one_task(distinct)
    return RunCollection(distinct, tuple(dict.fromkeys(skipped)))


def _as_list(source: Any) -> list[Any]:
    """The folders or studies of a source."""
    is_single = isinstance(source, (str, os.PathLike)) or hasattr(source, "trials")
    if not is_single and not isinstance(source, Iterable):
        raise JpqError(f"A front is made of folders of runs or of an Optuna study, not of a {type(source).__name__}.")
    return [source] if is_single else list(source)


def _source_name(source: Any) -> str:
    return ", ".join(str(getattr(part, "study_name", part)) for part in _as_list(source)) or "nothing"


def check_one_task(points: Sequence[RunPoint]) -> None:
    """Raises JpqError where runs are of several models or data sets, so that they cannot be compared."""
    reference = points[0]
    for point in points[1:]:
        for name in ("model", "data"):
            value, other_value = getattr(reference, name), getattr(point, name)
            if value != other_value:
                raise JpqError(
                    f"Runs of one front share model and data: {reference.name} has {name} {value}, {point.name} has "
                    f"{other_value}. Name the folders of one task."
                )
        if not math.isclose(reference.full_costs["bops"], point.full_costs["bops"], rel_tol=1e-6):
            raise JpqError(
                f"Runs of one front share model and data: the fp32 model of {reference.name} costs "
                f"{reference.full_costs['bops']:,.0f} BOPs, that of {point.name} {point.full_costs['bops']:,.0f}."
            )


def _without_copies(points: Sequence[RunPoint]) -> tuple[RunPoint, ...]:
    """The points without duplicates: of a trial and its export only the export."""
    kept: dict[Any, RunPoint] = {}
    for point in points:
        mark = point.decisions.get("settings") or (point.folder or point.name)
        key = (mark, point.accuracy, point.costs["bops"], point.costs["size"])
        before = kept.get(key)
        if before is None or (point.final and not before.final):
            kept[key] = point
    return tuple(kept.values())


def _with_distinct_names(points: Sequence[RunPoint]) -> tuple[RunPoint, ...]:
    """The points, those of one name in several folders called by the paths of these."""
    count = Counter(point.name for point in points)
    return tuple(
        replace(point, name=str(point.folder)) if point.folder is not None and count[point.name] > 1 else point
        for point in points
    )


def _read_folders(path: Path) -> Iterator[RunPoint | str]:
    """Every run in and below a folder; a sentence in place of one that cannot be read."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "is not there"
        raise JpqError(f"{path} {what}: give the folder of a run, of a study, or one that holds several.")
    ended: list[Path] = []
    begun: list[Path] = []
    for place, below, files in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        here = Path(place)
        if RESULT_FILE in files:
            ended.append(here)
        elif "config.toml" in files:
            begun.append(here)
    for here in ended:
        try:
            yield read_point(here)
        except JpqError as error:
            yield f"{here}: {error.command_line}"
    for here in begun:
        if not any(here in end.parents for end in ended):
            yield f"{here}: the run has not ended, there is no {RESULT_FILE}."


def _read_trials(study: Any, folder: Path | str | None = None) -> Iterator[RunPoint | str]:
    """The finished trials of an Optuna study that `jpq study` made; a sentence in place of one that cannot be read."""
    about = dict(getattr(study, "user_attrs", {}))
    title = str(getattr(study, "study_name", "the study"))
    without_folder: list[RunPoint] = []
    known: RunPoint | None = None  # by its folder
    for trial in study.trials:
        if getattr(getattr(trial, "state", None), "name", "COMPLETE") != "COMPLETE":
            continue
        name = f"trial {getattr(trial, 'number', '?')}"
        params = {f"params_{key}": value for key, value in trial.params.items()}
        place = Path(folder or ".") / str(trial.user_attrs.get("run_folder", ""))
        try:
            if (place / RESULT_FILE).is_file():
                known = read_point(place)
                yield replace(known, name=name, decisions={**known.decisions, **params})
            else:
                without_folder.append(from_attributes(name, about, trial.user_attrs, params))
        except JpqError as error:
            yield f"{name} of {title}: {error.command_line}"
    for point in without_folder:  # what the study does not record, another trial's folder may
        yield (
            point
            if known is None
            else replace(
                point,
                **{
                    field: getattr(known, field)
                    for field in ("full_costs", "model", "data", "chance", "task", "uniform")
                },
            )
        )


@dataclass(frozen=True)
class LayerDecision:
    """Bits and density of one layer."""

    name: str
    w_bits: int
    a_bits: int
    density: float  # share of its multiply-accumulates that stay, in [0, 1]


@dataclass(frozen=True)
class RunPoint:
    """One run as a point of a front: metrics, costs and decisions.

    `costs` and `full_costs` (of the fp32 model) go by the names in `jpq.costs.COSTS`, in bit-operations, MACs, bytes
    and nanoseconds. Metrics are in the task's unit; accuracies lie in [0, 1].
    """

    name: str
    folder: Path | None
    accuracy: float  # held-out
    test_accuracy: float | None  # where the run read its test split
    float_accuracy: float | None  # of the float model, held-out
    costs: Mapping[str, float]
    full_costs: Mapping[str, float]
    model: str
    data: str
    chance: float = 0.0  # metric of guessing (1 / classes for accuracy), where the number of classes is known
    packed_bytes: int | None = None
    final: bool = True
    decisions: Mapping[str, Any] = field(default_factory=dict)  # method, target, learning rates, ...
    layers: tuple[LayerDecision, ...] = ()
    uniform: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # "W4A4" -> costs of the whole model
    task: str = CLASSIFICATION.name  # in TASKS, or the user's own; the accuracies are its scores
    metric: Task = CLASSIFICATION  # the task, or what the run recorded of its metric
    held_out_samples: int = 0  # that the held-out metric was measured on; 0: not known

    def share(self, cost: str) -> float:
        """Cost of the model over that of the fp32 model."""
        return self.costs[cost] / self.full_costs[cost]

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same bits and nothing is dropped; the image keeps its own bits."""
        bits = {(layer.w_bits, layer.a_bits) for layer in self.layers[1:]}
        unpruned = all(layer.density == 1 for layer in self.layers)
        return unpruned and len(bits) == 1 and {layer.w_bits for layer in self.layers} == {w for w, _ in bits}


def read_point(folder: Path) -> RunPoint:
    """The run in a folder. Raises JpqError where its files are missing, damaged or foreign."""
    config = read_config(folder / "config.toml")
    try:
        tree = untrusted.parse_json(untrusted.read_text(folder / RESULT_FILE, "result", MAX_BYTES), RESULT_FILE)
        compressed, float_model, held_out = tree["compressed"], tree["float"], tree["held_out"]
        layers = tuple(_layers(folder / "layers.csv"))
        data = tree.get("data") or {}
        task = recorded_task(data)
        point = RunPoint(
            name=_name(folder.resolve()),
            folder=folder,
            accuracy=_metric(task, held_out["compressed"], f"held-out {task.metric_name}"),
            test_accuracy=_maybe(task, compressed["accuracy"]),
            float_accuracy=_maybe(task, held_out.get("float")),
            costs=_costs(compressed, config.budget.cost, layers),
            full_costs=_costs(float_model),
            model=config.task.model,
            data=str(data.get("name", config.task.data)),
            chance=_chance(task, folder / "plan.json"),
            task=task.name,
            metric=task,
            held_out_samples=untrusted.as_int(data.get("held_out", 0), 0, 2**63),
            packed_bytes=untrusted.as_int(tree["packed"]["total"], 0, 2**63) if tree.get("packed") else None,
            final=bool(tree.get("final", True)),
            decisions=decisions(config),
            layers=tuple(layer for layer, _ in layers),
            uniform={
                str(n): {str(k): untrusted.as_float(v) for k, v in c.items()}
                for n, c in tree.get("uniform", {}).items()
            },
        )
    except OSError as error:
        raise JpqError(f"{Path(str(error.filename)).name} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, csv.Error) as error:
        raise JpqError(f"it does not hold the result of a run ({type(error).__name__}: {_short(error)}).") from error
    return point


def _name(folder: Path) -> str:
    """Name of a run: its folder's, with the parent run's name where that had several budgets."""
    return f"{folder.parent.name}/{folder.name}" if (folder.parent / "config.toml").is_file() else folder.name


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _costs(
    model: Mapping[str, Any], cost: str = "bops", layers: Sequence[tuple[LayerDecision, float]] = ()
) -> dict[str, float]:
    """Costs of a recorded model by name in COSTS; plain BOPs come from the layers under --cost bops-structured."""
    bops = sum(b for _, b in layers) if cost != "bops" and layers else model["bops"]
    costs = {
        "bops": _above(bops, "BOPs"),
        "bops-structured": _above(model.get("bops_structured") or model["bops"], "BOPs"),
        "macs": _above(model["macs"], "MACs"),
        "size": _above(model["size_bytes"], "bytes"),
    }
    latency_ms = model.get("latency_ms")
    return costs if latency_ms is None else {**costs, "latency": NS * _above(latency_ms, "latency")}


def _above(value: Any, what: str) -> float:
    number = untrusted.as_float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{what} of {value}")
    return number


def _share(value: Any, what: str) -> float:
    number = untrusted.as_float(value)
    if not 0 <= number <= 1:
        raise ValueError(f"{what} of {value}")
    return number


def _metric(task: Task, value: Any, what: str) -> float:
    number, (low, high) = float(value), task.score_bounds
    if not (low <= number <= high and math.isfinite(number)):
        raise ValueError(f"{what} of {value}")
    return number


def _maybe(task: Task, value: Any) -> float | None:
    return None if value is None or value != value else _metric(task, value, task.metric_name)


def _layers(path: Path) -> Iterator[tuple[LayerDecision, float]]:
    """The decision of each layer, with its bit-operations where zeros of every kind cost nothing."""
    untrusted.check_file(path, "table")
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            w, a, macs = int(row["w_bits"]), int(row["a_bits"]), int(row["macs"])
            if row.get("macs_all"):
                density = macs / float(row["macs_all"])
            else:  # of a version without that column
                i, i_all, o, o_all = (int(row[k]) for k in ("inputs", "inputs_all", "outputs", "outputs_all"))
                density = i / i_all * o / o_all * float(row["density"])
            yield LayerDecision(row["name"], w, a, _share(density, "density")), float(w * a * macs)


def _chance(task: Task, path: Path) -> float:
    """Score of guessing, from the plan's number of classes; 0 where there is no plan."""
    try:
        classes = int(untrusted.parse_json(untrusted.read_text(path), RESULT_FILE)["model"]["classes"])
        return task.score(task.chance(classes))
    except (JpqError, ValueError, KeyError, TypeError):
        return 0.0


def decisions(config: Config) -> dict[str, Any]:
    """The settings of a run that a front shows: method, structure, targets, learning rates, seed, epochs ..."""
    d, t, b = config.decide, config.train, config.budget
    targets = {"bops": b.target_bops, "macs": b.target_macs, "size": b.target_size, "latency": b.target_latency}
    return {
        "method": d.method,
        "structure": d.structure or _own_structure(d.method) or None,
        "target": ", ".join(f"{name} {text}" for name, text in targets.items() if text is not None),
        "cost": b.cost,
        "width": d.width or None,
        "w_bits": "{} to {}".format(*d.w_bits),
        "a_bits": "{} to {}".format(*d.a_bits),
        "density": d.density,
        "score": d.score or None,
        "schedule": d.schedule or None,
        "allocator": d.allocator or None,
        "lr": t.lr,
        "gate_lr": d.gate_lr,
        "bit_lr": d.bit_lr,
        "gate_weight": d.gate_weight,
        "distill": t.distill,
        "epochs": t.epochs,
        "search": t.search,
        "seed": config.run.seed,
        "settings": config.hash(),
    }


def _own_structure(method: str) -> str:
    from jpq.methods.table import METHODS

    row = METHODS.get(method)
    return row.structure if row is not None and row.gate is not None else ""


def from_attributes(
    name: str, study_attributes: Mapping[str, Any], attributes: Mapping[str, Any], params: Mapping[str, Any]
) -> RunPoint:
    """The point of a trial without its folder, from its user attributes. Raises JpqError where that is not enough.

    Args:
        name: of the point.
        study_attributes: of the study, which hold the task's settings.
        attributes: of the trial (`held_out`, `bops`, `bops_share`, `macs`, `size_bytes`, `latency_ms`, `layers`).
        params: the sampler's choices.
    """
    try:
        task, settings = recorded_task(study_attributes), study_attributes.get("settings", {}).get("task", {})
        bops, share = _above(attributes["bops"], "BOPs"), _above(attributes["bops_share"], "share of BOPs")
        latency = {"latency": NS * _above(attributes["latency_ms"], "latency")} if attributes.get("latency_ms") else {}
        place = str(attributes.get("run_folder", ""))
        return RunPoint(
            name=name,
            folder=None,
            accuracy=_metric(task, attributes["held_out"], f"held-out {task.metric_name}"),
            test_accuracy=None,
            float_accuracy=None,
            costs={"bops": bops, "macs": float(attributes["macs"]), "size": float(attributes["size_bytes"]), **latency},
            full_costs={"bops": float(round(bops / share))},
            model=str(settings.get("model", "")),
            data=str(settings.get("data", "")),
            chance=_metric(task, study_attributes.get("accuracy of guessing", 0.0), f"{task.metric_name} of guessing"),
            task=task.name,
            metric=task,
            final=False,
            decisions={"method": attributes.get("method"), "settings": place.rpartition("/")[2] or None, **params},
            layers=tuple(_parse_layer(layer, str(text)) for layer, text in attributes.get("layers", {}).items()),
        )
    except KeyError as error:
        raise JpqError(f"neither its folder nor its attribute {error} is at hand.") from error
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise JpqError(f"its attributes are not those of a trial of jpq study ({_short(error)}).") from error


def _parse_layer(name: str, text: str) -> LayerDecision:
    """Parse a layer's decision from `jpq study`'s text, such as "W4 A3, 24/32 channels, density 0.50 (2:4)"."""
    bits = re.match(r"W(\d+) A(\d+)", text)
    if bits is None:
        raise ValueError(f"layer {name}: {text}")
    kept = re.search(r"(\d+)/(\d+) channels", text)
    mask = re.search(r"density ([0-9.]+)", text)
    density = (int(kept[1]) / int(kept[2]) if kept else 1.0) * (float(mask[1]) if mask else 1.0)
    return LayerDecision(name, int(bits[1]), int(bits[2]), _share(density, "density"))
