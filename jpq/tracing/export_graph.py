"""The ATen graph of a model, or one sentence that says why there is none."""

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
from torch.utils._pytree import tree_leaves, tree_map

from jpq.tracing.forward import named_inputs, tensors
from jpq.types import JpqError

_NOT_THE_USERS = (str(Path(torch.__file__).parent), sysconfig.get_paths()["stdlib"], __file__)


def export_graph(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """The graph of `model` in its present mode. Raises JpqError that names the line, layer or input to blame."""
    level = logging.root.manager.disable
    try:
        if _dtypes_differ(model, args, kwargs):  # which torch.export does not notice
            _run(model, args, kwargs)
        with warnings.catch_warnings(), torch.no_grad(), _untouched(model), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            return torch.export.export(model, args, kwargs, strict=False)  # some errors print the graph to stderr
    except JpqError:
        raise
    except Exception as error:
        _run(model, args, kwargs)
        raise _unreadable(model, error) from error
    finally:
        logging.disable(level)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """What forward leaves in the modules' attributes (export leaves tensors without numbers) is taken back."""
    kept = {m: dict(vars(m)) for m in model.modules()}
    held = [(v, v.copy()) for own in kept.values() for v in own.values() if type(v) in (list, dict, set)]
    try:
        yield
    finally:
        for module, own in kept.items():
            now = vars(module)
            for key in [k for k in now if k not in own]:
                del now[key]
            now.update({k: v for k, v in own.items() if now.get(k) is not v})
        for value, before in held:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)


def _dtypes_differ(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    given = {v.dtype for v in tensors((args, kwargs)) if v.is_floating_point()}
    return bool(kinds) and not given <= kinds


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise JpqError if the example, rather than the model, is wrong."""
    mine = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (args, kwargs))
    try:
        with torch.no_grad(), _untouched(model):
            model(*mine[0], **mine[1])
    except Exception as error:
        raise forward_error(model, mine[0], mine[1], error) from error


def forward_error(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> JpqError:
    """The sentence for a model that failed on these very arguments: which layer, what it expects, which input."""
    name = type(model).__name__
    takes = f"Its forward takes ({', '.join(inspect.signature(model.forward).parameters)})."
    try:
        inputs = named_inputs(model, args, kwargs)
    except TypeError as wrong:
        return JpqError(
            f"{name} does not take the example: {wrong}. {takes} Give a tuple for several inputs, a dict to name them."
        )
    given = ", ".join(f"{key} {_shape(value)}" for key, value in inputs.items())
    return JpqError(
        f"{name} does not run on the example ({given}): {locate_failure(model, inputs, error)} Give an "
        "example of the shape and type that it takes: a tuple for several inputs, a dict to name them. "
        f"{takes}"
    )


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def locate_failure(model: nn.Module, inputs: Mapping[str, Any], error: Exception) -> str:
    """The innermost layer that ran, what it expects and what it got; torch's own words where that is not known."""
    name, module, frame = _innermost(model, [error])
    if module is None or frame is None:
        return _first_line(error)
    layer = f"layer '{name}' ({type(module).__name__})" if name else f"the {type(module).__name__} itself"
    x = next((v for v in frame.f_locals.values() if isinstance(v, Tensor) and not isinstance(v, nn.Parameter)), None)
    problem = _mismatch(module, x) if x is not None else ""
    if not problem:
        return f"in {layer}: {_first_line(error)}" if name else _first_line(error)
    source = next((key for key, v in inputs.items() if any(leaf is x for leaf in tree_leaves(v))), "")
    which = f", the input '{source}'" if source else ""
    return f"{layer} expects {problem} (shape {_shape(x)}{which})."


def _mismatch(module: Any, x: Tensor) -> str:
    """What a torch layer expects and does not get from x; empty if that is not the trouble."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.device != x.device:
        return f"a tensor on {weight.device}, got one on {x.device}"
    if isinstance(module, nn.Embedding):
        if x.is_floating_point():
            return f"integer indices, got {x.dtype}"
        low, high, most = int(x.min()), int(x.max()), module.num_embeddings - 1
        return f"indices from 0 to {most}, got {low} to {high}" if low < 0 or high > most else ""
    dim, wanted, rank = 1, getattr(module, "num_features", None), None
    if isinstance(module, nn.modules.conv._ConvNd):
        rank = len(module.kernel_size) + 2
        dim, wanted = x.dim() - rank + 1, module.in_channels
    elif isinstance(module, nn.Linear):
        dim, wanted = -1, module.in_features
    if rank and x.dim() not in (rank - 1, rank):
        return f"{rank} dims (batch, channels and {rank - 2} more), got {x.dim()}"
    if wanted is not None and x.dim() > dim and x.shape[dim] != wanted:
        what = "features" if isinstance(module, nn.Linear) else "channels"
        return f"{wanted} {what}, got {x.shape[dim]}"
    if isinstance(weight, Tensor) and x.is_floating_point() and weight.dtype != x.dtype:
        return f"{weight.dtype}, got {x.dtype}"
    return ""


def _innermost(model: nn.Module, errors: Sequence[BaseException]) -> tuple[str, nn.Module | None, FrameType | None]:
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


def _chain(error: BaseException) -> list[BaseException]:
    """The error behind the errors that it was turned into, last; frames of the cause lie deeper."""
    out: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in out:
        out.append(step)
        step = step.__cause__ or step.__context__
    return out


def _unreadable(model: nn.Module, error: Exception) -> JpqError:
    """The model runs, but torch.export cannot follow it: name the line, the submodule and the way out."""
    errors = _chain(error)
    frames = [
        f for e in errors for f in traceback.extract_tb(e.__traceback__) if not f.filename.startswith(_NOT_THE_USERS)
    ]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}, `{frames[-1].line}`" if frames else ""
    name, module, _ = _innermost(model, errors)
    inside = f" (in submodule '{name}', {type(module).__name__})" if name else ""
    return JpqError(
        f"torch.export cannot read {type(model).__name__}{where}{inside}: {_first_line(error)} {_remedy(error)}"
    )


def _remedy(error: Exception) -> str:
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
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if text.endswith((".", "!", "?")) else text + "."
