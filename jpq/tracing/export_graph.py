"""The ATen graph of a model by torch.export, or an error that names the line, layer or input at fault."""

from __future__ import annotations

import inspect
import io
import logging
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.utils._pytree import tree_leaves

from jpq.tracing import own_calls
from jpq.tracing.forward import collect_tensors, copy_tensors, name_inputs, plain_outputs
from jpq.types import JpqError

_LIBRARY_PATHS = (str(Path(torch.__file__).parent), sysconfig.get_paths()["stdlib"], __file__, own_calls.__file__)

LONGEST_MESSAGE = 240  # characters of a foreign error that a sentence quotes


def export_graph(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """The ATen graph of `model` in its present mode. Raises JpqError that names the line, layer or input at fault."""
    level = logging.root.manager.disable
    try:
        if _dtypes_differ(model, args, kwargs):  # torch.export does not notice
            _check_example(model, args, kwargs)
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            restore_attributes(model),
            plain_outputs(model),
            redirect_stderr(io.StringIO()),  # some errors print the graph there
        ):
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            program = torch.export.export(model, args, kwargs, strict=False)
    except JpqError:
        raise
    except Exception as error:
        _check_example(model, args, kwargs)
        raise _export_error(model, error) from error
    finally:
        logging.disable(level)
    if not any(
        spec.kind is OutputKind.USER_OUTPUT and isinstance(spec.arg, TensorArgument)
        for spec in program.graph_signature.output_specs
    ):
        raise JpqError(
            f"The output of {type(model).__name__} holds no tensor that jpq finds: return a tensor, or tuples, lists, "
            "dicts or dataclasses of tensors."
        )
    return program


@contextmanager
def restore_attributes(model: nn.Module) -> Iterator[None]:
    """A context after which the modules' attributes are as before, whatever forward wrote (export: fake tensors)."""
    before = {module: dict(vars(module)) for module in model.modules()}
    containers = [
        (value, value.copy())
        for attributes in before.values()
        for value in attributes.values()
        if type(value) in (list, dict, set)
    ]
    try:
        yield
    finally:
        for module, attributes in before.items():
            now = vars(module)
            for key in [k for k in now if k not in attributes]:
                del now[key]
            now.update({k: v for k, v in attributes.items() if now.get(k) is not v})
        for value, content in containers:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)


def _dtypes_differ(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an input has a floating-point type that no parameter has."""
    expected = {p.dtype for p in model.parameters() if p.is_floating_point()}
    actual = {v.dtype for v in collect_tensors((args, kwargs)) if v.is_floating_point()}
    return bool(expected) and not actual <= expected


def _check_example(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the model on a copy of the example. Raises JpqError if the example, rather than the model, is wrong."""
    args, kwargs = copy_tensors((args, kwargs))
    try:
        with torch.no_grad(), restore_attributes(model):
            model(*args, **kwargs)
    except Exception as error:
        raise forward_error(model, args, kwargs, error) from error


def forward_error(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> JpqError:
    """The error for a model that failed on these arguments: the layer, what it expects, and the input at fault."""
    name = type(model).__name__
    takes = f"Its forward takes ({', '.join(inspect.signature(model.forward).parameters)})."
    try:
        inputs = name_inputs(model, args, kwargs)
    except TypeError as mismatch:
        return JpqError(
            f"{name} does not take the example: {mismatch}. {takes} "
            "Give a tuple for several inputs, a dict to name them."
        )
    shapes = ", ".join(f"{key} {_shape_text(value)}" for key, value in inputs.items())
    return JpqError(
        f"{name} does not run on the example ({shapes}): {locate_failure(model, inputs, error)} Give an "
        "example of the shape and type that it takes: a tuple for several inputs, a dict to name them. "
        f"{takes}"
    )


def _shape_text(value: Any) -> str:
    """The shape of a tensor, or the type of another value."""
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def locate_failure(model: nn.Module, inputs: Mapping[str, Any], error: Exception) -> str:
    """Text that names the innermost layer that ran, what it expects and what it got; else torch's own message."""
    name, module, frame = _innermost_module(model, [error])
    if module is None or frame is None:
        return _first_line(error)
    layer = f"layer '{name}' ({type(module).__name__})" if name else f"the {type(module).__name__} itself"
    x = next((v for v in frame.f_locals.values() if isinstance(v, Tensor) and not isinstance(v, nn.Parameter)), None)
    problem = _describe_mismatch(module, x) if x is not None else ""
    if not problem:
        return f"in {layer}: {_first_line(error)}" if name else _first_line(error)
    source = next((key for key, v in inputs.items() if any(leaf is x for leaf in tree_leaves(v))), "")
    which = f", the input '{source}'" if source else ""
    return f"{layer} expects {problem} (shape {_shape_text(x)}{which})."


def _describe_mismatch(module: Any, x: Tensor) -> str:
    """Mismatch between a torch layer and its input `x` in words (device, indices, channels or type); empty if none."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.device != x.device:
        return f"a tensor on {weight.device}, got one on {x.device}"
    if isinstance(module, nn.Embedding):
        return _describe_bad_indices(module, x)
    problem = _describe_size_mismatch(module, x)
    if not problem and isinstance(weight, Tensor) and x.is_floating_point() and weight.dtype != x.dtype:
        return f"{weight.dtype}, got {x.dtype}"
    return problem


def _describe_bad_indices(module: nn.Embedding, x: Tensor) -> str:
    """Error in the indices of an embedding, in words; empty if there is none."""
    if x.is_floating_point():
        return f"integer indices, got {x.dtype}"
    low, high, last = int(x.min()), int(x.max()), module.num_embeddings - 1
    return f"indices from 0 to {last}, got {low} to {high}" if low < 0 or high > last else ""


def _describe_size_mismatch(module: Any, x: Tensor) -> str:
    """Error in the rank or channels of a layer's input, in words; empty if there is none."""
    dim, channels, rank = 1, getattr(module, "num_features", None), None
    if isinstance(module, nn.modules.conv._ConvNd):
        rank = len(module.kernel_size) + 2
        dim, channels = x.dim() - rank + 1, module.in_channels
    elif isinstance(module, nn.Linear):
        dim, channels = -1, module.in_features
    if rank and x.dim() not in (rank - 1, rank):
        return f"{rank} dims (batch, channels and {rank - 2} more), got {x.dim()}"
    if channels is not None and x.dim() > dim and x.shape[dim] != channels:
        unit = "features" if isinstance(module, nn.Linear) else "channels"
        return f"{channels} {unit}, got {x.shape[dim]}"
    return ""


def _innermost_module(
    model: nn.Module, errors: Sequence[BaseException]
) -> tuple[str, nn.Module | None, FrameType | None]:
    """(path, module, frame) of the last of the model's modules whose code ran before the error."""
    names = {id(m): n for n, m in model.named_modules()}
    for frame in reversed([frame for e in errors for frame, _ in traceback.walk_tb(e.__traceback__)]):
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if (
            isinstance(owner, nn.Module)
            and id(owner) in names
            and not code.co_name.endswith(("_call_impl", "__call__"))
        ):
            return names[id(owner)], owner, frame
    return "", None, None


def _cause_chain(error: BaseException) -> list[BaseException]:
    """An error and its causes, the first cause last, since its frames lie deepest."""
    errors: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in errors:
        errors.append(step)
        step = step.__cause__ or step.__context__
    return errors


def _export_error(model: nn.Module, error: Exception) -> JpqError:
    """The error for a model that runs but that torch.export cannot follow: the line, the submodule and the way out."""
    if any(type(module).__name__ == "GeneralizedRCNNTransform" for module in model.modules()):
        return JpqError(
            f"{type(model).__name__} is a whole detector: how many boxes it returns depends on the image, which no "
            "graph holds. Give the network from resized images to raw outputs: jpq.detection.extract_core makes it of "
            "SSD, SSDlite, RetinaNet and FCOS (docs/detectors.md), for others take backbone and head."
        )
    errors = _cause_chain(error)
    frames = [
        f for e in errors for f in traceback.extract_tb(e.__traceback__) if not f.filename.startswith(_LIBRARY_PATHS)
    ]
    frames = [f for f in frames if not f.filename.startswith("<")]  # code that was made while the program runs
    place = f" at {frames[-1].filename}:{frames[-1].lineno}, `{frames[-1].line}`" if frames else ""
    name, module, _ = _innermost_module(model, errors)
    submodule = f" (in submodule '{name}', {type(module).__name__})" if name else ""
    return JpqError(
        f"torch.export cannot read {type(model).__name__}{place}{submodule}: {_first_line(error)} {_suggest_fix(error)}"
    )


def _suggest_fix(error: Exception) -> str:
    """A sentence that says how to make the model readable."""
    text = f"{type(error).__name__} {error}"
    if "data-dependent" in text or "DataDependent" in text or "numpy()" in text:
        return (
            "Values of tensors cannot steer Python code: replace that line by tensor operations (torch.where, "
            "masks), or trace a submodule that does without it."
        )
    if "fake impl" in text or "fake kernel" in text:
        return "Say what shape the op returns: register a function with torch.library.register_fake."
    return "Replace that line by plain tensor operations, or trace a submodule that does without it."


def _first_line(error: Exception) -> str:
    """The first line of the error's message that is not empty, as a sentence of at most LONGEST_MESSAGE characters."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    text = text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE].rstrip()} ..."
    return text if text.endswith((".", "!", "?")) else text + "."
