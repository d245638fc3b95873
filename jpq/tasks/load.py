"""The data set and the float model that a config names."""

from __future__ import annotations

import torch
from torch import nn

from jpq.config import Config
from jpq.tasks import models
from jpq.tasks.data import Data
from jpq.tasks.data import load as load_data
from jpq.tasks.weights import load_weights
from jpq.tracing.decompose import decompose


def read_data(config: Config, device: torch.device) -> Data:
    """The data set that a config names, on the device."""
    return load_data(
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
    )


def load_dense_model(config: Config, data: Data, device: torch.device, notes: list[str] | None = None) -> nn.Module:
    """The float model that a config names, decomposed into plain layers, with its weights, checked against the data.

    Sentences on the weights, such as that they were cast, are added to `notes`.
    """
    model = models.build(config.task.model, data.classes, data.shape[0]).to(device)
    if config.task.weights is not None:
        about = load_weights(model, config.task.weights)
        if notes is not None:
            notes.extend(about)
    models.check_fits(model, data.example, data.classes, data.task)
    return decompose(model, data.example).eval()
