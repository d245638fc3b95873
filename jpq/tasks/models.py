"""Models by name, their weights from a file, and whether they fit the data.

`lenet5`, `vgg7`, `convnet`, `resnet8` .. `resnet56` are in `jpq.tasks.zoo`; `torchvision:NAME` is torchvision's;
`module:callable` imports and runs the user's own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jpq.files.tensors import safetensors_of, short, torch_of
from jpq.files.untrusted import check_file, check_no_code
from jpq.plan import Plan
from jpq.tasks import zoo
from jpq.tasks.datasets import call, imported
from jpq.tasks.zoo import cifar_resnet, convnet, lenet5, vgg7
from jpq.tracing.export_graph import locate_failure
from jpq.tracing.forward import named_inputs
from jpq.tracing.model_checks import accepted
from jpq.types import JpqError, unknown

MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "lenet5": lenet5,
    "vgg7": vgg7,
    "convnet": convnet,
    "resnet8": cifar_resnet(1),
    "resnet20": cifar_resnet(3),
    "resnet32": cifar_resnet(5),
    "resnet44": cifar_resnet(7),
    "resnet56": cifar_resnet(9),
}

ONE_CHANNEL = frozenset({"lenet5", "convnet"})  # usually fed grey images


def build(name: str, classes: int, channels: int | None = None) -> nn.Module:
    """A new model with random weights; `channels` of the image, when not given: 1 for lenet5 and convnet, else 3."""
    if classes < 1 or (channels is not None and channels < 1):
        raise JpqError(f"Model '{name}' needs at least 1 class and 1 channel; got {classes} and {channels}.")
    if channels is None:
        channels = 1 if name in ONE_CHANNEL else 3
    if name in MODELS:
        return MODELS[name](classes, channels)
    if name in zoo.kinds():
        raise unknown("model", name, [f"torchvision:{name}"])
    kind, colon, rest = name.partition(":")
    if not colon:
        raise unknown("model", name, [*MODELS, "torchvision:NAME", "module:callable"])
    if kind != "torchvision":
        return _user_model(name, classes, channels)
    zoo.kind_of(rest)
    if channels != 3:
        raise JpqError(
            f"torchvision:{rest} takes images of 3 channels; the data has {channels}. "
            "Choose convnet or a resnet of jpq, or give the model as module:callable."
        )
    return zoo.build_torchvision(rest, classes)


def of_plan(plan: Plan, source: Path, weights: Path, run_code: bool = False) -> nn.Module:
    """The dense model that the plan in file `source` belongs to, new; `weights` is the file of the small model's.

    Raises JpqError where the plan does not say, or declares a model that those weights are too few for; and, unless
    `run_code`, where it names code (module:callable): that would run what the file's author wants.
    """
    missing = [key for key in ("name", "classes", "channels") if key not in plan.model]
    if missing:
        raise JpqError(f"{source} does not say which model it belongs to ({', '.join(missing)} missing).")
    name, classes, channels = plan.model["name"], plan.model["classes"], plan.model["channels"]
    if not run_code:
        check_no_code("model", name, source, "load it with run_code=True (on the command line: --run-code)")
    room = check_file(weights) // 4  # each class and channel has at least one number of 32 bits
    if max(classes, channels) > room:
        raise JpqError(
            f"{source} declares {classes:,} classes and {channels:,} channels, and {weights} holds at most "
            f"{room:,} numbers: they do not belong together."
        )
    return build(name, classes, channels)


def usual(name: str) -> tuple[tuple[int, ...], int] | None:
    """(shape of one sample, number of classes) that a named model usually has; None where only its author knows."""
    if name in MODELS:
        shape = {"lenet5": (1, 28, 28), "convnet": (1, 8, 8)}.get(name, (3, 32, 32))
        return shape, 10
    kind, _, rest = name.partition(":")
    if kind != "torchvision":
        return None
    return zoo.usual_shape(rest), zoo.CLASSES[zoo.kind_of(rest)]


def _user_model(spec: str, classes: int, channels: int) -> nn.Module:
    make = imported("model", spec)
    takes = _parameters(make)
    model = call("model", spec, make, **{k: v for k, v in (("classes", classes), ("channels", channels)) if k in takes})
    if not isinstance(model, nn.Module):
        raise JpqError(f"Model '{spec}' returned {type(model).__name__}; it must return a torch.nn.Module.")
    return accepted(model)


def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    try:
        found = inspect.signature(function).parameters.values()
    except ValueError:  # some built-in callables have no signature
        return frozenset()
    return frozenset(p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy weights from .pth, .pt, .th or .safetensors into `model`; every key and shape must fit, all be finite.

    Takes a plain dict of tensors, or one under `state_dict` or `model`; a `module.` prefix (DataParallel) is dropped.
    Nothing in the file is executed.
    """
    path = Path(path)
    given = _tensors(_read(path), path)
    own = model.state_dict()
    if not any(key.startswith("module.") for key in own):
        given = {key.removeprefix("module."): value for key, value in given.items()}
    # weights from before PyTorch 0.4.1 lack this counter, which no forward pass with a momentum reads
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    shapes = [k for k in own if k in given and own[k].shape != given[k].shape]
    wrong = [
        _some("missing", missing),
        _some("unexpected", [key for key in given if key not in own]),
        _some("differently shaped", [f"{k} {list(given[k].shape)} for {list(own[k].shape)}" for k in shapes]),
    ]
    if any(wrong):
        raise JpqError(
            f"Weights '{path}' do not fit the model: {'; '.join(filter(None, wrong))}. "
            "Choose the model, and the number of classes, that they were trained for."
        )
    bad = [key for key, value in given.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise JpqError(f"Weights '{path}' hold NaN or infinity: {_some('in', bad)}. Use a checkpoint from before that.")
    model.load_state_dict(given, strict=False)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise JpqError(f"There is no weights file '{path}'. Check --weights.")
    if path.suffix not in (".pth", ".pt", ".th", ".safetensors"):
        raise JpqError(f"Weights '{path}' end in '{path.suffix}'; jpq reads .pth, .pt, .th and .safetensors.")
    try:
        return safetensors_of(path) if path.suffix == ".safetensors" else torch_of(path)
    except JpqError as error:
        reason = short(error.__cause__ or error)
        raise JpqError(
            f"Weights '{path}' cannot be read: {reason}. Save them anew as torch.save(model.state_dict(), path)."
        ) from error


def _tensors(found: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise JpqError(
            f"Weights '{path}' hold no dict of tensors, plain or under 'state_dict' or 'model'. "
            "Save them as torch.save(model.state_dict(), path)."
        )
    return {str(key): value for key, value in found.items()}


def _some(what: str, keys: list[str]) -> str:
    """`3 missing (a, b, ...)`: how many keys and the first few, or nothing."""
    return f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else ""


def check_runs(model: nn.Module, example: Tensor) -> Any:
    """What the model gives for one batch [B, C, H, W] in eval mode; JpqError names the layer where it fails."""
    try:
        named_inputs(model, (example,), {})
    except TypeError as error:
        raise JpqError(
            f"The model does not take one image tensor ({error}), which is all that the command line feeds "
            "it. Use jpq.trace and jpq.compress in Python."
        ) from error
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return model(example)
    except Exception as error:
        reason = locate_failure(model, {"image": example}, error)
        raise JpqError(
            f"The model cannot take a batch of shape {list(example.shape)}: {reason} "
            "Choose a model made for images of this size, channels and type, or resize the data."
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_fits(model: nn.Module, example: Tensor, classes: int | None = None) -> None:
    """Run one batch [B, C, H, W] in eval mode; raise one sentence when the model cannot take it or answers amiss."""
    out = check_runs(model, example)
    wanted = [len(example), classes if classes is not None else "classes"]
    got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
    if not isinstance(out, Tensor) or out.dim() != 2 or (classes is not None and got != wanted):
        raise JpqError(
            f"The model gives {got} for a batch of shape {list(example.shape)}; it must give {wanted}: jpq optimize "
            "trains on class scores. For other outputs use jpq.compress in your own loop."
        )
