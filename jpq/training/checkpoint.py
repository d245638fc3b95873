"""Checkpoints: one file in the run's folder, written beside and renamed, read without executing anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jpq.files import untrusted
from jpq.files.atomic import replace_file
from jpq.files.tensors import AWAY, fitted, require_tensors, torch_of
from jpq.training.history import EpochRecord
from jpq.types import JpqError

NAME, KIND = "checkpoint.pt", "jpq checkpoint"

PHASES = ("float", "search", "fine-tune")

GROUP = ("peak", "curve", "weight_decay", "betas", "eps")  # of an optimiser, beside its parameters

MOMENTS = ("exp_avg", "exp_avg_sq")  # that Adam keeps of each


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Keep `state` (tensors, numbers, text, lists and dicts of them) as the folder's checkpoint."""

    def write(part: Path) -> None:
        with part.open("wb") as file:  # torch's own writer does not keep why it could not write
            torch.save(dict(state), file)

    replace_file(folder / NAME, write)


def load(folder: Path) -> dict[str, Any] | None:
    """The folder's checkpoint, or None where there is none. Raises JpqError for a file that is not one of ours."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        state = torch_of(path)
    except JpqError as error:
        raise JpqError(f"{error} {AWAY}") from error
    try:
        _require(untrusted.as_dict(state))
    except (ValueError, KeyError) as error:
        why = f"{error} missing" if isinstance(error, KeyError) else str(error)
        raise JpqError(f"{path} is not a checkpoint that jpq wrote ({why}). {AWAY}") from error
    return dict(state)


def _require(state: Mapping[str, Any]) -> None:
    """Raises ValueError or KeyError where a field is missing, or is not what `Journal.keep` writes."""
    if type(state.get("kind")) is not str or state["kind"] != KIND:
        raise ValueError("it does not say so")
    texts = [untrusted.as_str(state[name]) for name in ("settings", "phase")]
    if texts[1] not in PHASES:
        raise ValueError(f"there is no phase {texts[1][:40]!r}")
    for name in ("budget", "done"):
        untrusted.as_int(state[name], 0, 2**31)
    if not all(type(loss) is float and math.isfinite(loss) for loss in untrusted.as_list(state["losses"])):
        raise ValueError("a loss is no finite number")
    kinds = {f.name: str(f.type) for f in fields(EpochRecord)}
    for line in untrusted.as_list(state["history"]):
        given = {name: _kind(value) for name, value in untrusted.as_dict(line).items()}
        if given.keys() != kinds.keys() or any(not _fits(given[name], kinds[name]) for name in kinds):
            raise ValueError("its history is not of rows as history.csv has them")
    for name in ("net", *({"first"} & state.keys())):
        require_tensors(state[name])
    for name in ("optimizer", *({"soft", "controller"} & state.keys())):
        untrusted.as_dict(state[name])
    soft = state.get("soft")
    if soft:
        require_tensors(soft["net"])
        untrusted.as_dict(soft["optimizer"])
        if not all(
            type(force) is float and math.isfinite(force) for force in untrusted.as_dict(soft["pressure"]).values()
        ):
            raise ValueError("a multiplier is no finite number")
    if not all(isinstance(t, Tensor) for t in (state["random"], *untrusted.as_list(state["random_cuda"]))):
        raise ValueError("the state of its random numbers is no tensor")
    if texts[1] == PHASES[-1]:
        untrusted.as_str(state["plan"], untrusted.MOST)
        if _kind(state["opened"]) not in ("float", "int"):
            raise ValueError("a difference is no number")
        for said in untrusted.as_dict(state["metrics"]).values():
            if any(_kind(value) not in ("float", "int") for value in untrusted.as_dict(said).values()):
                raise ValueError("what its gates said is no number")


def _kind(value: Any) -> str:
    return type(value).__name__


def _fits(given: str, wanted: str) -> bool:
    return given == wanted or (given == "int" and wanted == "float")


def restore_optimizer(optim: torch.optim.Optimizer, state: Mapping[str, Any], source: Path) -> None:
    """The same for an optimiser: what it knows of each parameter is of that parameter's shape, its groups are ours."""
    own = [{name: group.get(name) for name in GROUP} for group in optim.param_groups]

    def put() -> None:
        optim.load_state_dict(dict(state))
        if [{name: group.get(name) for name in GROUP} for group in optim.param_groups] != own:
            raise ValueError("an optimiser of other settings")
        for group in optim.param_groups:
            for parameter in group["params"]:
                known = optim.state.get(parameter, {})
                if known and {"step", *MOMENTS} - known.keys():
                    raise ValueError("moments are missing")
                if known and not math.isfinite(float(known["step"])):
                    raise ValueError("a step that is no number")
                for name in MOMENTS if known else ():
                    if known[name].shape != parameter.shape or not known[name].isfinite().all():
                        raise ValueError("moments that are not of their parameters")

    fitted(put, source)
