"""One finished run as a point: how good, how dear, and what was decided, from its folder or a trial's attributes."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jpq import foreign
from jpq.config import Config
from jpq.costs.latency import NS
from jpq.settings import read as read_config
from jpq.types import JpqError

FILE = "result.json"
BYTES = 2**26  # of a result.json; ours have some thousand


@dataclass(frozen=True)
class Layer:
    """What was decided for one layer."""

    name: str
    w_bits: int
    a_bits: int
    density: float  # share of its multiply-accumulates that stay, in [0, 1]


@dataclass(frozen=True)
class Point:
    """One run: how good and how dear its model is, and what was decided.

    `costs` and `full` (of the fp32 model) go by the names in `jpq.costs.COSTS`, in bit-operations, MACs, bytes and
    nanoseconds. Accuracies lie in [0, 1].
    """

    name: str
    folder: Path | None
    accuracy: float  # held-out
    test_accuracy: float | None  # where the run read its test split
    float_accuracy: float | None  # of the model that it began with, held-out
    costs: Mapping[str, float]
    full: Mapping[str, float]
    model: str
    data: str
    chance: float = 0.0  # accuracy of guessing: 1 / classes, where the number of classes is known
    packed_bytes: int | None = None
    final: bool = True
    decisions: Mapping[str, Any] = field(default_factory=dict)  # method, target, learning rates, ...
    layers: tuple[Layer, ...] = ()
    uniform: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # "W4A4" -> costs of the whole model

    def share(self, cost: str) -> float:
        """Its cost over the fp32 model's."""
        return self.costs[cost] / self.full[cost]

    @property
    def even(self) -> bool:
        """Whether it has the same bits everywhere and nothing dropped; what reads the image keeps its own width."""
        bits = {(layer.w_bits, layer.a_bits) for layer in self.layers[1:]}
        whole = all(layer.density == 1 for layer in self.layers)
        return whole and len(bits) == 1 and {layer.w_bits for layer in self.layers} == {w for w, _ in bits}


def point_of(folder: Path) -> Point:
    """The run in a folder. Raises JpqError where its files are missing, damaged or of something else."""
    config = read_config(folder / "config.toml")
    try:
        tree = foreign.tree_of(foreign.text_of(folder / FILE, "result", BYTES), FILE)
        now, full, held = tree["compressed"], tree["float"], tree["held_out"]
        layers = tuple(_layers(folder / "layers.csv"))
        data = tree.get("data") or {}
        point = Point(
            name=_name(folder.resolve()),
            folder=folder,
            accuracy=_share(held["compressed"], "held-out accuracy"),
            test_accuracy=_maybe(now["accuracy"]),
            float_accuracy=_maybe(held.get("float")),
            costs=_costs(now, config.budget.cost, layers),
            full=_costs(full),
            model=config.task.model,
            data=str(data.get("name", config.task.data)),
            chance=_chance(folder / "plan.json"),
            packed_bytes=int(tree["packed"]["total"]) if tree.get("packed") else None,
            final=bool(tree.get("final", True)),
            decisions=decisions(config),
            layers=tuple(layer for layer, _ in layers),
            uniform={str(n): {str(k): float(v) for k, v in c.items()} for n, c in tree.get("uniform", {}).items()},
        )
    except OSError as error:
        raise JpqError(f"{Path(str(error.filename)).name} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, csv.Error) as error:
        raise JpqError(f"it does not hold the result of a run ({type(error).__name__}: {_short(error)}).") from error
    return point


def _name(folder: Path) -> str:
    """The folder's; with that of the run around it, where that followed several budgets down."""
    return f"{folder.parent.name}/{folder.name}" if (folder.parent / "config.toml").is_file() else folder.name


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _costs(
    now: Mapping[str, Any], cost: str = "bops", layers: Sequence[tuple[Layer, float]] = ()
) -> dict[str, float]:  # fmt: skip
    """By name in COSTS. A run with --cost bops-structured reports those as its BOPs: its own are in its layers."""
    bops = sum(b for _, b in layers) if cost != "bops" and layers else now["bops"]
    found = {
        "bops": _above(bops, "BOPs"),
        "bops-structured": _above(now.get("bops_structured") or now["bops"], "BOPs"),
        "macs": _above(now["macs"], "MACs"),
        "size": _above(now["size_bytes"], "bytes"),
    }
    ms = now.get("latency_ms")
    return found if ms is None else {**found, "latency": NS * _above(ms, "latency")}


def _above(value: Any, what: str) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{what} of {value}")
    return number


def _share(value: Any, what: str) -> float:
    number = float(value)
    if not 0 <= number <= 1:
        raise ValueError(f"{what} of {value}")
    return number


def _maybe(value: Any) -> float | None:
    return None if value is None or value != value else _share(value, "accuracy")


def _layers(path: Path) -> Iterator[tuple[Layer, float]]:
    """Each layer with its bit-operations, where zeros of every kind cost nothing."""
    foreign.require_file(path, "table")
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            w, a, macs = int(row["w_bits"]), int(row["a_bits"]), int(row["macs"])
            if row.get("macs_all"):
                density = macs / float(row["macs_all"])
            else:  # of a version without that column
                i, i_all, o, o_all = (int(row[k]) for k in ("inputs", "inputs_all", "outputs", "outputs_all"))
                density = i / i_all * o / o_all * float(row["density"])
            yield Layer(row["name"], w, a, _share(density, "density")), float(w * a * macs)


def _chance(path: Path) -> float:
    """Accuracy of guessing, from the plan's number of classes; 0 where there is no plan."""
    try:
        return 1 / max(1, int(foreign.tree_of(foreign.text_of(path), FILE)["model"]["classes"]))
    except (JpqError, ValueError, KeyError, TypeError):
        return 0.0


def decisions(config: Config) -> dict[str, Any]:
    """What a person chose: method, structure, targets, learning rates, seed, epochs ..."""
    d, t, b = config.decide, config.train, config.budget
    asked = {"bops": b.target_bops, "macs": b.target_macs, "size": b.target_size, "latency": b.target_latency}
    return {
        "method": d.method,
        "structure": d.structure or _own_structure(d.method) or None,
        "target": ", ".join(f"{name} {text}" for name, text in asked.items() if text is not None),
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
    from jpq.methods import METHODS

    row = METHODS.get(method)
    return row.structure if row is not None and row.gate is not None else ""


def from_attributes(name: str, about: Mapping[str, Any], found: Mapping[str, Any], params: Mapping[str, Any]) -> Point:
    """A trial without its folder, by what it noted beside its values. Raises JpqError where that is not enough.

    Args:
        name: what to call it; about: the study's own attributes, which hold the task's settings.
        found: the trial's attributes (`held_out`, `bops`, `bops_share`, `macs`, `size_bytes`, `latency_ms`, `layers`).
        params: what the sampler chose.
    """
    try:
        task = about.get("settings", {}).get("task", {})
        bops, share = _above(found["bops"], "BOPs"), _above(found["bops_share"], "share of BOPs")
        latency = {"latency": NS * _above(found["latency_ms"], "latency")} if found.get("latency_ms") else {}
        place = str(found.get("run_folder", ""))
        return Point(
            name=name,
            folder=None,
            accuracy=_share(found["held_out"], "held-out accuracy"),
            test_accuracy=None,
            float_accuracy=None,
            costs={"bops": bops, "macs": float(found["macs"]), "size": float(found["size_bytes"]), **latency},
            full={"bops": float(round(bops / share))},
            model=str(task.get("model", "")),
            data=str(task.get("data", "")),
            chance=_share(about.get("accuracy of guessing", 0.0), "accuracy of guessing"),
            final=False,
            decisions={"method": found.get("method"), "settings": place.rpartition("/")[2] or None, **params},
            layers=tuple(_told(layer, str(text)) for layer, text in found.get("layers", {}).items()),
        )
    except KeyError as error:
        raise JpqError(f"neither its folder nor its attribute {error} is at hand.") from error
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise JpqError(f"its attributes are not those of a trial of jpq study ({_short(error)}).") from error


def _told(name: str, text: str) -> Layer:
    """A layer as `jpq study` notes it, such as "W4 A3, 24/32 channels, density 0.50 (2:4)"."""
    bits = re.match(r"W(\d+) A(\d+)", text)
    if bits is None:
        raise ValueError(f"layer {name}: {text}")
    kept = re.search(r"(\d+)/(\d+) channels", text)
    mask = re.search(r"density ([0-9.]+)", text)
    density = (int(kept[1]) / int(kept[2]) if kept else 1.0) * (float(mask[1]) if mask else 1.0)
    return Layer(name, int(bits[1]), int(bits[2]), _share(density, "density"))
