"""Small models in a folder: weights, plan, and the graph as data, from which they load with or without their code.

| file | what it holds |
|---|---|
| `plan.json` | the decisions, which make the small model of the code of the large one |
| `model.safetensors` | the state dict |
| `program.json` | the graph (`jpq.export.program`) or why there is none, the form of the inputs, names of branches |
| `program.safetensors` | constants of the graph that are not in the state dict, where there are any |

No file is a pickle, and nothing in them is executed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialized
from torch import Tensor, nn

from jpq.export.branches import Branches, restore_branches
from jpq.export.onnx.metadata import gather_metadata
from jpq.export.origin import decode_form, encode_form, example_of, form_of, note_origin, origin_of
from jpq.export.program import Program, capture_program, outputs_differ
from jpq.export.rebuild import build_from_plan
from jpq.files import untrusted
from jpq.files.atomic import replace_file
from jpq.files.paths import expand_home
from jpq.files.tensors import one_line, read_finite, read_safetensors, save_tensors
from jpq.plan import Plan
from jpq.plan import read as read_plan
from jpq.tracing.decompose import decompose
from jpq.tracing.forward import eval_mode
from jpq.types import JpqError

FORMAT = 1  # version of program.json

PLAN, WEIGHTS, PROGRAM, CONSTANTS = "plan.json", "model.safetensors", "program.json", "program.safetensors"

RUN = "result.json"  # marks the folder of a run

NO_EXAMPLE = "the form of its inputs is not known; give jpq.save an example"


def save(small: nn.Module, folder: str | Path, example: Any = None, plan: Plan | None = None) -> None:
    """Save a small model in a folder, from which `jpq.load` reads it again.

    Its graph is stored too, so that it loads without its code, where torch.export can follow it; else a warning says
    why, and it loads with `jpq.load(folder, model=...)`.

    Args:
        small: what `CompressionSession.finalize`, `jpq.rebuild` or `jpq.load` gave, trained further or not.
        folder: made where it is not there; a model that was saved in it is replaced.
        example: a batch (a tensor, a tuple of positional arguments, or a dict of keywords), whose sizes the stored
            graph takes, at any number of samples; default: as the example of `jpq.compress`.
        plan: of the small model; default: the plan that it was made with.

    Raises JpqError for other models, for the folder of a run, and where the folder cannot be written.
    """
    folder, origin = expand_home(folder), origin_of(small)
    plan = plan or (origin.plan if origin else None)
    if plan is None:
        raise JpqError(
            f"This {type(small).__name__} has no plan: save what finalize(), jpq.rebuild or jpq.load gave, or give "
            "plan=..."
        )
    if (folder / RUN).exists():
        raise JpqError(f"{folder} holds a run: save the model in another folder.")
    form = form_of(example) if example is not None else origin.example if origin else None
    record, constants = _program_record(small, example, form)
    record["about"] = gather_metadata(small)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JpqError(f"Cannot write to {folder}: {error.strerror}. Choose another folder.") from error
    for name in (PROGRAM, CONSTANTS):  # never beside the weights of another model
        (folder / name).unlink(missing_ok=True)
    save_tensors(small, folder / WEIGHTS)
    _write_text(folder / PLAN, plan.to_json())
    if constants:
        replace_file(folder / CONSTANTS, lambda part: part.write_bytes(serialized(constants)))
    _write_text(folder / PROGRAM, json.dumps(record))
    if record["program"] is None:
        warnings.warn(
            f"The graph was not stored ({record['reason']}): load the model with jpq.load(folder, model=...).",
            stacklevel=2,
        )


def _write_text(path: Path, text: str) -> None:
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def _program_record(small: nn.Module, example: Any, form: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(content of program.json, constants): the graph, where it can be had and computes the same."""
    branches = [name for name, module in small.named_modules() if isinstance(module, Branches)]
    record: dict[str, Any] = {"format": FORMAT, "branches": branches, "form": None, "program": None, "reason": ""}
    if form is None:
        return {**record, "reason": NO_EXAMPLE}, {}
    try:
        record["form"] = encode_form(form)
        program, constants = _capture(small, example, form)
    except (JpqError, ValueError) as error:
        return {**record, "reason": one_line(error).rstrip(".")}, {}
    return {**record, "program": program}, constants


def _capture(small: nn.Module, example: Any, form: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(record of the graph, its constants). Raises JpqError where there is none, or where it computes otherwise."""
    if isinstance(small, Program):
        return small.record, {name: t.cpu().contiguous().clone() for name, t in small.constants().items()}
    device = next((t.device for t in [*small.parameters(), *small.buffers()]), torch.device("cpu"))
    batch = example if example is not None else example_of(form, device)
    with eval_mode(small):
        record, tensors = capture_program(small, batch)
        if outputs_differ(small, Program(record, {}, tensors), batch):
            raise JpqError("the graph that torch.export gives computes something else, such as random numbers")
    state = small.state_dict()
    others = {k: t.cpu().contiguous().clone() for k, t in tensors.items() if k not in state}
    return record, others


def is_saved_model(folder: Path) -> bool:
    """Whether `save` has written into a folder."""
    return (folder / PROGRAM).exists()


def load_program(folder: Path) -> tuple[nn.Module, Plan]:
    """(the model as its stored graph, its plan) from a folder of `save`, without the model's code.

    Raises JpqError where files are missing, foreign or do not fit together, and where the graph was not stored.
    """
    plan, record = read_plan(folder / PLAN), _read_record(folder)
    if record["program"] is None:
        raise JpqError(
            f"{folder} holds no graph ({record['reason'][:200]}): load it with the code, jpq.load(folder, model=...)."
        )
    # constants may be infinite: masks of attention hold -inf
    constants = read_safetensors(folder / CONSTANTS) if (folder / CONSTANTS).exists() else {}
    try:
        program = Program(record["program"], read_finite(folder / WEIGHTS), constants)
    except JpqError as error:
        raise JpqError(f"{folder / PROGRAM} and the weights beside it do not belong together. {error}") from error
    _note(program, plan, record)
    return program, plan


def load_into(folder: Path, model: nn.Module) -> tuple[nn.Module, Plan]:
    """(small model in evaluation mode, its plan) from a folder of `save` or of a run, made of the large model's code.

    Args:
        folder: with the plan and the weights.
        model: the large model, with any weights; it is not changed.

    Raises JpqError where files are missing or foreign, and where they are of another model.
    """
    plan = read_plan(folder / PLAN)
    record = _read_record(folder) if is_saved_model(folder) else {"branches": [], "form": None, "about": {}}
    state = read_finite(folder / WEIGHTS)
    form = None if record["form"] is None else decode_form(record["form"])
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    try:
        dense = decompose(model, None if form is None else example_of(form, device))
        small = build_from_plan(plan, dense)
        for name in record["branches"]:
            restore_branches(small, name, state)
        small.load_state_dict(state)
    except (JpqError, RuntimeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise JpqError(
            f"{folder} does not hold a {type(model).__name__} like this one ({one_line(error).rstrip('.')}): give the "
            "model that it was compressed from, made with the same arguments."
        ) from error
    _note(small, plan, record)
    return small.eval(), plan


def _note(small: nn.Module, plan: Plan, record: Mapping[str, Any]) -> None:
    """Note where a loaded model comes from, so that it can be saved again."""
    about = {key: value for key, value in record["about"].items() if key not in ("jpq_version", "method")}
    form = None if record["form"] is None else decode_form(record["form"])
    note_origin(small, plan, form, about)


def _read_record(folder: Path) -> dict[str, Any]:
    """The content of program.json. Raises JpqError where it is damaged or foreign."""
    path = folder / PROGRAM
    record = untrusted.parse_json(untrusted.read_text(path, "graph"), str(path))
    try:
        tree = untrusted.as_dict(record)
        if tree["format"] != FORMAT:
            raise ValueError(f"format {str(tree['format'])[:20]}, of another version of jpq")
        untrusted.as_str(tree["reason"])
        for text in untrusted.as_dict(tree["about"]).values():
            untrusted.as_str(text, untrusted.LARGEST)
        for name in untrusted.as_list(tree["branches"]):
            untrusted.as_str(name)
        if tree["form"] is not None:
            decode_form(untrusted.as_dict(tree["form"]))
        return {**tree, "program": tree["program"]}
    except (ValueError, KeyError, TypeError) as error:
        raise JpqError(f"{path} is not a graph that jpq wrote ({type(error).__name__}: {error}).") from error
