"""Checks of a model before it is read: an ordinary floating-point module on one device, without wrappers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jpq.types import JpqError

_QUANTIZED = ("brevitas.", "torch.ao.nn.", "torch.ao.quantization.", "torchao.", "bitsandbytes.")

_FLOAT_STUBS = ("FloatFunctional", "QuantStub", "DeQuantStub", "QuantWrapper")  # of those packages: quantize nothing

_HALF_PRECISION = (torch.float16, torch.bfloat16)


def unwrap_model(model: Any) -> Any:
    """The model inside DataParallel, DistributedDataParallel or torch.compile, with the same parameters."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(model, nn.Module) and _is_compiled(model):
            model = model._orig_mod
        else:
            return model


def accept_model(model: Any) -> nn.Module:
    """Unwrap the model and check that jpq can read it.

    Raises JpqError, naming the part, for anything but a module, for a part that is scripted, compiled, sharded or
    quantized already, and for parameters that have no shape yet, lie on several devices or on the meta device.
    """
    model = unwrap_model(model)
    check_module(model)
    _check_parameters(model)
    return model


def check_module(model: Any) -> None:
    """Raise JpqError for what is no module, or one whose code or weights are no longer there to be changed.

    And for names with a dot (setattr allows them), by which torch finds no part.
    """
    if not isinstance(model, nn.Module):
        raise JpqError(
            f"jpq takes a torch.nn.Module; this is a {type(model).__name__}. Give the module itself, "
            "before it is exported or wrapped in a function."
        )
    if isinstance(model, torch.fx.GraphModule) and "eval" in vars(model):  # torch.export puts one there that raises
        raise JpqError(f"The {type(model).__name__} has no evaluation mode. Give the module that it was exported from.")
    for path, module in model.named_modules():
        problem = _describe_problem(module)
        if problem:
            place = f"Submodule '{path}'" if path else "The model"
            raise JpqError(f"{place} ({type(module).__name__}) {problem}.")
        for name, part in module._modules.items():
            if part is not None and "." in name:
                owner = f"'{path}'" if path else "the model"
                raise JpqError(
                    f"A part of {owner} is named '{name}': torch finds no part whose name has a dot. Name it "
                    f"'{name.replace('.', '_')}', in the weights file too."
                )


def check_full_precision(model: nn.Module) -> None:
    """Raise JpqError where weights are in half precision: gates and ranges that learn need float32."""
    for name, p in model.named_parameters():
        if p.dtype in _HALF_PRECISION:
            raise JpqError(
                f"Parameter '{name}' is in {p.dtype}, which is too narrow to train gates and ranges in. "
                "Give the model in float32 (model.float(), and float32 examples); torch.autocast in your "
                "own loop still works."
            )


def _is_compiled(module: nn.Module) -> bool:
    """Whether the module is a wrapper that torch.compile made."""
    bases = type(module).__mro__
    return any(base.__name__ == "OptimizedModule" and base.__module__.startswith("torch.") for base in bases)


def _describe_problem(module: nn.Module) -> str:
    """The reason why jpq cannot read a module, and the way out; empty if there is none."""
    bases = [(base.__module__, base.__name__) for base in type(module).__mro__]
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted, and its code can no longer be changed: give the Python module that it was scripted from"
    if _is_compiled(module) or isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "is wrapped inside the model: compress the model first, then wrap or compile the result"
    if any(name in ("FSDPModule", "FullyShardedDataParallel") for _, name in bases):
        return "holds only its shard of the weights: give the model before it is sharded"
    if any(package.startswith(_QUANTIZED) and name not in _FLOAT_STUBS for package, name in bases):
        return "is quantized already: give the model in floating point, and jpq decides the bits"
    return ""


def _check_parameters(model: nn.Module) -> None:
    """Raise JpqError for parameters without a shape, of a tensor subclass, or not on one real device."""
    devices: dict[torch.device, str] = {}  # device -> the first parameter there
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(p, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
            raise JpqError(f"'{name}' has no shape yet (a lazy layer). Run the model once on an example, then give it.")
        if type(p.data) is not Tensor and type(p) is not nn.Parameter:
            raise JpqError(
                f"'{name}' is a {type(p.data).__name__}, not an ordinary tensor. Give the model before its "
                "weights are converted or distributed."
            )
        if isinstance(p, nn.Parameter):
            devices.setdefault(p.device, name)
    if len(devices) > 1:
        places = " and ".join(f"{device} ('{name}')" for device, name in list(devices.items())[:2])
        raise JpqError(f"The model's parameters lie on several devices: {places}. Move it to one: model.to('cpu').")
    if any(device.type == "meta" for device in devices):
        raise JpqError(
            "The model lies on the meta device and holds no numbers. Build it on a real device, or give it "
            "random ones: model.to_empty(device='cpu'), then initialise it."
        )
