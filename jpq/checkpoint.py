"""Checkpoints: one file in the run's folder, written beside and renamed, read without executing anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialized
from torch import Tensor, nn

from jpq import foreign
from jpq.files import replace_file
from jpq.result import Row
from jpq.tensor_files import require_tensors, safetensors_of, short, torch_of
from jpq.types import JpqError

NAME, KIND = "checkpoint.pt", "jpq checkpoint"
PHASES = ("float", "search", "fine-tune")
AWAY = "Remove it, or run without --resume."
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
        _require(foreign.table(state))
    except (ValueError, KeyError) as error:
        why = f"{error} missing" if isinstance(error, KeyError) else str(error)
        raise JpqError(f"{path} is not a checkpoint that jpq wrote ({why}). {AWAY}") from error
    return dict(state)


def _require(state: Mapping[str, Any]) -> None:
    """Raises ValueError or KeyError where a field is missing, or is not what `Journal.keep` writes."""
    if type(state.get("kind")) is not str or state["kind"] != KIND:
        raise ValueError("it does not say so")
    texts = [foreign.text(state[name]) for name in ("settings", "phase")]
    if texts[1] not in PHASES:
        raise ValueError(f"there is no phase {texts[1][:40]!r}")
    for name in ("budget", "done"):
        foreign.whole(state[name], 0, 2**31)
    if not all(type(loss) is float and math.isfinite(loss) for loss in foreign.row(state["losses"])):
        raise ValueError("a loss is no finite number")
    kinds = {f.name: str(f.type) for f in fields(Row)}
    for line in foreign.row(state["history"]):
        given = {name: _kind(value) for name, value in foreign.table(line).items()}
        if given.keys() != kinds.keys() or any(not _fits(given[name], kinds[name]) for name in kinds):
            raise ValueError("its history is not of rows as history.csv has them")
    for name in ("net", *({"first"} & state.keys())):
        require_tensors(state[name])
    for name in ("optimizer", *({"soft", "controller"} & state.keys())):
        foreign.table(state[name])
    soft = state.get("soft")
    if soft:
        require_tensors(soft["net"])
        foreign.table(soft["optimizer"])
        if not all(type(force) is float and math.isfinite(force) for force in foreign.table(soft["pressure"]).values()):
            raise ValueError("a multiplier is no finite number")
    if not all(isinstance(t, Tensor) for t in (state["random"], *foreign.row(state["random_cuda"]))):
        raise ValueError("the state of its random numbers is no tensor")
    if texts[1] == PHASES[-1]:
        foreign.text(state["plan"], foreign.MOST)
        if _kind(state["opened"]) not in ("float", "int"):
            raise ValueError("a difference is no number")
        for said in foreign.table(state["metrics"]).values():
            if any(_kind(value) not in ("float", "int") for value in foreign.table(said).values()):
                raise ValueError("what its gates said is no number")


def _kind(value: Any) -> str:
    return type(value).__name__


def _fits(given: str, wanted: str) -> bool:
    return given == wanted or (given == "int" and wanted == "float")


def restore(module: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Load a state dict strictly. Raises JpqError where it does not fit, or holds NaN or infinity."""

    def put() -> None:
        for name, tensor in require_tensors(state).items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"NaN or infinity in '{name}'")
        module.load_state_dict(dict(state))

    fitted(put, source)


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


def fitted(put: Callable[[], object], source: Path) -> None:
    """Put something from a checkpoint in its place. Raises JpqError where it does not fit."""
    try:
        put()
    except (RuntimeError, AttributeError, TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise JpqError(f"{source} does not fit this model ({short(error)}). {AWAY}") from error


def save_tensors(module: nn.Module, path: Path) -> None:
    """The module's state as safetensors."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    replace_file(path, lambda part: part.write_bytes(serialized(state)))  # whose errors are the system's own


def load_tensors(module: nn.Module, path: Path) -> None:
    """Load what `save_tensors` wrote. Raises JpqError for a missing, foreign or ill-fitting file, NaN or infinity."""
    state = safetensors_of(path)
    bad = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise JpqError(f"{path} holds NaN or infinity in '{bad[0]}': it is damaged.")
    restore(module, state, path)
