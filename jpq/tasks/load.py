"""The data set and the float model that a config names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jpq.config import Config
from jpq.files.model_files import text_model
from jpq.tasks import CLASSIFICATION, models, with_task
from jpq.tasks.data import Data
from jpq.tasks.data import load as load_data
from jpq.tasks.loaders import sample_of
from jpq.tasks.published_weights import load_named_weights
from jpq.tracing.decompose import decompose
from jpq.tracing.forward import call_model
from jpq.types import JpqError


def read_data(config: Config, device: torch.device, folder: Path | None = None) -> Data:
    """The data set that a config names, on the device, for its task. Raises JpqError where they do not match.

    `folder` is that of a run that has begun: texts are then read with the copy of the tokenizer in it.
    """
    data = load_data(
        config.task.data,
        config.task.data_root,
        batch_size=config.train.batch_size,
        held_out=config.task.held_out,
        augment=config.train.augment,
        seed=config.run.seed,
        device=device,
        limit=config.task.limit,
        image_size=config.task.image_size,
        mean=config.task.mean,
        std=config.task.std,
        skip_bad=config.task.skip_bad,
        task=config.task.task,
        cache=config.task.cache,
        void=config.task.void,
        noise=config.task.noise,
        scale=config.task.scale,
        crop=config.task.crop,
        target_column=config.task.target_column,
        attention_mask=config.task.model.startswith("hf:"),
        text_model=text_model(config.task.model, folder),
    )
    return with_sizes(with_task(data, config.task.task), config.task.model)


def with_sizes(data: Data, model: str) -> Data:
    """The data with the sides of their images among the arguments of a model of timm, which may be built for them."""
    if not model.startswith("timm:") or len(data.shape) != 3:
        return data
    return replace(data, arguments={**data.arguments, "height": data.shape[1], "width": data.shape[2]})


def load_dense_model(config: Config, data: Data, device: torch.device, notes: list[str] | None = None) -> nn.Module:
    """The float model that a config names, decomposed into plain layers, with its weights, checked against the data.

    Sentences on the weights, such as that they were cast, are added to `notes`.
    """
    model = models.build(config.task.model, data.classes, data.shape[0], data.arguments).to(device)
    plain = None
    if config.task.weights is not None:
        plain, about = load_plain_or_own(model, config.task.model, config.task.weights, data.example)
        if notes is not None:
            notes.extend(about)
    models.check_fits(model, data.example, data.classes, data.task)
    spoilt = [weight for weight, value in model.named_parameters() if bool(value.isnan().any())]
    if spoilt:
        raise JpqError(
            f"Model '{config.task.model}' holds NaN in {len(spoilt)} of its weights ({spoilt[0]}). Give it weights "
            "without."
        )
    cut = fit_sizes(data, model.eval())
    check_targets_fit(data, model)
    if notes is not None:
        notes.extend(cut)
    return (plain or decompose(model, data.example)).eval()


def check_targets_fit(data: Data, model: nn.Module) -> None:
    """Raise JpqError where the targets of two samples of a part do not fit the model's outputs, as of other sizes.

    And where the loss is not one number.

    So a part that is read last of all ends the run before its training begins.
    """
    if data.task is CLASSIFICATION:  # class numbers have no size
        return
    for name, split in (("training", data.train), ("held-out", data.held_out), ("test", data.test)):
        x, target = sample_of(split, 2)
        try:
            with torch.no_grad():
                loss = data.task.output_loss(call_model(model, x), target)
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                shape = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
                raise JpqError(f"The loss of task '{data.task.name}' is {shape}; it must be one number, the mean.")
        except JpqError as error:
            raise JpqError(f"The {name} part of '{data.name}': {error}") from error


def fit_sizes(data: Data, model: Callable[..., Any]) -> tuple[str, ...]:
    """Cut held-out and test samples to one size where a model cannot compute each at its own; sentences on that."""
    if not data.task.any_size:
        return ()

    def compute(x: Any) -> Any:
        return data.task.main_output(call_model(model, x))

    found = {name: split.fit_sizes(compute) for name, split in (("Held-out", data.held_out), ("Test", data.test))}
    return tuple(f"{name} split: {sentence}" for name, sentence in found.items() if sentence)


def load_plain_or_own(
    model: nn.Module, name: str, weights: Path, example: Any
) -> tuple[nn.Module | None, tuple[str, ...]]:
    """Copy weights into a model as it was built; or into its plain layers, where they are those of a finished run.

    A run keeps float.safetensors of the model that `decompose` made: where that has other names (attention, GRU), the
    weights fit only the plain layers. Returns these, or None where the model itself took the weights, and sentences on
    the weights. Raises JpqError as `load_named_weights` does.
    """
    try:
        return None, load_named_weights(model, name, weights)
    except JpqError as misfit:
        try:
            plain = decompose(model.eval(), example)
        except Exception:  # a model that cannot take the data: the weights' error comes first
            raise misfit from None
        if plain.state_dict().keys() == model.state_dict().keys():
            raise
        try:
            return plain, load_named_weights(plain, name, weights)
        except JpqError:
            raise misfit from None
