"""Finished runs as points: from their folders, from studies' folders, and from an Optuna study."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jpq.point import FILE, Point, from_attributes, point_of
from jpq.types import JpqError


@dataclass(frozen=True)
class Runs:
    """Points of one task, and what was passed over."""

    points: tuple[Point, ...]
    skipped: tuple[str, ...]  # a sentence each


def read(source: Any, folder: Path | str | None = None) -> Runs:
    """The runs in a folder (of a run, of a study, or of several), in several of them, or in an Optuna study.

    `folder` is where the trials of an Optuna study lie; without it they are what they noted in the study.
    A run that lies in two of them, or was copied, is counted once. Raises JpqError where a folder is not there, nothing
    can be read, or runs are not of the same model and data.
    """
    points: list[Point] = []
    skipped: list[str] = []
    for one in _several(source):
        for point in _trials(one, folder) if hasattr(one, "trials") else _folders(Path(one)):
            if isinstance(point, Point):
                points.append(point)
            else:
                skipped.append(point)
    if not points:
        why = f" {skipped[0]}" if skipped else ""
        more = f" ({len(skipped) - 1} more were passed over.)" if len(skipped) > 1 else ""
        raise JpqError(f"No finished run was found in {_named(source)}.{why}{more}")
    require_one_task(points)
    return Runs(_once(points), tuple(dict.fromkeys(skipped)))


def _several(source: Any) -> list[Any]:
    one = isinstance(source, (str, os.PathLike)) or hasattr(source, "trials")
    if not one and not isinstance(source, Iterable):
        raise JpqError(f"A front is made of folders of runs or of an Optuna study, not of a {type(source).__name__}.")
    return [source] if one else list(source)


def _named(source: Any) -> str:
    return ", ".join(str(getattr(one, "study_name", one)) for one in _several(source)) or "nothing"


def require_one_task(points: Sequence[Point]) -> None:
    """Raises JpqError where points are not of one model and data: their accuracies and shares say different things."""
    first = points[0]
    for other in points[1:]:
        for what in ("model", "data"):
            one, two = getattr(first, what), getattr(other, what)
            if one != two:
                raise JpqError(
                    f"Runs of one front share model and data: {first.name} has {what} {one}, {other.name} has {two}. "
                    "Name the folders of one task."
                )
        if not math.isclose(first.full["bops"], other.full["bops"], rel_tol=1e-6):
            raise JpqError(
                f"Runs of one front share model and data: the fp32 model of {first.name} costs "
                f"{first.full['bops']:,.0f} BOPs, that of {other.name} {other.full['bops']:,.0f}."
            )


def _once(points: Sequence[Point]) -> tuple[Point, ...]:
    """Without runs that were met before; of a trial and its export, the export."""
    kept: dict[Any, Point] = {}
    for point in points:
        mark = point.decisions.get("settings") or (point.folder or point.name)
        key = (mark, point.accuracy, point.costs["bops"], point.costs["size"])
        before = kept.get(key)
        if before is None or (point.final and not before.final):
            kept[key] = point
    return tuple(kept.values())


def _folders(path: Path) -> Iterator[Point | str]:
    """Every run in and below a folder, and a sentence for each that cannot be read."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "is not there"
        raise JpqError(f"{path} {what}: give the folder of a run, of a study, or one that holds several.")
    ended: list[Path] = []
    begun: list[Path] = []
    for place, below, files in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        here = Path(place)
        if FILE in files:
            ended.append(here)
        elif "config.toml" in files:
            begun.append(here)
    for here in ended:
        try:
            yield point_of(here)
        except JpqError as error:
            yield f"{here}: {error}"
    for here in begun:
        if not any(here in end.parents for end in ended):
            yield f"{here}: the run has not ended, there is no {FILE}."


def _trials(study: Any, folder: Path | str | None = None) -> Iterator[Point | str]:
    """The finished trials of an Optuna study of `jpq study`: `trials` and `user_attrs` are all that is asked of it."""
    about = dict(getattr(study, "user_attrs", {}))
    title = str(getattr(study, "study_name", "the study"))
    alone: list[Point] = []
    known: Point | None = None
    for trial in study.trials:
        if getattr(getattr(trial, "state", None), "name", "COMPLETE") != "COMPLETE":
            continue
        name = f"trial {getattr(trial, 'number', '?')}"
        params = {f"params_{key}": value for key, value in trial.params.items()}
        place = Path(folder or ".") / str(trial.user_attrs.get("run_folder", ""))
        try:
            if (place / FILE).is_file():
                known = point_of(place)
                yield replace(known, name=name, decisions={**known.decisions, **params})
            else:
                alone.append(from_attributes(name, about, trial.user_attrs, params))
        except JpqError as error:
            yield f"{name} of {title}: {error}"
    for point in alone:  # what the study does not say, another trial's folder may
        yield (
            point
            if known is None
            else replace(
                point, **{field: getattr(known, field) for field in ("full", "model", "data", "chance", "uniform")}
            )
        )
