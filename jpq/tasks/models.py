"""Models by name, and the check that a model fits the data.

`lenet5`, `vgg7`, `convnet`, `resnet8` .. `resnet56` are in `jpq.tasks.zoo`; `torchvision:NAME` is torchvision's;
`timm:NAME`, `smp:ARCHITECTURE:ENCODER` and `hf:FOLDER_OR_CONFIG` are in `jpq.tasks.third_party`; `module:callable`
imports and runs the user's own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jpq.files.model_files import kept_model
from jpq.files.untrusted import check_file, check_no_code
from jpq.plan import Plan
from jpq.tasks import CLASSIFICATION, zoo
from jpq.tasks.base import Task
from jpq.tasks.datasets import call_user_code, import_callable
from jpq.tasks.third_party import build_third_party, is_third_party, usual_third_party_input
from jpq.tasks.third_party import noise as noise
from jpq.tasks.weights import load_weights as load_weights
from jpq.tasks.zoo import cifar_resnet, convnet, lenet5, vgg7
from jpq.tracing.export_graph import locate_failure
from jpq.tracing.forward import batch_size, collect_tensors, copy_tensors, eval_mode, name_inputs, split_arguments
from jpq.tracing.model_checks import accept_model
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

NAMED_KINDS = ("torchvision:NAME", "timm:NAME", "smp:ARCHITECTURE:ENCODER", "hf:FOLDER")  # not code of the user's

MODEL_ARGUMENTS = ("vocabulary", "length", "height", "width")  # numbers that some data have besides

ROW_DIMS, WINDOW_DIMS, IMAGE_DIMS = 2, 3, 4  # of batches of rows (or texts), of windows of series, and of images

ONE_CHANNEL = frozenset({"lenet5", "convnet"})  # usually fed grey images


def build(
    name: str, classes: int, channels: int | None = None, arguments: Mapping[str, int] | None = None
) -> nn.Module:
    """A new model with random weights; `channels` of the image by default 1 for lenet5 and convnet, else 3.

    `arguments` are other numbers that the user's own builder may want, such as `vocabulary`.

    Raises JpqError for unknown names, and for numbers of classes or channels that the model cannot have.
    """
    if classes < 1 or (channels is not None and channels < 1):
        raise JpqError(f"Model '{name}' needs at least 1 class and 1 channel; got {classes} and {channels}.")
    if channels is None:
        channels = 1 if name in ONE_CHANNEL else 3
    if name in MODELS:
        return MODELS[name](classes, channels)
    _refuse_unknown(name)
    kind, _, architecture = name.partition(":")
    if is_third_party(name):
        return accept_model(build_third_party(name, classes, channels, arguments))
    if kind != "torchvision":
        return _user_model(name, {"classes": classes, "channels": channels, **(arguments or {})})
    zoo.kind_of(architecture)
    _check_colour_images(name, channels, arguments or {})
    if arguments and {"height", "width"} <= set(arguments) and zoo.is_detector(architecture):
        from jpq.tasks.detectors import build_detector

        return build_detector(architecture, classes, (arguments["height"], arguments["width"]))
    return zoo.build_torchvision(architecture, classes)


def of_plan(plan: Plan, source: Path, weights: Path, run_code: bool = False) -> nn.Module:
    """The dense model that a plan belongs to, with new weights.

    Args:
        plan: read from the file `source`.
        weights: file of the small model, which bounds the size of a dense one.
        run_code: allow a plan that names code (module:callable), which would run.

    Raises JpqError where the plan names no model, one that those weights are too few for, or code without `run_code`.
    """
    missing = [key for key in ("name", "classes", "channels") if key not in plan.model]
    if missing:
        raise JpqError(f"{source} does not say which model it belongs to ({', '.join(missing)} missing).")
    name, classes, channels = plan.model["name"], plan.model["classes"], plan.model["channels"]
    if not run_code:
        check_no_code("model", name, source, "add --run-code")
    most = check_file(weights) // 4  # each class and channel has at least one number of 32 bits
    others = {key: int(plan.model[key]) for key in MODEL_ARGUMENTS if key in plan.model}
    if max(classes, channels, *others.values()) > most:
        raise JpqError(
            f"{source} declares {classes:,} classes and {channels:,} channels, and {weights} holds at most "
            f"{most:,} numbers: they do not belong together."
        )
    return build(kept_model(name, source.parent), classes, channels, others)


def usual_input(name: str) -> tuple[tuple[int, ...], int] | None:
    """The usual (shape of one sample, number of classes) of a named model; None for the user's own code.

    Raises JpqError for an unknown name.
    """
    if name in MODELS:
        shape = {"lenet5": (1, 28, 28), "convnet": (1, 8, 8)}.get(name, (3, 32, 32))
        return shape, 10
    _refuse_unknown(name)
    if is_third_party(name):
        return usual_third_party_input(name)
    kind, _, architecture = name.partition(":")
    if kind != "torchvision":
        return None
    return zoo.usual_shape(architecture), zoo.CLASSES[zoo.kind_of(architecture)]


def _refuse_unknown(name: str) -> None:
    """Raise JpqError for a name that is no model of jpq and names no kind."""
    if name in zoo.kinds():
        raise unknown("model", name, [f"torchvision:{name}"])
    if ":" not in name:
        raise unknown("model", name, [*MODELS, *NAMED_KINDS, "module:callable"])


def _user_model(spec: str, arguments: Mapping[str, int]) -> nn.Module:
    builder = import_callable("model", spec)
    names = _parameter_names(builder)
    wanted = [key for key in ("vocabulary", "length") if key in _needed_names(builder) and key not in arguments]
    if wanted:
        raise JpqError(
            f"The model '{spec}' needs {' and '.join(wanted)}, which only texts have, and the data are none. Choose a "
            "model made for the data."
        )
    model = call_user_code("model", spec, builder, **{k: v for k, v in arguments.items() if k in names})
    if not isinstance(model, nn.Module):
        raise JpqError(f"Model '{spec}' returned {type(model).__name__}; it must return a torch.nn.Module.")
    return accept_model(model)


def _parameter_names(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the parameters that may be given by keyword."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some built-in callables have no signature
        return frozenset()
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def _check_colour_images(name: str, channels: int, arguments: Mapping[str, int]) -> None:
    """Raise JpqError for data that a model of torchvision cannot take: texts, and images without three channels."""
    if "vocabulary" in arguments:
        raise JpqError(
            f"{name} takes images, and the data are texts. Choose a model of texts (module:callable, or hf:FOLDER)."
        )
    if channels != 3:
        raise JpqError(
            f"{name} takes images of 3 channels; the data has {channels}. "
            "Choose convnet or a resnet of jpq, or give the model as module:callable."
        )


def _needed_names(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the parameters that have no default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some built-in callables have no signature
        return frozenset()
    return frozenset(p.name for p in parameters if p.default is p.empty)


def check_fits(model: nn.Module, example: Any, classes: int | None = None, task: Task = CLASSIFICATION) -> None:
    """Raise JpqError where a model cannot take a batch [B, C, H, W] in evaluation mode, or gives a wrong form.

    `classes` is the number of outputs per sample that the data want; None accepts any number.
    """
    out = task.main_output(check_runs(model, example))
    if not task.fits(out, batch_size(example), classes):
        form = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        expected: Any = [batch_size(example), classes if classes is not None else "classes"]
        if task.name != CLASSIFICATION.name:
            expected = f"{task.row_text(classes or 1)} for each of {batch_size(example)} samples"
        raise JpqError(
            f"The model gives {form} for a batch of shape {_shape_text(example)}; it must give {expected}: jpq "
            f"optimize trains on {task.output_name}. For other outputs use jpq.compress in your own loop."
        )


def check_runs(model: nn.Module, example: Any) -> Any:
    """The model's output for one batch [B, C, H, W] in evaluation mode; JpqError names the layer where it fails."""
    args, kwargs = copy_tensors(split_arguments(example))
    try:
        named = name_inputs(model, args, kwargs)
    except TypeError as error:
        inputs = f"the inputs {', '.join(example)}" if isinstance(example, Mapping) else f"{len(example)} inputs"
        if isinstance(example, Tensor):
            inputs = "one image tensor" if example.dim() == IMAGE_DIMS else "one tensor"
        raise JpqError(
            f"The model does not take {inputs} ({error}), which "
            "is all that the data feed it. Use jpq.trace and jpq.compress in Python, or give data that fit."
        ) from error
    try:
        with eval_mode(model), torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:
        name = "image" if isinstance(example, Tensor) and example.dim() == IMAGE_DIMS else "input"
        reason = locate_failure(model, {name: args[0]} if isinstance(example, Tensor) else named, error)
        raise JpqError(
            f"The model cannot take a batch of shape {_shape_text(example)}: {reason} {_fitting_models(example)}"
        ) from error


def _fitting_models(example: Any) -> str:
    """A sentence on what kind of model takes such inputs."""
    first = collect_tensors(example)[0]
    if first.dtype == torch.uint8:
        return "The inputs are bytes: let the data give floats, such as x.float() / 255."
    if not first.is_floating_point() and first.dim() == ROW_DIMS:
        return "The inputs are word numbers [samples, length]: choose a model of texts (module:callable, or hf:FOLDER)."
    if first.is_floating_point() and first.dim() in (ROW_DIMS, WINDOW_DIMS):
        kind = "rows of numbers" if first.dim() == ROW_DIMS else "windows [samples, channels, time]"
        return f"The inputs are {kind}: choose a model made for these (module:callable)."
    return "Choose a model made for images of this size, channels and type, or resize the data."


def _shape_text(example: Any) -> str:
    """The shapes of a batch's inputs, in words."""
    return ", ".join(str(list(tensor.shape)) for tensor in collect_tensors(example))
