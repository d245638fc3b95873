"""`--embed-normalization`: the exported file subtracts the mean and divides by the deviation itself.

Its input is then x without normalisation: images as float32 pixels / 255 in [0, 1], columns and series in their units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jpq.config import Config
from jpq.export.origin import ATTRIBUTE, origin_of
from jpq.tasks.data import Data, without_normalisation
from jpq.types import JpqError


class NormalisedInput(nn.Module):
    """A model behind (x - mean) / std of each channel, dim 1 of its input."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, data: Data) -> None:
        super().__init__()
        shape = (-1, *[1] * (len(data.shape) - 1))
        self.model = model
        device = data.example.device
        self.register_buffer("mean", torch.tensor(data.train.mean, device=device).view(shape))
        self.register_buffer("std", torch.tensor(data.train.std, device=device).view(shape))

    def forward(self, x: Tensor) -> Any:
        """The model's output for inputs that are not normalised."""
        return self.model((x - self.mean) / self.std)


def check_embedding(data: Data, config: Config) -> None:
    """Raise JpqError where there is no normalisation to embed."""
    if config.run.embed_normalization and not (data.train.mean and isinstance(data.example, Tensor)):
        raise JpqError(
            f"--embed-normalization: the inputs of '{data.name}' are not normalised by a mean for each channel. Leave "
            "it out."
        )


def as_exported(model: nn.Module, data: Data, config: Config) -> tuple[nn.Module, Data]:
    """The model as its file has it, and the data as that file takes them: both as they are, without the setting."""
    if not config.run.embed_normalization:
        return model, data
    check_embedding(data, config)
    wrapped = NormalisedInput(model, data).train(model.training)
    origin = origin_of(model)
    if origin is not None:
        vars(wrapped)[ATTRIBUTE] = origin
    return wrapped, without_normalisation(data)


def describe_normalisation(data: Data, config: Config) -> dict[str, Any]:
    """Mean and deviation that a user of the file has to apply, and those in its graph, if any."""
    mean, std = list(data.train.mean), list(data.train.std)
    if not config.run.embed_normalization:
        return {"mean": mean, "std": std}
    plain = {"mean": [0.0] * len(mean), "std": [1.0] * len(std)}
    return {**plain, "embedded_mean": mean, "embedded_std": std}
