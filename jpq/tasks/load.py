"""jpq.tasks.load."""

from __future__ import annotations

import torch
from torch import nn

from jpq.config import Config
from jpq.tasks import models
from jpq.tasks.data import Data
from jpq.tasks.data import load as load_data
from jpq.tracing.decompose import decompose


def read_data(config: Config, device: torch.device) -> Data:
    """The configured data set on its device."""
    t = config.task
    return load_data(
        t.data,
        t.data_root,
        batch_size=config.train.batch_size,
        held_out=t.held_out,
        augment=config.train.augment,
        seed=config.run.seed,
        device=device,
        limit=t.limit,
    )


def dense_model(config: Config, data: Data, device: torch.device) -> nn.Module:
    """The float model, unpacked, with --weights where they are given, checked against the data's images and classes."""
    model = models.build(config.task.model, data.classes, data.shape[0]).to(device)
    if config.task.weights is not None:
        models.load_weights(model, config.task.weights)
    models.check_fits(model, data.example, data.classes)
    return decompose(model).eval()
