"""Checkpoints: one file in the run's folder, written beside and renamed, read without executing anything.

`load` checks that the file is one of ours, of a known phase and complete; values are checked where they are put in
place: settings and budget by `RunState`, shapes by `tensors.restore` and `restore_optimizer`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from jpq.files import untrusted
from jpq.files.atomic import replace_file
from jpq.files.tensors import START_OVER, apply_saved, check_tensors, read_torch
from jpq.types import JpqError

NAME, KIND = "checkpoint.pt", "jpq checkpoint"

PHASES = ("float", "search", "fine-tune")

FIELDS = ("settings", "budget", "done", "losses", "history", "net", "optimizer", "random", "random_cuda")

FIELDS_OF_DECISIONS = ("plan", "metrics", "opened")  # entries of a checkpoint of the fine-tuning

GROUP_SETTINGS = ("peak", "curve", "weight_decay", "betas", "eps")  # of an optimizer's group of parameters

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's moving averages of each parameter


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors, numbers, text, lists and dicts of them) as the folder's checkpoint."""

    def write(part: Path) -> None:
        with part.open("wb") as file:  # torch's own writer hides the reason why it could not write
            torch.save(dict(state), file)

    replace_file(folder / NAME, write)


def load(folder: Path) -> dict[str, Any] | None:
    """The folder's checkpoint, or None where there is none. Raises JpqError for a file that is not one of ours."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        state = read_torch(path)
    except JpqError as error:
        raise JpqError(f"{error.command_line} {START_OVER}") from error
    try:
        return _checked(untrusted.as_dict(state))
    except ValueError as error:
        raise JpqError(f"{path} is not a checkpoint that jpq wrote ({error}). {START_OVER}") from error


def _checked(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state. Raises ValueError where it is of another kind or phase, incomplete, or without networks."""
    if type(state.get("kind")) is not str or state["kind"] != KIND:
        raise ValueError("it does not say so")
    if state.get("phase") not in PHASES:
        raise ValueError(f"there is no phase {str(state.get('phase'))[:40]!r}")
    for name in (*FIELDS, *(FIELDS_OF_DECISIONS if state["phase"] == PHASES[-1] else ())):
        if name not in state:
            raise ValueError(f"{name!r} missing")
    for name in ("budget", "done"):
        untrusted.as_int(state[name], 0, 2**31)
    search = state.get("soft")  # the search that goes on at the next budget
    networks = (state["net"], state.get("first", {}), untrusted.as_dict(search).get("net") if search else {})
    for network in networks:
        check_tensors(network)
    return state


def restore_optimizer(optim: torch.optim.Optimizer, state: Mapping[str, Any], source: Path) -> None:
    """Load an optimizer's state. Raises JpqError where its settings, or the shapes of its moments, do not fit."""
    settings = [{name: group.get(name) for name in GROUP_SETTINGS} for group in optim.param_groups]

    def load_checked() -> None:
        optim.load_state_dict(dict(state))
        if [{name: group.get(name) for name in GROUP_SETTINGS} for group in optim.param_groups] != settings:
            raise ValueError("an optimiser of other settings")
        for group in optim.param_groups:
            for parameter in group["params"]:
                _check_moments(parameter, optim.state.get(parameter, {}))

    apply_saved(load_checked, source)


def _check_moments(parameter: torch.Tensor, moments: Mapping[str, Any]) -> None:
    """Raise ValueError where Adam's state of one parameter is incomplete, of another shape or not finite."""
    if not moments:
        return
    if {"step", *MOMENTS} - moments.keys():
        raise ValueError("moments are missing")
    if not math.isfinite(float(moments["step"])):
        raise ValueError("a step that is no number")
    for name in MOMENTS:
        if moments[name].shape != parameter.shape or not moments[name].isfinite().all():
            raise ValueError("moments that are not of their parameters")
